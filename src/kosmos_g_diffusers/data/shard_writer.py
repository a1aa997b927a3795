"""Writes samples as WebDataset shards, in the layout of docs/data.md that `ShardSource` reads."""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import PIL.Image

from ..files import write_bytes, written_atomically
from .recipes import check_caption
from .shard_files import INDEX_NAME, index_tar

Image = PIL.Image.Image
Note = dict[str, Any] | None

KEY = re.compile(r"[A-Za-z0-9_-]+")  # no dot: it would begin the extension
QUALITY = 95


class ShardWriter:
    """Writes shards of `samples_per_shard` samples: FOLDER/PREFIX-000000.tar, PREFIX-000001.tar, ...

    A shard appears under its name only when it is complete. A writer of the same folder and prefix continues after the
    last of them, so a maker that was stopped loses at most the samples of one shard: `written` says how many samples
    are in complete shards. Processes that write to one folder take prefixes of their own. At the end one of them
    calls `write_shard_index(folder)`.

        with ShardWriter(folder, prefix="part-00") as writer:
            writer.write_composition("000017", "a dog on the grass", image, [("dog", whole, cutout)])

    Args:
        folder: where to; made if need be.
        prefix: begins the names of the shards: letters, digits, `_` and `-`.
        samples_per_shard: 1,000 as in the official files; more for small images.
        quality: of the JPEGs that images are stored as. Cut-outs are PNG: their white edges stay white.

    Every `write_*` takes a `key` (letters, digits, `_`, `-`; unique within a shard) and a `note`, a dict that is kept in
    the JSON and not read by training: where the image is from, its licence, what made the caption.
    """

    folder: Path
    prefix: str
    samples_per_shard: int
    quality: int
    written: int

    def __init__(
        self, folder: str | Path, prefix: str = "part", samples_per_shard: int = 1000, quality: int = QUALITY
    ):
        _check_name("prefix", prefix)
        self.folder, self.prefix, self.quality = Path(folder), prefix, quality
        self.samples_per_shard = samples_per_shard
        shards = sorted(self.folder.glob(f"{prefix}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"))
        self.written = sum(len(index_tar(shard)) for shard in shards)
        self._number = int(shards[-1].stem[-6:]) + 1 if shards else 0
        self._pending = []  # members of the samples of the shard to come

    def write_caption(self, key: str, caption: str, target: Image | None = None, note: Note = None) -> None:
        """A caption and the image that it describes."""
        self._add(key, {"caption": check_caption(caption, key)}, {"target": target}, note)

    def write_edit(
        self,
        key: str,
        edit: str,
        pairs: Iterable[tuple[Image, Image]],
        words: str | None = None,
        caption: str | None = None,
        note: Note = None,
    ) -> None:
        """An edit instruction with (before, after) pairs of images.

        Args:
            words: what the images before the edit show; None if unknown.
            caption: what the images after it show; None if unknown.
        """
        record = {"edit": check_caption(edit, key), "input": words, "caption": caption}
        images = {}
        for number, (source, target) in enumerate(pairs):
            images |= {f"{number}.source": source, f"{number}.target": target}
        self._add(key, record, images, note)

    def write_composition(
        self,
        key: str,
        caption: str,
        target: Image,
        entities: Sequence[tuple[str, Image | None, Image | None]],
        note: Note = None,
    ) -> None:
        """A captioned image and what it shows.

        Args:
            entities: (words, image with its background, image without) of each; one of the two may be None.
        """
        record = {"caption": check_caption(caption, key), "entities": [words for words, _, _ in entities]}
        images = {"target": target}
        for number, (_, whole, cutout) in enumerate(entities):
            images |= {f"{number}": whole, f"{number}.cutout": cutout}
        self._add(key, record, images, note)

    def write_prompt(
        self,
        key: str,
        prompt: Iterable[str | Image],
        target: Image | None = None,
        caption: str | None = None,
        note: Note = None,
    ) -> None:
        """Any prompt of strings and PIL images in reading order, such as a stretch of a document with images."""
        parts, images = list(prompt), {}
        for place, part in enumerate(parts):
            if isinstance(part, PIL.Image.Image):
                parts[place] = {"image": str(len(images))}
                images[str(len(images))] = part
        self._add(key, {"prompt": parts, "caption": caption}, images | {"target": target}, note)

    def close(self) -> None:
        """Write the samples that do not fill a shard."""
        if self._pending:
            self._write_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is None:  # of a maker that failed, only full shards stay
            self.close()

    def _add(self, key, record, images, note):
        _check_name("key", key)
        record = {name: value for name, value in {**record, "note": note}.items() if value is not None}
        members = {"json": json.dumps(record, ensure_ascii=False).encode()}
        for name, image in images.items():
            if image is not None:
                ending = "png" if name.endswith(".cutout") else "jpg"
                members[f"{name}.{ending}"] = self._encode(image, ending)
        self._pending.append((key, members))
        if len(self._pending) == self.samples_per_shard:
            self._write_shard()

    def _encode(self, image, ending):
        buffer = io.BytesIO()
        options = {"format": "PNG"} if ending == "png" else {"format": "JPEG", "quality": self.quality}
        image.convert("RGB").save(buffer, **options)
        return buffer.getvalue()

    def _write_shard(self):
        write_shard(self.folder / f"{self.prefix}-{self._number:06d}.tar", self._pending)
        self.written += len(self._pending)
        self._number += 1
        self._pending = []


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard atomically: of each sample its key and members, ending -> bytes. The same samples give the same bytes."""
    with written_atomically(path) as file:
        pack_shard(file, samples)


def pack_shard(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """As `write_shard`, into an open file."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key, members in samples:
            for name, data in members.items():
                member = tarfile.TarInfo(f"{key}.{name}")  # time 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pack_shard_bytes(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """The bytes of a shard, see `write_shard`."""
    buffer = io.BytesIO()
    pack_shard(buffer, samples)
    return buffer.getvalue()


def pack_index(shards: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of a shards.json of shards with their `url`, `nsamples` and `filesize`."""
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": list(shards)}
    return json.dumps(index, indent=1).encode("utf-8")


def write_shard_index(folder: str | Path) -> Path:
    """Count the samples of the shards in a folder and list them in its shards.json. Returns its path.

    Raises:
        ValueError: there are no shards.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"There are no .tar files in {folder} to list. Write shards there first.")
    listed = [
        {"url": shard.name, "nsamples": len(index_tar(shard)), "filesize": shard.stat().st_size}
        for shard in shards
    ]
    write_bytes(folder / INDEX_NAME, pack_index(listed))
    return folder / INDEX_NAME


def _check_name(what, name):
    if not KEY.fullmatch(name):
        raise ValueError(f"The {what} {name!r} was given. Expected letters, digits, '_' and '-'.")
