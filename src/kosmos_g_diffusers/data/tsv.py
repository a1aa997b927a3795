"""The official training data as it is: rows of text and base64 images between tabs, in files that a manifest may list."""

import glob
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from ..files import cache_path, default_cache_dir, read_json, written_atomically
from ..quiet import SHORT
from .recipes import BACKGROUND, WORD_DROPOUT
from .records import Record
from .sample import IMAGE_LENGTH, BadSample, FilteredSample, Sample, decode_base64, find_encoding

logger = logging.getLogger(__name__)

SCAN_BYTES = 16 * 1024**2
TEXT_BYTES = 16 * 1024  # the words of a row come first: so much of it tells its length
MOST_ROW_BYTES = 512 * 1024**2
# of files, and how Python calls them where their mark is to be left out
ENCODINGS = {"utf-8": "utf-8-sig", "utf-16-le": "utf-16", "utf-16-be": "utf-16"}
LAYOUTS = {
    "captions": "at least 3: anything, caption, image[, width, height, ...]",
    "edits": "an even number, at least 4: input, edit, then (before, after) images of each seed",
    "compositions": "3 and 2 for each tag: caption, tags between commas, image, then each tag's cut-out with and "
    "without its background",
}


class TsvSource:
    """Rows of TSV files. See docs/data.md for the three layouts.

    Args:
        kind: "captions" (LAION), "edits" (InstructPix2Pix) or "compositions" (OpenImages).
        where: see `find_tsv_files`.
        name: for messages; None takes the kind.
        word_dropout: probability that an edit loses its input caption, or a composition its entities' words.
        background: probability that an entity is shown with its background.
        min_side: captioned images whose width or height (columns 3 and 4) is smaller are left out; the official
            loader takes 384 in stage 3. 0 keeps all.
        cache_dir: where the beginnings of the lines are kept, which take a reading of every file to find.

    Raises:
        ValueError: no data found, files of a manifest missing, or the first row of a file with the wrong columns.
    """

    kind: str
    name: str
    cache_dir: Path
    word_dropout: float
    background: float
    min_side: int
    files: list[Path]
    offsets: list[np.ndarray]
    encodings: list[str]
    groups: Sequence[int]

    def __init__(
        self,
        kind: str,
        where: str | Path,
        *,
        name: str | None = None,
        word_dropout: float = WORD_DROPOUT,
        background: float = BACKGROUND,
        min_side: int = 0,
        cache_dir: str | Path | None = None,
    ):
        if kind not in LAYOUTS:
            raise ValueError(f"TSV rows of kind {kind!r} were asked for. Known: {', '.join(LAYOUTS)}.")
        self.kind, self.name = kind, name or kind
        self.word_dropout, self.background, self.min_side = word_dropout, background, min_side
        self.files = find_tsv_files(where)
        for file in self.files:
            self._check_first_row(file)
        self.cache_dir = Path(default_cache_dir() if cache_dir is None else cache_dir)
        files = tqdm(self.files, f"{self.name}: rows", disable=len(self.files) == 1, delay=SHORT)
        self.offsets = [line_offsets(file, self.cache_dir) for file in files]
        self.encodings = [encoding_of(file)[0] for file in self.files]
        self.groups = [len(offsets) - 1 for offsets in self.offsets]
        self._ends = np.cumsum(self.groups)
        if not len(self):
            raise ValueError(f"No data found: the {len(self.files)} TSV files at {where} hold no rows.")

    def __getstate__(self) -> dict[str, Any]:
        # where lines begin lies in a file that workers map as well
        mapped = [None if isinstance(offsets, np.memmap) else offsets for offsets in self.offsets]
        return {**self.__dict__, "offsets": mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        pairs = zip(self.files, self.offsets, strict=True)
        self.offsets = [line_offsets(file, self.cache_dir) if kept is None else kept for file, kept in pairs]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def identify(self, first: int, last: int) -> tuple[Any, ...] | None:
        """What the lengths of these rows, of one file, depend on; None if it cannot be read."""
        number = int(np.searchsorted(self._ends, first, side="right"))
        try:
            stat = self.files[number].stat()
        except OSError:
            return None
        row = first - int(self._ends[number]) + self.groups[number]
        return (self.kind, self.files[number].resolve(), stat.st_size, stat.st_mtime_ns, row, last - first)

    def length(self, index: int) -> int:
        columns = self._read_row(index, TEXT_BYTES)[0]
        if self.kind == "captions":
            return len(columns[1]) if len(columns) > 1 else 0
        if self.kind == "edits":
            return len(b"".join(columns[:2])) + IMAGE_LENGTH
        return len(columns[0]) + IMAGE_LENGTH * (columns[1].count(b",") + 1 if len(columns) > 1 else 0)

    def read(self, index: int, rng: Random) -> Sample:
        return self.record(index).make_sample(rng, self.word_dropout, self.background)

    def record(self, index: int) -> Record:
        """Row number `index` as it is stored. Raises BadSample."""
        columns, file, line = self._read_row(index)
        key = f"{file.parent.name}/{file.name}:{line}"
        problem = self._column_problem(columns, file, line)
        if problem:
            raise BadSample("row", problem)
        if self.kind == "captions":
            sides = [int(side) for side in columns[3:5] if side.isdigit()]
            if len(sides) == 2 and min(sides) < self.min_side:
                message = f"{key} is {sides[0]} x {sides[1]}, a side under {self.min_side}"
                raise FilteredSample("small", message)
            content, names = {"caption": _text(columns[1], key)}, {"target": 2}
        elif self.kind == "edits":
            words, edit = (_text(column, key) for column in columns[:2])
            content = {"input": words, "edit": edit}
            names = {
                f"{place // 2 - 1}.{'target' if place % 2 else 'source'}": place
                for place in range(2, len(columns))
            }
        else:
            caption, tags = (_text(column, key) for column in columns[:2])
            content = {"caption": caption, "entities": [tag.strip() for tag in tags.split(",")]}
            names = {"target": 2}
            for tag in range(len(content["entities"])):
                names |= {f"{tag}": 3 + 2 * tag, f"{tag}.cutout": 4 + 2 * tag}
        images = {name: partial(decode_base64, columns[place], key) for name, place in names.items()}
        return Record(key, content, images)

    def _read_row(self, index, most=None):
        """(columns as bytes, file, number of the line counted from 1) of row `index`, or of its first `most` bytes."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number]) + self.groups[number]
        begin, end = (int(offset) for offset in self.offsets[number][row : row + 2])
        file = self.files[number]
        size = end - begin if most is None else min(most, end - begin)
        if size > MOST_ROW_BYTES:
            raise BadSample("row", f"{file}, line {row + 1}, has {size:,} bytes, over {MOST_ROW_BYTES:,}")
        try:
            with open(file, "rb") as opened:
                opened.seek(begin)
                data = opened.read(size)
        except OSError as error:
            raise BadSample("shard", f"{file} cannot be read ({error})") from error
        return (
            _split_row(data, self.encodings[number], most is None, f"{file}, line {row + 1},"),
            file,
            row + 1,
        )

    def _check_first_row(self, file):
        """A wrong first row is a file of another kind, not a damaged row: say so before the training begins."""
        encoding, _ = encoding_of(file)
        if encoding not in ENCODINGS:
            raise ValueError(f"{file} is {encoding.upper()}, which is not read. Save it as UTF-8.")
        with open(file, encoding=ENCODINGS[encoding], errors="surrogateescape", newline="\n") as opened:
            row = opened.readline(MOST_ROW_BYTES).rstrip("\r\n").encode("utf-8", "surrogateescape")
        problem = self._column_problem(row.split(b"\t"), file, 1) if row else None
        if problem:
            raise ValueError(f"{problem}. Is this of the kind {self.kind!r}? Known: {', '.join(LAYOUTS)}.")

    def _column_problem(self, columns, file, line):
        """What is wrong with the number of columns, or None."""
        seen = len(columns)
        if self.kind == "captions":
            right = seen >= 3
        elif self.kind == "edits":
            right = seen >= 4 and seen % 2 == 0
        else:
            right = seen > 3 and seen == 3 + 2 * (columns[1].count(b",") + 1)
        if right:
            return None
        return f"{file}, line {line}, has {seen} columns. Expected {LAYOUTS[self.kind]}"


def encoding_of(file: Path) -> tuple[str, int]:
    """(name of a file's encoding, length of its byte order mark)."""
    with open(file, "rb") as opened:
        return find_encoding(opened.read(4))


def _split_row(data, encoding, whole, key):
    """The columns of a row as bytes in UTF-8; a row that is not `whole` may end within a character."""
    if encoding != "utf-8":
        try:
            data = data.decode(encoding, "strict" if whole else "ignore").encode("utf-8")
        except UnicodeError as error:
            raise BadSample("row", f"{key} is not {encoding.upper()} ({error})") from error
    return data.rstrip(b"\r\n").split(b"\t")


def _text(column, key):
    try:
        return column.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("row", f"{key} has text that is not UTF-8 ({error})") from error


def line_offsets(path: Path, cache_dir: str | Path) -> np.ndarray:
    """Where each line of a file begins, and the file's end: int64 array with one entry more than there are lines.

    Kept in `cache_dir` under the file's path, size and time of change.
    """
    path = Path(path)
    stat = path.stat()
    encoding, start = encoding_of(path)
    width, unit = (1, np.uint8) if encoding == "utf-8" else (2, "<u2" if encoding == "utf-16-le" else ">u2")
    identity = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, *([encoding] if start else []))
    cached = cache_path(cache_dir, "lines", *identity, suffix=".npy")
    offsets = _load_offsets(cached, stat.st_size)
    if offsets is not None:
        return offsets
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):  # of many processes one reads the file, the others wait for it
            offsets = _load_offsets(cached, stat.st_size)
            if offsets is None:
                with written_atomically(cached) as file:
                    np.save(file, _find_lines(path, stat.st_size, start, width, unit))
                offsets = _load_offsets(cached, stat.st_size)
            return offsets
    except OSError as error:  # a cache that cannot be written costs time only
        logger.warning("The lines of %s are not kept in %s (%s).", path, os.fspath(cache_dir), error)
        return _find_lines(path, stat.st_size, start, width, unit)


def _load_offsets(cached, size):
    """The beginnings of lines that are kept, mapped and not read; None if they are not there or damaged."""
    try:
        offsets = np.load(cached, mmap_mode="r")
        if offsets.ndim == 1 and offsets.dtype == np.int64 and 0 <= offsets[-1] <= size:
            return offsets
    except (OSError, ValueError, EOFError, IndexError):  # found again
        pass
    return None


def _find_lines(path, size, start, width, unit):
    offsets = [np.array([start], dtype=np.int64)]
    with open(path, "rb") as file:
        file.seek(start)
        for begin in range(start, size, SCAN_BYTES):
            block = file.read(SCAN_BYTES)
            block = np.frombuffer(block[: len(block) // width * width], dtype=unit)
            offsets.append((np.flatnonzero(block == ord("\n")) + 1) * width + begin)
        offsets = np.concatenate(offsets)
        if offsets[-1] != size:  # no newline behind the last line
            offsets = np.append(offsets, size)
        while (
            len(offsets) > 1 and offsets[-1] - offsets[-2] <= 2 * width
        ):  # empty lines at the end are not rows
            file.seek(offsets[-2])
            if file.read(2 * width).strip(b"\r\n\0"):
                break
            offsets = offsets[:-1]
    return offsets


def find_tsv_files(where: str | Path) -> list[Path]:
    """The TSV files that `where` names, in the order of the manifest or of their names.

    Args:
        where: a train.json manifest, a folder that holds one (in `json/`, as the official ones do, or directly) or else
            .tsv files, a pattern such as /data/part-*.tsv, or a .tsv file.

    A manifest is a list of `{"source": [file, ...], ...}`. The official loaders look for the files in the folder above
    `json/` (captions) or in its `data/` (edits, compositions); both are tried here, and the manifest's own folder.

    Raises:
        ValueError: nothing is found, the manifest is not such a list, or files that it names are missing (all are named).
    """
    path = Path(where).expanduser()
    if path.is_dir():
        manifests = [path / "json" / "train.json", path / "train.json"]
        manifest = next((candidate for candidate in manifests if candidate.is_file()), None)
        if manifest is not None:
            return read_manifest(manifest)
        files = sorted(path.glob("*.tsv")) or sorted(path.glob("data/*.tsv"))
        looked_for = "json/train.json, train.json, *.tsv and data/*.tsv were looked for in this folder"
    elif path.is_file():
        return read_manifest(path) if path.suffix == ".json" else [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        looked_for = "there is no such file, folder or pattern with a match"
    if not files:
        raise ValueError(
            f"No data found at {where}: {looked_for}. Pass a train.json manifest, its folder, a .tsv file or a pattern."
        )
    return files


def read_manifest(path: Path) -> list[Path]:
    """The existing files that a train.json names, in its order. Raises ValueError as `find_tsv_files` does."""
    expected = 'Expected a list of {"source": ["0000.tsv", ...]}, as in the official train.json.'
    entries = read_json(path, expected)
    if not isinstance(entries, list) or not entries:
        given = "an empty list" if entries == [] else f"a {type(entries).__name__}"
        raise ValueError(f"The manifest {path} holds {given}. {expected}")
    names = []
    for number, entry in enumerate(entries):
        source = entry.get("source") if isinstance(entry, dict) else None
        if not isinstance(source, list) or not all(isinstance(name, str) for name in source):
            raise ValueError(
                f"Entry {number} of the manifest {path} has no list of file names under 'source'. {expected}"
            )
        names += source
    if len({entry.get("weight", 1) for entry in entries}) > 1:
        logger.warning(
            "The entries of %s have different weights, which are not used: every row comes once in an epoch. To weight "
            "parts, make a manifest of each and mix them as sources of their own.",
            path,
        )
    folder = Path(path).resolve().parent
    root = folder.parent if folder.name == "json" else folder
    candidates = [[base / name for base in (root, root / "data", folder)] for name in names]
    found = [next((file for file in files if file.is_file()), None) for files in candidates]
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} files that {path} names are missing: {', '.join(missing)}. They were "
            f"looked for in {root} and {root / 'data'}. Put them there, or take them out of the manifest."
        )
    if not found:
        raise ValueError(f"No data found: the manifest {path} names no files. {expected}")
    return found
