"""Archives that public sets come in: .tar, .tar.gz, split .tar.gz.part-aa, .zip, unpacked into the folder where they lie."""

import glob
import logging
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from filelock import FileLock

from ...files import hash_bytes, write_text, written_atomically

logger = logging.getLogger(__name__)

READ_BYTES = 1024**2


class Joined:
    """The parts of a split file as one, read from the beginning to the end."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self._file = list(paths), None

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; b"" at the end."""
        while self._file is not None or self.paths:
            self._file = self._file or open(self.paths.pop(0), "rb")
            if data := self._file.read(size):
                return data
            self._file.close()
            self._file = None
        return b""


def unpack(folder: str | Path, pattern: str) -> None:
    """Unpack archives into the folder where each lies; what was unpacked before is not unpacked again.

    Only plain files are written, and none outside that folder. A run that was stopped continues: files that are there, of the right
    size, are passed over.

    Args:
        folder: of the data set.
        pattern: of archives below it; the parts of a split one are one archive.

    Raises:
        ValueError: none is found, or one is damaged.
    """
    paths = [Path(name) for name in sorted(glob.glob(str(Path(folder) / pattern), recursive=True))]
    if not paths:
        raise ValueError(
            f"There is no {pattern} in {folder}. Fetch it into that folder, or pass --data with the one that has it."
        )
    archives = {}
    for path in paths:
        archives.setdefault(
            str(path).partition(".tar.gz")[0] if ".tar.gz" in path.name else str(path), []
        ).append(path)
    for parts in archives.values():
        sizes = [(part.name, part.stat().st_size) for part in parts]
        done = parts[0].parent / f".unpacked-{hash_bytes(repr(sizes).encode())[:16]}"
        with FileLock(f"{done}.lock"):
            if not done.is_file():
                logger.info("unpacking %s", parts[0])
                try:
                    for name, size, file in _members(parts):
                        _write(parts[0].parent, name, size, file)
                except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:  # such as a full disk
                        raise
                    raise ValueError(
                        f"{parts[0]} cannot be unpacked ({error}). Fetch it again, with all its parts."
                    ) from error
                write_text(done, "\n".join(name for name, _ in sizes))


def _members(parts: Sequence[Path]) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, bytes, open file) of every plain file of an archive."""
    if parts[0].suffix == ".zip":
        with zipfile.ZipFile(parts[0]) as archive:
            for member in archive.infolist():
                if not member.is_dir() and not stat.S_ISLNK(member.external_attr >> 16):
                    with archive.open(member) as file:
                        yield member.filename, member.file_size, file
        return
    with tarfile.open(fileobj=Joined(parts), mode="r|*") as archive:
        for member in archive:
            if member.isreg() and not member.issparse():
                yield member.name, member.size, archive.extractfile(member)


def _write(folder, name, size, file):
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        return logger.warning("%r was not unpacked: it leads elsewhere", name)
    target = folder.joinpath(*path.parts)
    if target.is_file() and target.stat().st_size == size:
        return None
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        return logger.warning("%r was not unpacked: it leads elsewhere", name)
    with written_atomically(target) as written:
        shutil.copyfileobj(file, written, READ_BYTES)
    return None
