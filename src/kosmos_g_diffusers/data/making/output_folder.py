"""The folder that samples are made into: what is done in it, what was skipped, and its files for people and training.

FOLDER/part-000-000000.tar ...      shards of process 0, see `ShardWriter`
FOLDER/part-000.skipped.jsonl       what process 0 could make nothing of, and why
FOLDER/manifest.json                how all of it was made, and how much
FOLDER/shards.json                  the shards and how many samples each holds
FOLDER/contact-sheet.html           some samples to look at
"""

import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
from tqdm.auto import tqdm

from ...environment import package_versions
from ...files import check_output_folder, first_line, read_json, remove_partial_files, write_text
from ..sample import BadSample
from ..shard_files import index_tar
from ..shard_writer import ShardWriter, write_shard_index
from .contact_sheet import SHEET_NAME, write_contact_sheet
from .inputs import Input

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
SKIPPED_SUFFIX = ".skipped.jsonl"
FORMAT_VERSION = 1  # of the manifest
EXAMPLES = 3  # messages kept for each cause
MOST_SHOWN = 200  # characters of a setting in an error


class OutputFolder:
    """A folder of shards as one of the processes that fill it sees it: use it in `with`, then call `finish()`.

    Every input ends either as a sample of a complete shard or as a line of a skipped file. Those two are all that a
    resumed run needs: whatever is in neither is made, so nothing is lost and nothing made twice. The number
    of processes may change from run to run, and inputs may be added.

    Args:
        folder: new, empty, or one that was begun with the same command and settings.
        command: what makes it, for the manifest: "compose".
        settings: dict of all that decides what is made; has to be the same in every run.
        process_index, num_processes: which share of the inputs is ours. Processes need not know of each other.
        samples_per_shard: a process that is killed loses at most the work on so many samples.

    Raises:
        ValueError: settings differ from those in the folder, shards are damaged or of unknown origin, or another process
            writes the same share.
    """

    folder: Path
    command: str
    settings: dict[str, Any]
    process_index: int
    num_processes: int
    samples_per_shard: int
    prefix: str
    done: set[str]
    writer: ShardWriter

    def __init__(
        self,
        folder: str | Path,
        command: str,
        settings: Mapping[str, Any],
        process_index: int = 0,
        num_processes: int = 1,
        samples_per_shard: int = 1000,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"Process {process_index} of {num_processes} was given. Expected an index from 0 to {num_processes - 1}."
            )
        if samples_per_shard < 1:
            raise ValueError(f"{samples_per_shard} samples a shard were given. Expected at least 1.")
        self.folder, self.command = check_output_folder(folder), command
        self.settings = json.loads(json.dumps(settings))
        self.process_index, self.num_processes = process_index, num_processes
        self.samples_per_shard = samples_per_shard
        self.prefix = f"part-{process_index:03d}"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.folder / f".{self.prefix}.lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ValueError(
                f"Another process is writing {self.prefix} in {self.folder}. Wait for it, or pass a --process-index of "
                "its own to each."
            ) from error
        try:
            with filelock.FileLock(self.folder / ".manifest.lock"):
                check_manifest(self.folder, self.command, self.settings)
            remove_partial_files(self.folder, f"{self.prefix}-*")  # of a run that was killed while writing
            self.done = self._read_done()
            self.writer = ShardWriter(self.folder, self.prefix, self.samples_per_shard)
            self._skips = open(self.folder / f"{self.prefix}{SKIPPED_SUFFIX}", "ab+")
        except BaseException:
            self._lock.release()
            raise
        if self._skips.tell() and self._ends_torn():
            self._skips.write(b"\n")
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # after an error too: every sample that was written is complete, and took time to make
            self.writer.close()
        finally:
            self._skips.close()
            self._lock.release()

    def todo(self, inputs: Iterable[Input]) -> list[Input]:
        """The inputs of this process that are not done yet, in order.

        A key's hash says which process an input belongs to, so that it does not depend on what else is there when each
        process looks.
        """
        shares = ((zlib.crc32(item.key.encode()) % self.num_processes, item) for item in inputs)
        ours = [item for share, item in shares if share == self.process_index]
        todo = [item for item in ours if item.key not in self.done]
        if len(todo) < len(ours):
            logger.info("%s of %s are done", f"{len(ours) - len(todo):,}", f"{len(ours):,}")
        return todo

    def skip(self, item: Input, problem: BadSample) -> None:
        """Note that nothing can be made of an input. It is not tried again."""
        self._skips.write(skipped_line(item.key, item.source, problem))
        self._skips.flush()

    def progress(self, inputs: Sequence[Input]) -> Any:
        """Progress bar over inputs, with the share of this process in its title."""
        share = f" {self.process_index + 1}/{self.num_processes}" if self.num_processes > 1 else ""
        return tqdm(total=len(inputs), desc=f"{self.command}{share}", unit="input")

    def finish(self, sheet_samples: int) -> dict[str, Any]:
        """Write the list of shards, the contact sheet and the counts, of what all processes have made by now.

        Every process does so at its end: the last one's files stay, and they are complete.

        Returns:
            dict: the manifest.

        Raises:
            ValueError: all inputs were skipped.
        """
        if not any(self.folder.glob("*.tar")) and self.num_processes == 1:
            raise ValueError(f"Nothing could be made of any input. {summarize(read_skipped(self.folder))}")
        return finish_folder(self.folder, sheet_samples)

    # What is there ---------------------------------------------------------------------------------------------------

    def _read_done(self):
        """Keys of all inputs that any process has finished."""
        done = {line["key"] for line in read_skipped(self.folder)}
        shards = sorted(self.folder.glob("*.tar"))
        for shard in tqdm(shards, "reading what is done", unit="shard", disable=len(shards) < 100):
            try:
                samples = index_tar(shard)
                problems = [f"{sample.key} {sample.problem}" for sample in samples if sample.problem]
            except BadSample as error:
                problems = [error.message]
            if problems:
                raise ValueError(f"The shard {shard} is damaged: {problems[0]}. Delete it, to make it again.")
            done.update(sample.key for sample in samples)
        return done

    def _ends_torn(self):
        self._skips.seek(-1, os.SEEK_END)
        return self._skips.read(1) != b"\n"


def check_manifest(folder: Path, command: str, settings: Mapping[str, Any]) -> None:
    """Begin a folder's manifest, or compare what is to be made with what it says.

    Raises:
        ValueError: settings differ from those in the folder, or shards of unknown origin are there.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() and any(folder.glob("*.tar")):
        raise ValueError(
            f"{folder} holds shards but no {MANIFEST_NAME}: they were made by something else. Pass a new or empty folder."
        )
    there = path.read_bytes() if path.is_file() else None
    manifest = begin_manifest(there, str(folder), command, settings)
    if there is None:
        _write_manifest(folder, manifest)


def begin_manifest(
    there: bytes | None, folder: str, command: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A new manifest, or the one that is there, if it was begun with the same settings.

    Raises:
        ValueError: it was not, or is not a manifest.
    """
    settings = json.loads(json.dumps(settings))
    if there is None:
        manifest = {"format": FORMAT_VERSION, "command": command, "settings": settings}
        return manifest | {"versions": package_versions()}
    try:
        manifest = json.loads(there)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder}/{MANIFEST_NAME} is not JSON ({first_line(error)}). Pass a new folder."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/{MANIFEST_NAME} is not a manifest of format {FORMAT_VERSION}. Pass a new folder."
        )
    before = manifest.get("settings")
    if manifest.get("command") != command or not isinstance(before, dict):
        raise ValueError(
            f"{folder} was made by {manifest.get('command')!r}, not {command!r}. Pass another folder."
        )
    names = sorted(name for name in settings | before if settings.get(name) != before.get(name))
    if names:
        pairs = ((name, _short(before.get(name)), _short(settings.get(name))) for name in names)
        differences = "; ".join(f"{name} {old} there, {new} now" for name, old, new in pairs)
        raise ValueError(
            f"What is in {folder} was made with other settings: {differences}. Pass the same to continue, or another folder to begin "
            "anew."
        )
    return manifest


def finish_folder(folder: Path, sheet_samples: int) -> dict[str, Any]:
    """Write the list of shards, the contact sheet and the counts, of what is there by now; returns the manifest."""
    with filelock.FileLock(folder / ".manifest.lock"):
        skipped = read_skipped(folder)
        if not any(folder.glob("*.tar")):
            logger.warning("No process has made a sample yet. %s", summarize(skipped))
            return read_json(folder / MANIFEST_NAME)
        index = read_json(write_shard_index(folder))
        manifest = read_json(folder / MANIFEST_NAME)
        manifest["shards"] = len(index["shardlist"])
        manifest["samples"] = sum(shard["nsamples"] for shard in index["shardlist"])
        manifest["skipped"] = dict(Counter(line["cause"] for line in skipped).most_common())
        manifest["summary"] = summarize(skipped)
        _write_manifest(folder, manifest)
        if sheet_samples:
            write_contact_sheet(folder, folder / SHEET_NAME, sheet_samples)
    return manifest


def read_skipped(folder: Path) -> list[dict[str, str]]:
    """Lines of all skipped files, one a key. A line that was cut off by a kill counts for nothing."""
    lines = {}
    for path in sorted(folder.glob(f"*{SKIPPED_SUFFIX}")):
        with open(path, "rb") as file:
            for text in file:
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    line = json.loads(text)
                    lines[line["key"]] = {name: str(line[name]) for name in ("key", "cause", "message")}
    return list(lines.values())


def skipped_line(key: str, source: str, problem: BadSample) -> bytes:
    """A line of a skipped file."""
    line = {"key": key, "source": source, "cause": problem.cause, "message": problem.message}
    # backslashes for what is not ASCII: a message may hold what is not UTF-8
    return json.dumps(line).encode() + b"\n"


def _write_manifest(folder, manifest):
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1))


def summarize(skipped: Sequence[Mapping[str, str]]) -> str:
    """How many inputs were skipped, by cause, with examples: text for people."""
    if not skipped:
        return "No input was skipped."
    causes = Counter(line["cause"] for line in skipped)
    parts = [f"{len(skipped):,} inputs were skipped."]
    for cause, number in causes.most_common():
        messages = [line["message"] for line in skipped if line["cause"] == cause][:EXAMPLES]
        parts.append(f"{cause}: {number:,}, such as {'; '.join(messages)}.")
    return " ".join(parts)


def _short(value):
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
