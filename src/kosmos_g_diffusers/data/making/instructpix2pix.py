"""Edits from InstructPix2Pix: its original folder, or its data set on the Hub, as shards."""

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch.utils.data

from ...files import read_json
from ..hub_datasets import HubDatasetSource
from ..sample import BadSample
from ..settings import EditSettings
from .inputs import Input, read_ahead, read_image_file, shrink
from .output_folder import OutputFolder

SEED = re.compile(r"[A-Za-z0-9-]{1,64}")
MOST_PAIRS = 64  # of an edit; training reads no more


def instructpix2pix(
    output: str | Path,
    settings: EditSettings,
    *,
    workers: int = 2,
    process_index: int = 0,
    num_processes: int = 1,
    samples_per_shard: int = 1000,
    sheet_samples: int = 100,
) -> dict[str, Any]:
    """Write InstructPix2Pix as shards of edits, or continue to.

    Args:
        output: folder of shards, see `OutputFolder`.
        settings: an `EditSettings`.
        workers: processes that decode images; 0 decodes in this one.
        process_index, num_processes, samples_per_shard: see `OutputFolder`.
        sheet_samples: samples on the contact sheet; 0 writes none.

    Returns:
        dict: the manifest.

    Raises:
        ValueError: nothing is found where it should be, or as `OutputFolder` says.
        ImportError: the package datasets is not installed.
    """
    command, recorded = "instructpix2pix", asdict(settings)
    edits = EditFolder(settings.folder) if settings.dataset is None else EditDataset(settings)
    if settings.folder is not None:  # its own name: it may lie elsewhere tomorrow
        recorded = {"folder": Path(settings.folder).resolve().name, "size": settings.size}
    with OutputFolder(output, command, recorded, process_index, num_processes, samples_per_shard) as folder:
        todo = folder.todo(edits.inputs)
        if todo:
            with folder.progress(todo) as bar:
                for batch in read_ahead(Edits(edits, todo, settings.size), 8, workers):
                    for item, edit in batch:
                        _write(folder, item, edit)
                    bar.update(len(batch))
    return folder.finish(sheet_samples)


@dataclass(frozen=True)
class Edit:
    """An edit, as `ShardWriter.write_edit` takes it; `problems` say which of its pairs could not be read."""

    edit: str
    pairs: list[tuple[PIL.Image.Image, PIL.Image.Image]]
    words: str | None
    caption: str | None
    problems: tuple[str, ...] = ()


class Edits(torch.utils.data.Dataset[tuple[Input, Edit | BadSample]]):
    """(input, `Edit`) of each input, images shrunk; (input, BadSample) where there is none."""

    edits: "EditFolder | EditDataset"
    inputs: Sequence[Input]
    size: int

    def __init__(self, edits: "EditFolder | EditDataset", inputs: Sequence[Input], size: int):
        self.edits, self.inputs, self.size = edits, inputs, size

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Input, Edit | BadSample]:
        item = self.inputs[index]
        try:
            edit = self.edits.read(item)
        except BadSample as problem:
            return item, problem
        pairs = [tuple(shrink(image, self.size) for image in pair) for pair in edit.pairs]
        return item, replace(edit, pairs=pairs)


class EditFolder:
    """The original layout: NAME/prompt.json, and of each seed NAME/SEED_0.jpg (before) and NAME/SEED_1.jpg (after).

    `seeds.json` lists them: [[NAME, [SEED, ...]], ...]. Without it the folder is searched.

    Raises:
        ValueError: nothing is found, or seeds.json is not such a list.
    """

    folder: Path
    seeds: dict[str, list[str]]
    inputs: list[Input]

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {folder}. Pass the folder that holds seeds.json.")
        index = self.folder / "seeds.json"
        self.seeds = self._read_seeds(index) if index.is_file() else self._find_seeds()
        if not self.seeds:
            raise ValueError(
                f"There are no edits in {folder}. Expected NAME/prompt.json with images NAME/SEED_0.jpg and NAME/SEED_1.jpg."
            )
        self.inputs = [Input(name) for name in self.seeds]

    def read(self, item: Input) -> Edit:
        """The `Edit` of an input. Raises BadSample."""
        place = self.folder / item.name
        try:
            prompt = read_json(place / "prompt.json")
        except (OSError, ValueError) as error:
            raise BadSample("row", f"{item.source} has no prompt.json that can be read ({error})") from error
        edit = prompt.get("edit") if isinstance(prompt, dict) else None
        if not isinstance(edit, str) or not edit.strip():
            raise BadSample("row", f"{item.source}/prompt.json has no text under 'edit'")
        pairs, problems = [], []
        for seed in self.seeds[item.name][:MOST_PAIRS]:
            try:
                names = (f"{seed}_0.jpg", f"{seed}_1.jpg")
                pairs.append(tuple(read_image_file(place / name, f"{item.source}/{name}") for name in names))
            except BadSample as problem:
                problems.append(problem.message)
        if not pairs:
            raise BadSample("image", problems[0] if problems else f"{item.source} has no images")
        words, caption = (_line(prompt.get(name)) for name in ("input", "output"))
        return Edit(_line(edit), pairs, words, caption, tuple(problems))

    def _read_seeds(self, index):
        listed = read_json(index)
        seeds = {}
        for entry in listed if isinstance(listed, list) else [None]:
            sound = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)
            # one folder down and no further: the list may come from anyone
            sound = sound and isinstance(entry[0], str) and Path(entry[0]).name == entry[0] not in ("", "..")
            if not sound or not all(SEED.fullmatch(str(seed)) for seed in entry[1]):
                raise ValueError(
                    f"{index} is not a list of seeds: entry {str(entry)[:100]!r}. Expected [[NAME, [SEED, ...]], ...]. Delete it "
                    "to have the folder searched."
                )
            seeds[entry[0]] = [str(seed) for seed in entry[1]]
        return seeds

    def _find_seeds(self):
        seeds = {}
        for place in sorted(self.folder.iterdir()):
            # nothing in a plain file
            found = sorted(path.name.removesuffix("_0.jpg") for path in place.glob("*_0.jpg"))
            if found := [seed for seed in found if SEED.fullmatch(seed)]:
                seeds[place.name] = found
        return seeds


class EditDataset:
    """Rows of a Hugging Face data set, with one pair each.

    Raises:
        ImportError, ValueError: as `HubDatasetSource` does.
    """

    rows: HubDatasetSource
    inputs: list[Input]

    def __init__(self, settings: EditSettings):
        which = {"split": settings.split, "revision": settings.revision}
        self.rows = HubDatasetSource.load(settings.dataset, **which, word_dropout=0, **dict(settings.columns))
        self.inputs = [Input(f"{settings.dataset}:{settings.split}:{row}") for row in range(len(self.rows))]

    def read(self, item: Input) -> Edit:
        """The `Edit` of an input. Raises BadSample."""
        sample = self.rows.read(int(item.name.rpartition(":")[2]), random.Random(0))
        *words, before, edit = sample.prompt
        return Edit(edit, [(before, sample.target)], words[0] if words else None, sample.caption)


def _write(folder, item, edit):
    if isinstance(edit, BadSample):
        return folder.skip(item, edit)
    note = {"source": item.source} | ({"left_out": list(edit.problems)} if edit.problems else {})
    folder.writer.write_edit(item.key, edit.edit, edit.pairs, edit.words, edit.caption, note)


def _line(text):
    """Text on one line, None if there is none."""
    return " ".join(text.split()) or None if isinstance(text, str) else None
