"""WebDataset tar shards as a source of samples. Their layout is in docs/data.md; shard_writer.py makes them."""

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ..files import first_line
from .recipes import BACKGROUND, WORD_DROPOUT
from .records import ReadImage, Record
from .sample import IMAGE_LENGTH, BadSample, Sample, decode_text
from .shard_files import INDEX_NAME, ShardFiles, TarSample
from .uses import Uses, find_field

logger = logging.getLogger(__name__)

MOST_RECORD_BYTES = 1024**2
INDEXED_SAMPLES = 262_144  # of the shards whose index is kept; a shuffle window has to fit
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "caption")  # endings of text alone


class ShardSource:
    """Samples of WebDataset shards, read in any order. A shard is a plain tar file, local or fetched whole to a cache.

    Args:
        where: see `ShardFiles`.
        name: for messages; None takes "shards".
        word_dropout, background: as in `TsvSource`.
        cache_dir: folder for fetched shards and for counts.
        cache_bytes: fetched shards beyond it are deleted, the longest unused first; None keeps all.
        uses: of shards with other names: what their members are to us, or fields of a JSON member (json.edit); None reads our layout.

    Raises:
        ValueError: no data found, or shards missing that shards.json names.
    """

    name: str
    word_dropout: float
    background: float
    uses: Uses | None
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
        uses: Uses | None = None,
    ):
        self.uses = uses
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

    @property
    def cache_dir(self) -> Path:
        return self.files.cache_dir

    def identify(self, first: int, last: int) -> tuple[Any, ...] | None:
        """What the lengths of these samples, of one shard, depend on; None if it cannot be read."""
        number = int(np.searchsorted(self._ends, first, side="right"))
        uses = None if self.uses is None else sorted(self.uses.all_names)
        row = first - int(self._ends[number]) + self.groups[number]
        facts = self.files.identify(number)
        return None if facts is None else (*facts, uses, row, last - first)

    def length(self, index: int) -> int:
        """From the names and sizes of the members: the JSON is little more than the text."""
        members = self._locate(index)[1].members
        if self.uses is not None:
            names = {name.removeprefix(".").lower() for name in self.uses.texts.values()}
            sizes = [members.get(name, members.get(name.partition(".")[0], (0, 0)))[1] for name in names]
            return self.uses.length({"caption": " " * sum(sizes)})
        images = len({name.partition(".")[0] for name in members if name[0].isdigit()})
        if any(name.startswith("0.source.") for name in members):
            images = 1  # of several pairs, one is drawn
        text = sum(size for name, (_, size) in members.items() if name in ("json", *CAPTIONS))
        return text + IMAGE_LENGTH * images

    def read(self, index: int, rng: Random) -> Sample:
        return self.record(index).make_sample(rng, self.word_dropout, self.background)

    def record(self, index: int) -> Record:
        """Sample number `index` as it is stored. Raises BadSample."""
        shard, sample = self._locate(index)
        members = Members(self.files, shard, sample)
        if sample.problem:
            raise BadSample("shard", f"{members.key} {sample.problem}")
        if self.uses is None:
            return Record(members.key, members.content(), members.images())
        texts = {use: members.text(name) for use, name in self.uses.texts.items()}
        self.uses.check_score(members.key, [members.text(name) for name in self.uses.scores])

        def read_one(use):
            return partial(members.read_image, self.uses.names[use])

        def read_several():
            return [partial(members.read_image, name) for name in self.uses.images]

        return self.uses.make_record(members.key, texts, read_one, read_several)

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


class Members:
    """The members of one sample of a shard, by name."""

    files: ShardFiles
    shard: int
    sample: TarSample
    key: str

    def __init__(self, files: ShardFiles, shard: int, sample: TarSample):
        self.files, self.shard, self.sample = files, shard, sample
        self.key = f"{files.names[shard]}:{sample.key}"

    def content(self) -> dict[str, Any]:
        """What the JSON says; of shards without JSON, the text as a caption. Raises BadSample."""
        content, members = {}, self.sample.members
        text = next((ending for ending in CAPTIONS if ending in members), None)
        if "json" in members:
            content = self._json("json")
            if not isinstance(content, dict):
                raise BadSample("row", f"{self.key}'s .json holds a {type(content).__name__}, not an object")
        elif text is None:
            endings = ", ".join(sorted(members)[:8])
            raise BadSample("row", f"{self.key} has neither .json nor .txt, only {endings}")
        if content.get("caption") is None and text is not None:
            content["caption"] = decode_text(self._bytes(text, MOST_RECORD_BYTES), self.key)
        return content

    def images(self) -> dict[str, ReadImage]:
        """Name without the ending -> function that reads it, the image to draw first, then "0", "0.cutout", "1", ..."""
        found = {}
        for ending in IMAGE_ENDINGS:
            for member in self.sample.members:
                name, dot, last = member.rpartition(".")
                if last == ending:
                    found.setdefault(name, partial(self._bytes, member))
        return dict(sorted(found.items(), key=lambda item: _order(item[0])))

    def text(self, name: str) -> Any:
        """A text member, or of "json.a.b" the field b of a of a JSON member. Raises BadSample."""
        name = name.removeprefix(".")
        member, _, field = name.partition(".")
        if name.lower() in self.sample.members:
            return decode_text(self._bytes(name.lower(), MOST_RECORD_BYTES), self.key)
        if not field or member not in self.sample.members:
            raise BadSample(
                "row", f"{self.key} has no .{name}, only {', '.join(sorted(self.sample.members)[:8])}"
            )
        try:
            return find_field(self._json(member), field)
        except (KeyError, IndexError, TypeError) as error:
            raise BadSample(
                "row", f"{self.key} has no field {field} in its .{member} ({first_line(error)})"
            ) from error

    def read_image(self, name: str) -> bytes:
        """The bytes of a member by its whole name. Raises BadSample."""
        name = name.removeprefix(".").lower()
        if name not in self.sample.members:
            raise BadSample(
                "image", f"{self.key} has no .{name}, only {', '.join(sorted(self.sample.members)[:8])}"
            )
        return self._bytes(name)

    def _json(self, member):
        try:
            return json.loads(self._bytes(member, MOST_RECORD_BYTES))
        except (ValueError, RecursionError) as error:
            raise BadSample("row", f"{self.key} has a .{member} that cannot be read ({error})") from error

    def _bytes(self, name, most=None):
        offset, size = self.sample.members[name]
        if most is not None and size > most:
            raise BadSample("row", f"{self.key} has a .{name} of {size:,} bytes; at most {most:,} are read")
        return self.files.read(self.shard, offset, size)


def _order(name):
    return name not in ("", "target"), len(name.partition(".")[0]), name
