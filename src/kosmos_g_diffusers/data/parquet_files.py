"""Parquet files of a data set that is larger than the disk: fetched one by one when they are needed, read in any order."""

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from ..files import (
    cache_path,
    default_cache_dir,
    first_line,
    hash_bytes,
    keep_below,
    remove_partial_files,
    write_text,
    written_atomically,
)
from ..quiet import SHORT
from .sample import BadSample

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

CACHE_GIB = 100.0  # that copies of files take at most, unless said otherwise
OPEN_FILES = 64  # whose tables stay open in a process: they are mapped, not read
BATCH_ROWS = 64  # written at a time, and so read at a time


class ParquetFiles:
    """Rows of Parquet files anywhere that fsspec reads, as much of a `datasets.Dataset` as is needed here.

    Which row is where is known from the ends of the files, so every row can be read at any time: the order of training, and resuming
    at the exact sample, are those of data on the disk. A file is fetched when its first row is needed, and kept in the cache folder
    as Arrow, which is read in place; the files longest unused are deleted first. Only the columns that are asked for are kept.

    Args:
        urls: of the files, in order.
        cache_dir: None takes kosmos-g in the user's cache folder.
        cache_gib: most that the copies of all data sets take. A window of shuffling has to fit.
        columns: to read; None reads all.

    Raises:
        OSError: a file that cannot be reached.
        ValueError: a file that is not Parquet, or has other columns than the first.
    """

    urls: list[str]
    cache_dir: Path
    cache_gib: float
    groups: list[int]
    schema: "pyarrow.Schema"

    def __init__(
        self,
        urls: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        cache_gib: float = CACHE_GIB,
        columns: Sequence[str] | None = None,
    ):
        self.urls, self.cache_gib = list(urls), cache_gib
        self.cache_dir = Path(default_cache_dir() if cache_dir is None else cache_dir)
        facts = [self._facts(url) for url in tqdm(self.urls, "reading the ends of files", delay=SHORT)]
        self.groups = [fact["rows"] for fact in facts]
        self._versions = [fact["version"] for fact in facts]
        self.schema = _read_schema(facts[0]["schema"])
        for url, fact in zip(self.urls, facts, strict=True):
            if fact["names"] != facts[0]["names"]:
                raise ValueError(
                    f"{url} has the columns {', '.join(fact['names'])}, the first file {', '.join(facts[0]['names'])}. Give one of both kinds."
                )
        self.columns = list(columns) if columns is not None else self.schema.names
        self._ends, self._tables = np.cumsum(self.groups), OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}  # each worker opens its own

    @cached_property
    def features(self) -> Any:
        """What `datasets` calls the columns."""
        import datasets

        return datasets.Features.from_arrow_schema(self.schema)

    @property
    def column_names(self) -> list[str]:
        return self.schema.names

    @property
    def fingerprint(self) -> str:
        """What tells these files from others."""
        return hash_bytes(repr((self.urls, self._versions)).encode())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def select_columns(self, columns: Sequence[str]) -> "ParquetFiles":
        """The same rows with some of the columns."""
        other = object.__new__(ParquetFiles)
        other.__dict__ |= {**self.__getstate__(), "columns": list(columns)}
        return other

    def with_format(self, kind: str) -> "ParquetFiles":
        """Rows come as Arrow tables in any case."""
        return self

    def __getitem__(self, index: int | slice) -> "pyarrow.Table":
        """A table of one row, or of several of one file. Raises BadSample ("shard") where their file cannot be fetched."""
        index, rows = (index, 1) if isinstance(index, int) else (index.start, index.stop - index.start)
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number]) + self.groups[number]
        for attempt in range(2):
            try:
                return self._table(number).slice(row, rows)
            except FileNotFoundError as error:  # another process has just deleted it to make room
                if attempt:
                    raise BadSample("shard", f"{self.urls[number]} cannot be kept ({error})") from error

    def _table(self, number):
        import pyarrow.ipc

        path = self._copy_path(number)
        if number not in self._tables:
            if not path.is_file():
                self._fetch(number, path)
            self._tables[number] = pyarrow.ipc.open_file(pyarrow.memory_map(os.fspath(path))).read_all()
            while len(self._tables) > OPEN_FILES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(number)
        with suppress(FileNotFoundError):
            os.utime(path)  # used now: the last to be deleted. What is mapped stays readable
        return self._tables[number]

    def _copy_path(self, number):
        identity = (self.urls[number], *map(str, self._versions[number]), *self.columns)
        return cache_path(self.cache_dir, "parquet", *identity, suffix=".arrow")

    def _fetch(self, number, path):
        import pyarrow.ipc
        import pyarrow.parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of many workers one fetches, the others wait for it
            if path.is_file():
                return
            remove_partial_files(path.parent, path.name)
            url = self.urls[number]
            try:
                with _open(url) as file, written_atomically(path) as copy:
                    parquet = pyarrow.parquet.ParquetFile(file)
                    schema = pyarrow.schema([parquet.schema_arrow.field(name) for name in self.columns])
                    with pyarrow.ipc.new_file(copy, schema) as writer:
                        for batch in parquet.iter_batches(BATCH_ROWS, columns=self.columns):
                            writer.write_batch(batch.select(self.columns))
            except OSError as error:
                raise BadSample("shard", f"{url} cannot be fetched ({first_line(error)})") from error
            except pyarrow.ArrowException as error:
                raise BadSample("shard", f"{url} cannot be read ({first_line(error)})") from error
            keep_below(path, int(self.cache_gib * 1024**3))

    def _facts(self, url):
        """Rows, columns and version of a file, from its end; kept in the cache folder."""
        import pyarrow.parquet

        try:
            version = _version(url)
            path = cache_path(self.cache_dir, "parquet", url, *map(str, version), suffix=".json")
            with suppress(OSError, ValueError):
                return json.loads(path.read_text(encoding="utf-8"))
            with _open(url) as file:
                parquet = pyarrow.parquet.ParquetFile(file)
                schema = parquet.schema_arrow
                facts = {"rows": parquet.metadata.num_rows, "names": schema.names, "version": version}
                facts["schema"] = schema.serialize().to_pybytes().hex()
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{url} is not a Parquet file ({first_line(error)}). Only these can be streamed."
            ) from error
        except OSError as error:
            raise OSError(f"{url} cannot be read: {first_line(error)}") from error
        with suppress(OSError):  # costs another look
            write_text(path, json.dumps(facts))
        return facts


def find_parquet_files(name: str, split: str, config: str | None, **options: Any) -> list[str]:
    """URLs of the Parquet files of a split of a data set, as `datasets` finds them, without fetching any.

    Raises:
        ValueError: it has no such split, or is of another format.
    """
    import datasets

    builder = datasets.load_dataset_builder(name, config, **options)
    files = builder.config.data_files or {}
    if re.search(r"[\[+]", split) or split not in files:
        raise ValueError(
            f"it has no split {split!r} to stream, only {', '.join(map(str, files)) or 'none'}: pass split="
        )
    urls = [str(url) for url in files[split]]
    others = [url for url in urls if not url.endswith(".parquet")]
    if others:
        raise ValueError(
            f"it cannot be streamed: {others[0]} is not Parquet. How many samples other files hold is known only when all are read, so "
            "a run could not be resumed at the exact sample. Leave streaming=true out, or write shards of it with kosmos-g data import"
        )
    return urls


def _open(url):
    import fsspec

    return fsspec.open(url, "rb").open()


def _version(url):
    """What tells a file from another one under the same name."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    info = system.info(path)
    facts = [info.get(name) for name in ("size", "ETag", "etag", "mtime", "blob_id", "sha256")]
    return [fact if isinstance(fact, int | float | str) else None for fact in facts]


def _read_schema(text):
    import pyarrow.ipc

    return pyarrow.ipc.read_schema(pyarrow.py_buffer(bytes.fromhex(text)))
