"""A folder for what is worth keeping between runs: where the lines of large files begin, shards fetched from afar."""

import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir():
    """`kosmos-g` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kosmos-g"


def cache_path(cache_dir, kind, *identity, suffix):
    """Path in the cache for whatever `identity` (strings and ints) says; a hash, so that no name can lead outside."""
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    return Path(cache_dir) / kind / (name + suffix)


@contextmanager
def written_atomically(path):
    """A file to write to in binary that becomes `path` when the block ends well, and otherwise leaves nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
