"""Files as everything here writes and reads them: atomically, known by their hash, JSON of bounded size."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed or renamed anyway
    fcntl = None

MOST_JSON_BYTES = 64 * 1024**2
MOST_NAME_BYTES = 255  # of a file, on all common file systems


@contextmanager
def written_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to that becomes `path` when the block ends well, and otherwise leaves nothing.

    Until then it has a hidden name next to `path`, which `remove_partial_files` knows. Folders on the way are made.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    path = Path(path)
    partial = path  # until it has a name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, partial = _open_partial(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave a name without its contents
                if fcntl is not None:  # still locked, so that nobody takes it for abandoned
                    os.replace(partial, path)
            if fcntl is None:  # Windows renames no open file
                os.replace(partial, path)
        except BaseException as error:
            # numpy's own says nothing of the disk
            silent = isinstance(error, OSError) and error.errno is None
            full = silent and is_full_disk(error, path.parent)
            Path(partial).unlink(missing_ok=True)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
    except OSError as error:
        # whoever reads it asked for `path`, and knows nothing of a hidden file
        if error.errno is None or error.filename not in (None, str(partial), str(path)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _open_partial(path):
    """A new hidden file next to `path`, open and locked as long as it is, with the mode that the umask asks for."""
    while True:
        partial = path.with_name(f".{_start_of(path.name)}.{secrets.token_hex(4)}.part")
        file = open(partial, "xb")
        # one that has been taken for abandoned between these two lines has no name any more
        if _lock(file.fileno()) and (fcntl is None or os.fstat(file.fileno()).st_nlink):
            return file, partial
        file.close()


def _start_of(name):
    """As much of a file's name as leaves room for what `_open_partial` adds."""
    return name.encode("utf-8", "surrogateescape")[: MOST_NAME_BYTES - 15].decode("utf-8", "ignore")


def _lock(descriptor):
    """Whether this process alone has a file or folder open with such a lock now; the kernel unlocks what is closed."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def is_local_path(address: str) -> bool:
    """Whether an address is a path of this machine, and not of something that fsspec reaches (s3://bucket/folder)."""
    scheme, mark, _ = address.partition("://")
    return not mark or scheme in ("file", "local")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with written_atomically(path) as file:
        file.write(content)


def remove_partial_files(folder: str | Path, name: str = "*", older_than: float = 0.0) -> None:
    """Remove what a process that was killed has left of `written_atomically` in a folder; what is being written stays.

    Args:
        name: pattern of the names that the files would have had.
        older_than: seconds without a change; younger files stay.
    """
    # version 0.1.0 wrote some of them under names that are not hidden
    for pattern in (f".{name}.*.part", f"{name}.*.part"):
        for path in Path(folder).glob(pattern):
            # another process was quicker, or on Windows has it open
            with contextlib.suppress(FileNotFoundError, PermissionError, IsADirectoryError):
                with open(path, "r+b") as file:
                    is_left = time.time() - path.stat().st_mtime >= older_than and _lock(file.fileno())
                    if is_left and fcntl is not None:
                        path.unlink()  # while it is locked
                if is_left:
                    path.unlink(missing_ok=True)


def follow_umask(folder: str | Path) -> None:
    """Give weights below a folder, which safetensors makes readable to their owner alone, the mode of other new files."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        if path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)


@contextmanager
def partial_folder(path: str | Path) -> Any:
    """A hidden empty folder next to `path`, removed at the end; those that killed processes left for it are removed first."""
    prefix, suffix = f".{_start_of(path.name)}-", ".partial"
    for left in path.parent.glob(f"{glob.escape(prefix)}*{suffix}") if fcntl is not None else ():
        with contextlib.suppress(OSError), _open_folder(left) as descriptor:
            if _lock(descriptor):
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=suffix, dir=path.parent) as folder:
        with contextlib.nullcontext() if fcntl is None else _open_folder(folder) as descriptor:
            if descriptor is not None:
                _lock(descriptor)
            yield Path(folder)


@contextmanager
def _open_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_output_file(
    path: str | Path, overwrite: bool = True, suffix: str | None = None, why: str = ""
) -> Path:
    """The path of a file that is to be written, checked before any work; what a killed run has left of it is removed.

    Args:
        overwrite: whether it may be there already.
        suffix: how its name must end, such as ".png".
        why: said when it ends otherwise.

    Raises:
        ValueError: it is a folder or names one, its folder is not there or cannot be written to, its name is too long or
            ends otherwise.
        FileExistsError: it is there already and may not be.
    """
    text, path = str(path), Path(path)
    if not text or text.endswith(("/", os.sep)) or _exists(path) and path.is_dir():
        raise ValueError(f"The output {text!r} is a folder. Pass the path of a file.")
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(f"The output {text!r} does not end in {suffix}{why}.")
    if not path.parent.is_dir():
        what = "is a file" if path.parent.exists() else "is not there"
        raise ValueError(
            f"There is no folder {str(path.parent)!r} to write the output {text!r} into: it {what}. Make it first."
        )
    _check_writable(path, path.parent)
    remove_partial_files(path.parent, glob.escape(_start_of(path.name)))
    if path.exists() and not path.is_file():
        raise ValueError(f"The output {text!r} is a device or pipe. Pass the path of a file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} would be overwritten. Pass --force, or another --output.")
    return path


def check_output_folder(path: str | Path) -> Path:
    """The path of a folder that is to be written, which may be there or can be made. ValueError as `check_output_file`."""
    text, path = str(path), Path(path)
    if not text:
        raise ValueError("The output '' has no name. Pass the path of a folder.")
    if _exists(path) and not path.is_dir():
        raise ValueError(f"The output {text!r} is a file. Pass the path of a folder.")
    above = next(folder for folder in (path, *path.absolute().parents) if _exists(folder))
    if not above.is_dir():
        raise ValueError(f"The output {text!r} cannot be made: {above} is a file. Pass another folder.")
    _check_writable(path, above)
    return path


def _exists(path):
    """Whether a file or folder is there, or a link to none. ValueError for a name that the file system cannot hold."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The output {str(path)[:100]!r} cannot be written: {reason}. Pass another."
        ) from error
    return True


def _check_writable(path, folder):
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = str(folder)
        raise ValueError(
            f"The output {str(path)!r} cannot be written: no file can be made in {where!r} ({error.strerror}). Pass another."
        ) from error


def read_json(path: str | Path, expected: str = "Expected a JSON file.") -> Any:
    """Read a JSON file of at most `MOST_JSON_BYTES`; `expected` ends the errors.

    Raises:
        ValueError: there is no such file, it is too large, or it is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. {expected}")
    size = path.stat().st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MOST_JSON_BYTES:,} are read. {expected}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). {expected}") from error


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_bytes(content: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def hash_folder(folder: str | Path, parts: Iterable[str] = (".",)) -> str:
    """SHA-256 of the names and contents of all files in some subfolders, hidden ones left out."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((Path(folder) / part).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of what a library said, without its full stop; the error's class if it said nothing."""
    if isinstance(error, KeyError) and error.args:  # of which the text is the key alone
        return f"{str(error)[:100]} is missing"
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__


FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("No space left", "os error 28", "Disk quota exceeded")
HARDLY_ANY = 2**20  # bytes free: what is left when a write did not fit


def is_full_disk(error: BaseException, folder: str | Path | None = None) -> bool:
    """Whether a write failed because the disk is full, whatever library says it in whatever words.

    Args:
        folder: where it was written. Some libraries (torch) say nothing of the disk; then what is free there tells.
    """
    seen = set()
    while error is not None and id(error) not in seen:  # a cause may have what it caused as its context
        seen.add(id(error))
        number = getattr(error, "errno", None)
        if number in FULL or any(words in str(error) for words in FULL_WORDS):
            return True
        if number is not None:  # it has another reason
            return False
        error = error.__cause__ or error.__context__
    with contextlib.suppress(OSError, TypeError):
        return shutil.disk_usage(folder).free < HARDLY_ANY
    return False


def describe_write_error(error: BaseException, folder: str | Path) -> str:
    """Why a write into `folder` failed, without a full stop; a full disk is named as such, whatever library raised the error."""
    if is_full_disk(error, folder):
        return f"{os.strerror(errno.ENOSPC)} ({folder})"
    return getattr(error, "strerror", None) or first_line(error)


# What is worth keeping between runs: where the lines of large files begin, shards fetched from afar ------------------


def default_cache_dir() -> Path:
    """`kosmos-g` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kosmos-g"


def cache_path(cache_dir: str | Path, kind: str, *identity: str | int, suffix: str) -> Path:
    """Path in the cache for whatever `identity` (strings and ints) says; a hash, so that no name can lead outside."""
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    return Path(cache_dir) / kind / (name + suffix)


def keep_below(path: Path, most: int) -> list[Path]:
    """Delete the oldest files next to `path` with its suffix until all of them take at most so many bytes; `path` stays.

    Returns:
        the files that were deleted.
    """
    files, removed = [], []
    for file in path.parent.glob(f"*{path.suffix}"):
        with contextlib.suppress(FileNotFoundError):  # other processes delete as well
            stat = file.stat()
            files.append((stat.st_mtime, stat.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total > most and file != path:
            total -= size
            file.unlink(missing_ok=True)
            removed.append(file)
    return removed
