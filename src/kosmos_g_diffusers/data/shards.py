"""WebDataset tar shards as a source of samples. Their layout is in docs/data.md; shard_writer.py makes them."""

import json
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image

from ..files import first_line
from .recipes import (
    BACKGROUND,
    WORD_DROPOUT,
    caption_sample,
    check_caption,
    composition_sample,
    edit_sample,
    sample_of_uses,
)
from .sample import IMAGE_LENGTH, BadSample, Sample, clean_text, decode_image, decode_text
from .shard_files import INDEX_NAME, ShardFiles, TarSample

logger = logging.getLogger(__name__)

MOST_RECORD_BYTES = 1024**2
MOST_PARTS = 64  # images and texts of a prompt, pairs of an edit, entities of a composition
INDEXED_SAMPLES = 262_144  # of the shards whose index is kept; a shuffle window has to fit
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
TEXTS = ("caption", "edit", "input", "prompt")  # uses of a line
IMAGE_NAME = re.compile(r"[0-9]{1,3}(\.[a-z]+)?")


class ShardSource:
    """Samples of WebDataset shards, read in any order. A shard is a plain tar file, local or fetched whole to a cache.

    Args:
        where: see `ShardFiles`.
        name: for messages; None takes "shards".
        word_dropout, background: as in `TsvSource`.
        cache_dir: folder for fetched shards and for counts.
        cache_bytes: fetched shards beyond it are deleted, the longest unused first; None keeps all.
        uses: of shards with other names: use -> member, such as {"source": "original_image.jpg", "image": "edited_image.jpg",
            "edit": "edit_prompt.txt"}, or a field of a JSON member, "json.edit". `images` are members with commas between them.

    Raises:
        ValueError: no data found, or shards missing that shards.json names.
    """

    name: str
    word_dropout: float
    background: float
    uses: dict[str, str]
    files: ShardFiles
    groups: Sequence[int]

    def __init__(
        self,
        where: str | Path,
        *,
        name: str | None = None,
        word_dropout: float = WORD_DROPOUT,
        background: float = BACKGROUND,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        uses: dict[str, str] | None = None,
    ):
        self.uses = {use: name.removeprefix(".") for use, name in (uses or {}).items()}
        self.name = name or "shards"
        self.word_dropout, self.background = word_dropout, background
        self.files = ShardFiles(where, cache_dir=cache_dir, cache_bytes=cache_bytes)
        self.groups = self.files.count()
        self._ends = np.cumsum(self.groups)
        if not len(self):
            raise ValueError(f"No data found: the {len(self.files)} shards at {where} hold no samples.")
        self._indices, self._warns = OrderedDict(), True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict()}  # each worker finds its own

    def __len__(self) -> int:
        return int(self._ends[-1])

    def length(self, index: int) -> int:
        """From the names and sizes of the members: the JSON is little more than the text."""
        members = self._locate(index)[1].members
        if self.uses:
            texts = {name.lower() for use, name in self.uses.items() if use in TEXTS}
            text = sum(members.get(name, members.get(name.partition(".")[0], (0, 0)))[1] for name in texts)
            return text + IMAGE_LENGTH * (("source" in self.uses) + len(_split(self.uses.get("images", ""))))
        images = len({name.partition(".")[0] for name in members if name[0].isdigit()})
        if any(name.startswith("0.source.") for name in members):
            images = 1  # of several pairs, one is drawn
        text = sum(size for name, (_, size) in members.items() if name in ("json", "txt"))
        return text + IMAGE_LENGTH * images

    def read(self, index: int, rng: Random) -> Sample:
        shard, sample = self._locate(index)
        members = Members(self.files, shard, sample)
        if sample.problem:
            raise BadSample("shard", f"{members.key} {sample.problem}")
        if self.uses:
            return self._read_uses(members, rng)
        record = members.record()
        if "prompt" in record:
            return self._read_prompt(record, members)
        if "edit" in record:
            return self._read_edit(record, members, rng)
        if "entities" in record:
            return self._read_composition(record, members, rng)
        return caption_sample(members.key, record.get("caption"), members.target())

    def _read_uses(self, members, rng):
        texts = {use: members.text(self.uses[use]) for use in TEXTS if self.uses.get(use)}
        target, source = (
            members.member_image(self.uses[use]) if self.uses.get(use) else None
            for use in ("image", "source")
        )
        images = [members.member_image(name) for name in _split(self.uses.get("images", ""))]
        return sample_of_uses(members.key, texts, target, rng, source, images, word_dropout=self.word_dropout)

    def _read_composition(self, record, members, rng):
        key, caption, entities = members.key, record.get("caption"), record["entities"]
        sound = isinstance(entities, list) and all(isinstance(words, str) for words in entities)
        if not sound or len(entities) > MOST_PARTS:
            raise BadSample("row", f"{key}: entities is not a list of at most {MOST_PARTS} strings")
        target, chances = members.target(), (self.word_dropout, self.background)
        return composition_sample(key, caption, entities, members.entity, target, rng, *chances)

    def _read_prompt(self, record, members):
        parts, prompt = record["prompt"], []
        if not isinstance(parts, list) or not 0 < len(parts) <= MOST_PARTS:
            raise BadSample("row", f"{members.key}: prompt is not a list of 1 to {MOST_PARTS} parts")
        for part in parts:
            if isinstance(part, str):
                prompt.append(clean_text(part, members.key))
            elif isinstance(part, dict) and IMAGE_NAME.fullmatch(str(part.get("image"))):
                prompt.append(members.image(str(part["image"])))
            else:
                raise BadSample("row", f'{members.key}: a prompt part is neither text nor {{"image": "0"}}')
        caption = record.get("caption")
        caption = check_caption(caption, members.key) if caption is not None else None
        return Sample(members.key, tuple(prompt), members.target(), caption)

    def _read_edit(self, record, members, rng):
        pairs = 0
        while members.has(f"{pairs}.source") and pairs < MOST_PARTS:
            pairs += 1
        if not pairs:
            raise BadSample("row", f"{members.key} is an edit without the images 0.source and 0.target")
        pair = rng.randrange(pairs)
        source, target = members.image(f"{pair}.source"), members.image(f"{pair}.target")
        words, edit, caption = record.get("input"), record["edit"], record.get("caption")
        return edit_sample(members.key, words, edit, source, target, caption, rng, self.word_dropout)

    def _locate(self, index):
        """(number of the shard, TarSample). Raises BadSample for the samples that a shard should have but does not."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        samples = self._index(number)
        row = index - int(self._ends[number]) + self.groups[number]
        if row >= len(samples):
            name, count = self.files.names[number], self.groups[number]
            raise BadSample("shard", f"{name} holds {len(samples)} samples, and should hold {count}")
        return number, samples[row]

    def _check_count(self, number):
        """Say once that shards hold more than shards.json says: the rest of them is never read."""
        found, said = self._indices[number], self.groups[number]
        if self._warns and not isinstance(found, BadSample) and len(found) > said:
            self._warns = False
            logger.warning(
                "%s holds %d samples, and %s says %d: the others are never read. List the shards anew (write_shard_index).",
                *(self.files.names[number], len(found), INDEX_NAME, said),
            )

    def _index(self, number):
        """The samples of a shard; raises the same BadSample again for a shard that cannot be read."""
        if number in self._indices:
            self._indices.move_to_end(number)
        else:
            try:
                self._indices[number] = self.files.index(number)
            except BadSample as error:
                self._indices[number] = error
            self._check_count(number)
            kept = sum(self.groups[shard] for shard in self._indices)
            while kept > INDEXED_SAMPLES and len(self._indices) > 1:
                kept -= self.groups[self._indices.popitem(last=False)[0]]
        found = self._indices[number]
        if isinstance(found, BadSample):
            raise BadSample(found.cause, found.message)
        return found


def _split(names):
    return [name.removeprefix(".") for name in names.split(",") if name]


class Members:
    """The members of one sample of a shard, by name."""

    files: ShardFiles
    shard: int
    sample: TarSample
    key: str

    def __init__(self, files: ShardFiles, shard: int, sample: TarSample):
        self.files, self.shard, self.sample = files, shard, sample
        self.key = f"{files.names[shard]}:{sample.key}"

    def record(self) -> dict[str, Any]:
        """What the JSON says, a dict; of shards without JSON, the text as a caption."""
        record, members = {}, self.sample.members
        if "json" in members:
            try:
                record = json.loads(self._bytes("json", MOST_RECORD_BYTES))
            except (ValueError, RecursionError) as error:
                raise BadSample("row", f"{self.key} has a .json that cannot be read ({error})") from error
            if not isinstance(record, dict):
                raise BadSample("row", f"{self.key}'s .json holds a {type(record).__name__}, not an object")
        elif "txt" not in members:
            endings = ", ".join(sorted(members)[:8])
            raise BadSample("row", f"{self.key} has neither .json nor .txt, only {endings}")
        if record.get("caption") is None and "txt" in members:
            record["caption"] = decode_text(self._bytes("txt", MOST_RECORD_BYTES), self.key)
        return record

    def text(self, name: str) -> Any:
        """A text member, or of "json.a.b" the field b of a of a JSON member. Raises BadSample."""
        member, _, field = name.partition(".")
        if name.lower() in self.sample.members:
            return decode_text(self._bytes(name.lower(), MOST_RECORD_BYTES), self.key)
        if not field or member not in self.sample.members:
            raise BadSample(
                "row", f"{self.key} has no .{name}, only {', '.join(sorted(self.sample.members)[:8])}"
            )
        try:
            value = json.loads(self._bytes(member, MOST_RECORD_BYTES))
            for part in field.split("."):
                value = value[part]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise BadSample(
                "row", f"{self.key} has no field {field} in its .{member} ({first_line(error)})"
            ) from error
        return value

    def member_image(self, name: str) -> PIL.Image.Image:
        """The image of a member's whole name. Raises BadSample."""
        if name.lower() not in self.sample.members:
            raise BadSample(
                "image", f"{self.key} has no .{name}, only {', '.join(sorted(self.sample.members)[:8])}"
            )
        return decode_image(self._bytes(name.lower()), self.key)

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def image(self, name: str) -> PIL.Image.Image:
        """The image NAME.jpg, NAME.png, ...; with the name "" the one that has none. Raises BadSample."""
        member = self._find(name)
        if member is None:
            raise BadSample("image", f"{self.key} has no image {name} ({'|'.join(IMAGE_ENDINGS)})")
        return decode_image(self._bytes(member), self.key)

    def entity(self, number: int, whole: bool) -> PIL.Image.Image:
        """An entity's image with its background (`whole`) or cut out; the other one where only that is there."""
        first, second = (f"{number}", f"{number}.cutout") if whole else (f"{number}.cutout", f"{number}")
        return self.image(second if self.has(second) and not self.has(first) else first)

    def target(self) -> PIL.Image.Image | None:
        """The image `target`, or the only one that has no name, as in shards made by img2dataset. None without."""
        return next((self.image(name) for name in ("target", "") if self.has(name)), None)

    def _find(self, name):
        """The member that holds an image, or None."""
        members = [f"{name}.{ending}".removeprefix(".") for ending in IMAGE_ENDINGS]
        return next((member for member in members if member in self.sample.members), None)

    def _bytes(self, name, most=None):
        offset, size = self.sample.members[name]
        if most is not None and size > most:
            raise BadSample("row", f"{self.key} has a .{name} of {size:,} bytes; at most {most:,} are read")
        return self.files.read(self.shard, offset, size)
