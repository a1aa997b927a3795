"""Compositions from images alone: caption, the things in it, each of them cut out (paper sec. 3, instruction data)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.utils.data
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...quiet import brief_bars
from ..sample import BadSample, FilteredSample
from ..settings import CUTTING_SIDE, ComposeSettings
from .cutouts import Segmenter, cut_out
from .entities import EntityFinder, build_chat
from .inputs import Input, find_images, read_ahead, read_image_file, shrink
from .output_folder import OutputFolder


def compose(
    images: str | Path,
    output: str | Path,
    settings: ComposeSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    workers: int = 2,
    process_index: int = 0,
    num_processes: int = 1,
    samples_per_shard: int = 1000,
    sheet_samples: int = 100,
) -> dict[str, Any]:
    """Make compositions of the images in a folder, or continue to.

    Args:
        images: folder of images, read with all below it.
        output: folder of shards, see `OutputFolder`.
        settings: a `ComposeSettings`; None takes the defaults.
        device, dtype: where and in what precision the models run.
        batch_size: images a step, and (image, thing) pairs that are segmented together.
        workers: processes that decode images ahead; 0 decodes in this one.
        process_index, num_processes, samples_per_shard: see `OutputFolder`.
        sheet_samples: samples on the contact sheet; 0 writes none.

    Returns:
        dict: the manifest.

    Raises:
        ValueError: no images, nothing could be made of any, or as `OutputFolder` says.
        OSError: a model cannot be loaded, or the disk is full.
    """
    settings = settings or ComposeSettings()
    inputs = find_images(images, leave_out=output)
    recorded = recorded_settings(images, settings)
    with OutputFolder(output, "compose", recorded, process_index, num_processes, samples_per_shard) as folder:
        todo = folder.todo(inputs)
        if todo:
            batches = read_ahead(SquareImages(images, todo, settings.min_side), batch_size, workers)
            composer = Composer(settings, device=device, dtype=dtype, batch_size=batch_size)
            with folder.progress(todo) as bar:
                for batch in batches:
                    write_compositions(folder, compose_batch(composer, batch))
                    bar.update(len(batch))
    return folder.finish(sheet_samples)


class SquareImages(torch.utils.data.Dataset[tuple[Input, PIL.Image.Image | BadSample]]):
    """(input, RGB PIL image) of each input: its centre, square; (input, BadSample) where there is none."""

    folder: Path
    inputs: Sequence[Input]
    min_side: int

    def __init__(self, folder: str | Path, inputs: Sequence[Input], min_side: int):
        self.folder, self.inputs, self.min_side = Path(folder), inputs, min_side

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Input, PIL.Image.Image | BadSample]:
        item = self.inputs[index]
        try:
            image = read_image_file(self.folder / item.name, item.source)
            side = min(image.size)
            if side < self.min_side:
                size = f"{image.width} x {image.height}"
                raise FilteredSample("small", f"{item.source} is {size}, less than {self.min_side} pixels")
            left, top = (image.width - side) // 2, (image.height - side) // 2
            return item, shrink(image.crop((left, top, left + side, top + side)), CUTTING_SIDE)
        except BadSample as problem:
            return item, problem


@dataclass(frozen=True)
class Composition:
    """Attributes: as `ShardWriter.write_composition` takes them; `areas` are shares of the image, of each entity."""

    caption: str
    target: PIL.Image.Image
    entities: list[tuple[str, PIL.Image.Image, PIL.Image.Image]]
    areas: list[float]


class Composer:
    """The three models that make compositions.

    Args:
        settings: a `ComposeSettings`.
        device, dtype, batch_size: as in `compose`.
    """

    settings: ComposeSettings
    captioner: "Captioner"
    entity_finder: EntityFinder
    segmenter: Segmenter

    def __init__(
        self,
        settings: ComposeSettings,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
    ):
        self.settings, where = settings, {"device": device, "dtype": dtype}
        self.captioner = Captioner(settings.model_caption, **where, max_new_tokens=settings.caption_tokens)
        limits = {"max_new_tokens": settings.entity_tokens, "max_entities": settings.max_entities}
        self.entity_finder = EntityFinder(settings.model_entities, **where, **limits)
        self.segmenter = Segmenter(settings.model_segment, **where, batch_size=batch_size)

    def __call__(self, images: Sequence[PIL.Image.Image]) -> list[Composition | BadSample]:
        """For each square RGB PIL image a `Composition`, or the BadSample that says why there is none."""
        captions = self.captioner(images)
        spoken = [caption for caption in captions if caption]
        answers = iter(self.entity_finder(spoken) if spoken else ())
        found = [next(answers) if caption else [] for caption in captions]
        maps = self.segmenter(images, found)
        return [self._compose(*each) for each in zip(images, captions, found, maps, strict=True)]

    def _compose(self, image, caption, names, maps):
        if not caption:
            return BadSample("caption", "the caption is empty")
        if not names:
            return BadSample("entities", f"no thing to cut out was found in the caption {caption!r}")
        entities, areas, size = [], [], self.settings.size
        for name, logits in zip(names, maps, strict=True):
            cut = cut_out(image, logits, self.settings.threshold, self.settings.min_area)
            if cut is not None:
                whole, cutout, area = cut
                entities.append((name, shrink(whole, size), shrink(cutout, size)))
                areas.append(round(area, 4))
        if not entities:
            return BadSample("cut-out", f"nothing large enough was found: {', '.join(names)} of {caption!r}")
        return Composition(caption, image.resize((size, size)), entities, areas)


class Captioner:
    """Says what images show: a captioner of transformers that needs no prompt, BLIP-2 or BLIP.

    Args:
        model: folder or Hub id, such as Salesforce/blip2-opt-2.7b.
        device, dtype: where and in what precision it runs.
        max_new_tokens: of a caption.

    Raises:
        OSError: the model cannot be loaded.
    """

    processor: Any
    model: Any
    max_new_tokens: int

    @brief_bars()
    def __init__(
        self, model: str, *, device: str | torch.device, dtype: torch.dtype, max_new_tokens: int = 32
    ):
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def __call__(self, images: Sequence[PIL.Image.Image]) -> list[str]:
        """A caption, one line, for each of a list of RGB PIL images; the likeliest words, without chance."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device, self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def compose_batch(
    composer: Composer, batch: Sequence[tuple[Input, PIL.Image.Image | BadSample]]
) -> list[tuple[Input, Composition | BadSample]]:
    """What comes of the images of a batch of `SquareImages`, in its order."""
    images = [image for _, image in batch if not isinstance(image, BadSample)]
    made, results = iter(composer(images) if images else ()), []
    for item, image in batch:
        result = image if isinstance(image, BadSample) else next(made)
        if isinstance(result, BadSample) and result is not image:
            result = BadSample(result.cause, f"{item.source}: {result.message}")
        results.append((item, result))
    return results


def write_compositions(
    folder: OutputFolder, results: Sequence[tuple[Input, Composition | BadSample]]
) -> None:
    """Write what came of a batch, or why nothing did."""
    for item, result in results:
        if isinstance(result, BadSample):
            folder.skip(item, result)
        else:
            note = {"source": item.source, "areas": result.areas}
            folder.writer.write_composition(item.key, result.caption, result.target, result.entities, note)


def recorded_settings(images: str | Path, settings: ComposeSettings) -> dict[str, Any]:
    """What a folder's manifest keeps of how it was made."""
    # the folder's own name: it may lie elsewhere tomorrow, and images are known by their path within it
    return {"images": Path(images).resolve().name, **asdict(settings), "question": build_chat("...")}
