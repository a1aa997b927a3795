"""Any source of training data as shards of ours: `kosmos-g data import`.

FOLDER/part-000012.tar            what came of the samples 12,000 to 12,999 of the source
FOLDER/part-000012.skipped.jsonl  which of them were left out, and why; it is written last, and says that they are done
FOLDER/manifest.json, shards.json, contact-sheet.html: as `OutputFolder` writes them
"""

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import torch.utils.data
from tqdm.auto import tqdm

from ...files import check_output_folder, remove_partial_files, write_bytes
from ..public_sets import find_public_set
from ..records import Record, image_file
from ..sample import BadSample, FilteredSample, decode_image
from ..settings import ImportSettings
from ..shard_writer import write_shard
from ..sources import build_source
from .archives import unpack
from .inputs import read_ahead
from .output_folder import (
    SKIPPED_SUFFIX,
    check_manifest,
    finish_folder,
    read_skipped,
    skipped_line,
    summarize,
)

BATCH = 32  # samples that a worker reads at a time
Members = Mapping[str, bytes]  # ending -> bytes


def import_data(
    output: str | Path,
    settings: ImportSettings,
    *,
    data: str | Path | None = None,
    workers: int = 2,
    process_index: int = 0,
    num_processes: int = 1,
    sheet_samples: int = 100,
) -> dict[str, Any]:
    """Write a source of training data as shards, or continue to.

    A shard holds what comes of `samples_per_shard` samples of the source that follow each other. So it is the same whoever makes it, and
    a run that was stopped makes those that are not there. Images are kept as they are stored, texts with all their variants.

    Args:
        output: folder of shards: new, or begun with the same settings.
        settings: an `ImportSettings`.
        data: folder that holds the set, where it has to be fetched and unpacked first; None fetches it from the Hub into `output`.
        workers: processes that read; 0 reads in this one.
        process_index, num_processes: which shards are made. Processes need not know of each other.
        sheet_samples: samples on the contact sheet; 0 writes none.

    Returns:
        dict: the manifest.

    Raises:
        ValueError: no data, an unknown name, other settings than those in the folder, or another process writes the same shards.
    """
    if not 0 <= process_index < num_processes:
        raise ValueError(
            f"Process {process_index} of {num_processes} was given. Expected an index from 0 to {num_processes - 1}."
        )
    folder = check_output_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    line, note = resolve(settings, folder, data)
    lock = filelock.FileLock(folder / f".import-{process_index}-of-{num_processes}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"Another process writes these shards in {folder}. Wait for it, or pass a --process-index of its own to each."
        ) from error
    with lock:
        recorded = {**asdict(settings), **note}
        with filelock.FileLock(folder / ".manifest.lock"):
            check_manifest(folder, "import", recorded)
        rows = Rows(line, settings, note)
        # what a kill has left; other processes' files are locked
        remove_partial_files(folder, "part-*")
        todo = [
            shard for shard in range(process_index, rows.shards, num_processes) if not is_done(folder, shard)
        ]
        if todo:
            _write_shards(folder, rows, todo, workers)
    if num_processes == 1 and not any(folder.glob("*.tar")):
        raise ValueError(f"Nothing could be made of any sample of {line}. {summarize(read_skipped(folder))}")
    return finish_folder(folder, sheet_samples)


def resolve(
    settings: ImportSettings, folder: Path | None, data: str | Path | None
) -> tuple[str, dict[str, str]]:
    """(line, note) of what is to be imported: a line as it is; of a name in the table its line, with what it needs fetched and unpacked.

    Args:
        folder: where it is fetched to, in a folder of its own; None fetches nothing, for nodes that do not share a disk.
        data: where it lies already.
    """
    row, score = find_public_set(settings.source), settings.min_score
    if row is None:
        return settings.source if score is None else f"{settings.source}&min_score={score:g}", {}
    if data is None and folder is None and "{folder}" in row.line:
        raise ValueError(
            f"{row.name} has to be fetched before a cluster reads it. Pass --data with a folder that every node has."
        )
    if data is None and "{folder}" in row.line and not row.files:
        raise ValueError(f"{row.name} is not fetched by this command, and no folder was given. {row.remark}")
    place = Path(data) if data is not None else (folder or Path()) / "fetched"
    if data is None and row.files:
        _fetch(row, place)
    for pattern in row.archives:
        unpack(place, pattern)
    where, mark, query = row.line.partition("?")
    line = where.replace("{folder}", str(place)) + mark + query.replace("{folder}", quote(str(place)))
    if score is not None and not row.score:
        raise ValueError(f"{row.name} has no scores. Leave --min-score out.")
    line += f"&score={row.score}&min_score={score:g}" if score is not None else ""
    return line, {"dataset": row.id, "licence": row.licence}


def is_done(folder: Path, shard: int) -> bool:
    """Whether all of a shard's samples were looked at."""
    return (folder / f"part-{shard:06d}{SKIPPED_SUFFIX}").is_file()


class Rows(torch.utils.data.Dataset[Any]):
    """Samples of a line as members of a shard: `rows[i]` is (key, members), or (key, BadSample).

    Attributes:
        shards: how many shards they make.
    """

    line: str
    settings: ImportSettings
    note: dict[str, str]
    shards: int

    def __init__(self, line: str, settings: ImportSettings, note: Mapping[str, str]):
        self.line, self.settings, self.note = line, settings, dict(note)
        self.source = build_source(line)
        most = len(self.source) if settings.limit is None else settings.limit
        self.total = min(len(self.source), most)
        self.shards = -(-self.total // settings.samples_per_shard)

    def __len__(self) -> int:
        return self.total

    def of_shard(self, shard: int) -> range:
        """Numbers of the samples that go into a shard."""
        first = shard * self.settings.samples_per_shard
        return range(first, min(first + self.settings.samples_per_shard, self.total))

    def __getitem__(self, index: int) -> tuple[str, Members | BadSample]:
        key = f"{index:09d}"
        try:
            return key, self._pack(self.source.record(index))
        except BadSample as problem:
            return key, problem

    def _pack(self, record):
        # every image is read once, and the sample made as training makes it: what cannot be used is found here
        stored = {name: read() for name, read in record.images.items()}
        images = {
            name: decode_image(image, record.key) if isinstance(image, bytes) else image
            for name, image in stored.items()
        }
        content = {name: value for name, value in record.content.items() if value is not None}
        shown = {name: partial(images.get, name) for name in images}
        _check_side(Record(record.key, content, shown).make_sample(random.Random(0)), self.settings.min_side)
        given = content.get("note")
        content["note"] = {"source": record.key, **self.note, **(given if isinstance(given, dict) else {})}
        members = {"json": json.dumps(content, ensure_ascii=False).encode("utf-8")}
        for name, image in stored.items():
            ending, data = image_file(image)
            members[f"{name}.{ending}".removeprefix(".")] = data
        return members


def _check_side(sample, least):
    image = sample.target
    if image is not None and min(image.size) < least:
        raise FilteredSample("small", f"{sample.key} is {image.width} x {image.height}, a side under {least}")


def _write_shards(folder, rows, todo, workers):
    """Read and write shards one after the other, reading ahead beyond each one's end."""
    numbers = [number for shard in todo for number in rows.of_shard(shard)]
    with tqdm(total=len(numbers), desc="import", unit="sample") as bar:
        samples = _advance(read_ahead(torch.utils.data.Subset(rows, numbers), BATCH, workers), bar)
        for shard in todo:
            write_import(folder, shard, [next(samples) for _ in rows.of_shard(shard)])


def _advance(batches, bar) -> Iterator[tuple[str, Members | BadSample]]:
    for batch in batches:
        bar.update(len(batch))
        yield from batch


def write_import(folder: Path, shard: int, samples: Sequence[tuple[str, Members | BadSample]]) -> None:
    """Write what came of a shard's samples; the file of those left out is the last, and says that all is there."""
    kept = [(key, made) for key, made in samples if not isinstance(made, BadSample)]
    left_out = [skipped_line(key, key, made) for key, made in samples if isinstance(made, BadSample)]
    if kept:
        write_shard(folder / f"part-{shard:06d}.tar", kept)
    write_bytes(folder / f"part-{shard:06d}{SKIPPED_SUFFIX}", b"".join(left_out))


def _fetch(row, place):
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            row.id, repo_type="dataset", allow_patterns=list(row.files), local_dir=os.fspath(place)
        )
    except (OSError, ValueError) as error:  # no network, no such set, a licence that has to be accepted
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{row.id} cannot be fetched: {reason} Fetch {', '.join(row.files)} of it elsewhere, and pass --data FOLDER."
        ) from error
