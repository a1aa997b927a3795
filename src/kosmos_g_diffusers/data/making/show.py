"""A page of samples of any source, exactly as training reads them: `kosmos-g data show`."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedTokenizerBase

from ...files import check_output_file
from ...processing_kosmos_g import IMAGE_MEAN, IMAGE_STD, KosmosGProcessor, KosmosGTokenizer
from ..collate import AlignCollate, Batch, InstructCollate, PretrainCollate, Row, put_image_first
from ..mixture import FILTERED, MixtureDataset
from ..sample import BadSample, FilteredSample, Sample
from ..sources import build_source
from .contact_sheet import describe_stored, figure, write_page

FORMS = ("tsv:", "shards:", "folder:", "datasets:")
CHARACTERS = 4  # of English a token, where no model is at hand
EXAMPLES = 3
BARS = 24
WIDTH, HEIGHT = 340, 150  # of a plot, pixels


def show(
    line: str,
    path: str | Path,
    *,
    samples: int = 100,
    read: int = 1000,
    model: str | Path | None = None,
    stage: str = "instruct",
    target_tokenizer: PreTrainedTokenizerBase | None = None,
    resolution: int = 512,
    seed: int = 0,
) -> tuple[Path, str]:
    """Write a page that shows the first samples of a source in the order, and with the random choices, of training.

    Args:
        line: of a source; anything else is taken for shards.
        path: the page to write.
        samples: how many are shown.
        read: how many are read for the counts and plots, at least `samples`.
        model: folder of a model, whose tokens are counted and whose limits hold; None counts four characters a token and leaves nothing
            out for its length.
        stage: pretrain, align or instruct.
        target_tokenizer: of the text encoder that the alignment stage imitates.
        resolution: of the images to draw.
        seed: of the run.

    Returns:
        (path, what was read and left out, as text).

    Raises:
        ValueError: not a source, or no samples in it; the page cannot be written.
    """
    path = check_output_file(path)
    if samples < 1:
        raise ValueError(f"{samples} samples were asked for. Ask for at least one.")
    source = build_source(line if line.startswith(FORMS) else f"shards:{line}")
    collate = _build_collate(model, stage, target_tokenizer, resolution)
    dataset = MixtureDataset([source], collate, batch_size=1, seed=seed)
    with_words = copy.copy(source)
    with_words.word_dropout = 0.0
    undropped = MixtureDataset([with_words], Plain(), batch_size=1, seed=seed)
    shown, left_out, found = [], [], []
    for position in range(min(max(read, samples), len(source))):
        try:
            sample, row = dataset.draw(0, position)
        except BadSample as problem:
            left_out.append(problem)
            if len(shown) < samples:
                index = dataset.orders[0][position]
                shown.append({**describe_stored(source, index), "problem": f"left out: {problem}"})
            continue
        sample = _as_stage(sample, stage)
        found.append(_measure(sample, row))
        if len(shown) < samples:
            described = describe_stored(source, dataset.orders[0][position])
            whole = _as_stage(undropped.draw(0, position)[0], stage)
            shown.append({**described, "trained": _describe(sample, whole, row)})
    summary = _summarize(line, len(source), found, left_out, model, stage)
    title = f"{len(shown)} of {len(source):,} samples"
    write_page(path, title, shown, summary, _plot(found))
    return path, summary


class Plain:
    """A collate without a model: it looks at what can be looked at without one."""

    def prepare(self, sample: Sample, generator: torch.Generator) -> Row:
        if not any(not isinstance(part, str) or part.strip() for part in sample.prompt):
            raise BadSample("caption", f"{sample.key} has an empty prompt")
        return {}

    def __call__(self, rows: Sequence[Row]) -> Batch:
        return {}


def _build_collate(model, stage, target_tokenizer, resolution):
    """The collate of a stage, of a model's tokenizer."""
    if model is None:
        return Plain()
    tokenizer = KosmosGTokenizer.from_pretrained(Path(model), subfolder="tokenizer")
    processor = KosmosGProcessor(tokenizer)
    if stage == "pretrain":
        return PretrainCollate(processor)
    if stage == "align":
        return AlignCollate(processor, target_tokenizer)
    return InstructCollate(processor, resolution)


def _as_stage(sample, stage):
    """A sample with the prompt, and without what the stage does not draw."""
    if stage == "pretrain":
        return replace(sample, prompt=put_image_first(sample), target=None)
    if stage == "align":
        return replace(sample, prompt=(sample.caption,), target=None)
    return sample


def _measure(sample, row):
    """(tokens, images, shorter side of what is drawn or shown) of a sample, for the plots."""
    words = sum(len(part) for part in sample.prompt if isinstance(part, str))
    images = [part for part in sample.prompt if not isinstance(part, str)]
    tokens = len(row["ids"]) if "ids" in row else round(words / CHARACTERS)
    image = sample.target or (images[0] if images else None)
    return tokens, len(images), None if image is None else min(image.size)


def _describe(sample, whole, row):
    """What the page shows of a sample as training reads it: its prompt with images in place, what is drawn, words left out."""
    kept, words, shown, number = _texts(sample.prompt), _texts(whole.prompt), [], 0
    images = [part for part in sample.prompt if not isinstance(part, str)]
    for number, text in enumerate(words):
        left = kept[number] if number < len(kept) and text.startswith(kept[number]) else text
        shown += [{"text": left}] * bool(left) + [{"text": text[len(left) :], "dropped": True}] * (
            text != left
        )
        if number < len(images):
            shown.append(figure(_as_read(row, number, images[number]), ""))
    tokens, count, _ = _measure(sample, row)
    text = f"{'' if 'ids' in row else 'about '}{tokens} tokens, {count} images"
    if row.get("drop_condition"):
        text += "; this time trained without its prompt, for guidance"
    target = None if sample.target is None else figure(_as_drawn(row, sample.target), "")
    return {"prompt": shown, "length": text, "target": target, "caption": sample.caption}


def _texts(prompt):
    """The texts before, between and behind the images of a prompt."""
    texts = [""]
    for part in prompt:
        if isinstance(part, str):
            texts[-1] += part
        else:
            texts.append("")
    return texts


def _as_read(row, number, image):
    """An image as the encoder reads it, where a model says how."""
    if "pixels" not in row:
        return image
    pixels = row["pixels"][number].transpose(1, 2, 0) * np.array(IMAGE_STD) + np.array(IMAGE_MEAN)
    return PIL.Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def _as_drawn(row, image):
    if "target_pixel_values" not in row:
        return image
    pixels = (row["target_pixel_values"].numpy().transpose(1, 2, 0) + 1) * 127.5
    return PIL.Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _summarize(line, total, found, left_out, model, stage):
    causes = Counter(FILTERED * isinstance(problem, FilteredSample) + problem.cause for problem in left_out)
    lines = [
        f"{line}: {total:,} samples; {len(found) + len(left_out):,} read, {len(left_out):,} of them left out."
    ]
    for cause, number in causes.most_common():
        examples = [problem.message for problem in left_out if cause.endswith(problem.cause)][:EXAMPLES]
        lines.append(f"  {cause}: {number:,}, such as {'; '.join(examples)}")
    if found:
        tokens = np.array([number for number, _, _ in found])
        sides = np.array([side for _, _, side in found if side is not None])
        counted = (
            f"tokens (with those of images) of {model}" if model else f"tokens (of {CHARACTERS} characters)"
        )
        lines.append(f"Prompts have {_range(tokens)} {counted}; stage {stage}.")
        if len(sides):
            lines.append(f"Shorter sides are {_range(sides)} pixels.")
        lines.append(
            "Images in a prompt: "
            + ", ".join(f"{n}: {c:,}" for n, c in sorted(Counter(i for _, i, _ in found).items()))
            + "."
        )
    return "\n".join(lines)


def _range(values):
    return f"{values.min():,.0f} to {values.max():,.0f} (median {np.median(values):,.0f})"


@dataclass(frozen=True)
class Plot:
    """A histogram, as the page draws it."""

    title: str
    width: int
    height: int
    bars: list[dict[str, Any]]
    marks: list[dict[str, Any]]


def _plot(found):
    """Histograms of lengths, sizes and numbers of images."""
    columns = {
        "tokens of prompts": [tokens for tokens, _, _ in found],
        "shorter side of images, pixels": [side for _, _, side in found if side is not None],
        "images in a prompt": [images for _, images, _ in found],
    }
    return [histogram(title, values) for title, values in columns.items() if values]


def histogram(title: str, values: Sequence[float]) -> Plot:
    """A histogram of numbers as bars with their counts."""
    low, high = min(values), max(values)
    edges = np.linspace(low, high + 1, min(BARS, int(high - low) + 1) + 1)
    counts, edges = np.histogram(values, edges)
    step, most = (WIDTH - 20) / len(counts), counts.max()
    bars = []
    for number, count in enumerate(counts.tolist()):
        height = round((HEIGHT - 50) * count / most)
        label = f"{edges[number]:.0f} to {edges[number + 1]:.0f}: {count:,}"
        place = {"x": round(10 + number * step, 1), "y": HEIGHT - 20 - height}
        bars.append(
            {**place, "width": max(round(step - 1, 1), 1), "height": height, "label": label, "fill": "#47a"}
        )
    marks = [{"x": 10, "y": HEIGHT - 6, "anchor": "start", "text": f"{low:,.0f}"}]
    marks.append({"x": WIDTH - 10, "y": HEIGHT - 6, "anchor": "end", "text": f"{high:,.0f}"})
    marks.append({"x": WIDTH - 10, "y": 14, "anchor": "end", "text": f"up to {most:,}"})
    return Plot(title, WIDTH, HEIGHT, bars, marks)
