"""Files as everything here writes and reads them: atomically, known by their hash, JSON of bounded size."""

import hashlib
import json
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

MOST_JSON_BYTES = 64 * 1024**2


@contextmanager
def written_atomically(path):
    """A binary file to write to that becomes `path` when the block ends well, and otherwise leaves nothing.

    Until then it has a hidden name next to `path`, which `remove_partial_files` knows. Folders on the way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave a name without its contents
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write a text file in UTF-8 atomically."""
    with written_atomically(path) as file:
        file.write(text.encode("utf-8"))


def remove_partial_files(folder, name="*", older_than=0.0):
    """Remove what a process that was killed has left of `written_atomically` in a folder.

    Args:
        name: pattern of the names that the files would have had.
        older_than: seconds without a change; younger files may belong to a process that is still writing.
    """
    # version 0.1.0 wrote some of them under names that are not hidden
    for pattern in (f".{name}.*.part", f"{name}.*.part"):
        for path in Path(folder).glob(pattern):
            try:
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()
            except FileNotFoundError:  # another process was quicker
                pass


def read_json(path, expected="Expected a JSON file."):
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


def hash_file(path):
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_bytes(content):
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def hash_folder(folder, parts=(".",)):
    """SHA-256 of the names and contents of all files in some subfolders, hidden ones left out."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((Path(folder) / part).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def first_line(error):
    """The first line of what a library said, without its full stop; the error's class if it said nothing."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__


# What is worth keeping between runs: where the lines of large files begin, shards fetched from afar ------------------


def default_cache_dir():
    """`kosmos-g` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kosmos-g"


def cache_path(cache_dir, kind, *identity, suffix):
    """Path in the cache for whatever `identity` (strings and ints) says; a hash, so that no name can lead outside."""
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    return Path(cache_dir) / kind / (name + suffix)
