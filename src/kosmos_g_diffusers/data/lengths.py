"""Rough lengths of a source's samples, which batches by length need of everybody's samples: found once, by one process each."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from ..files import cache_path, default_cache_dir, written_atomically
from .sample import BadSample

if TYPE_CHECKING:
    from .mixture import EndlessOrder

KEPT = 4_000_000  # lengths that a process keeps in memory, 16 MB


class Lengths:
    """Lengths of the samples of a source by their indices, as its `length` gives them.

    They are found for a piece of the source at a time (a file, a shard, or 65,536 samples of a larger one) and kept in the cache folder:
    of all processes that need a piece one finds its lengths, and the others read them. A source without `identify` is asked for every
    length that is needed instead.

    Args:
        source: with `identify(first, last)`, what the lengths of these samples depend on, or None if nobody knows.
        order: of the source; its pieces are those that are shuffled together.
    """

    source: Any
    order: "EndlessOrder"
    cache_dir: Path

    def __init__(self, source: Any, order: "EndlessOrder"):
        self.source, self.order = source, order
        self.cache_dir = Path(getattr(source, "cache_dir", None) or default_cache_dir())
        self._pieces = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": OrderedDict()}  # each worker reads its own

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Lengths of samples, int32; 0 for those that cannot be read, which are counted when they are."""
        if not hasattr(self.source, "identify"):
            return np.array([_length(self.source, index) for index in indices.tolist()], dtype=np.int32)
        pieces = np.searchsorted(self.order.starts, indices, side="right") - 1
        # of pieces without samples, which begin where the next one does, the last is meant
        needed = np.unique(pieces).tolist()
        self._find(needed)
        found = np.empty(len(indices), dtype=np.int32)
        for piece in needed:
            of_piece = pieces == piece
            found[of_piece] = self._piece(piece)[indices[of_piece] - self.order.starts[piece]]
        return found

    def _find(self, pieces: Sequence[int]) -> None:
        """Have all pieces found: each process begins elsewhere, and leaves alone what another one is at, until the end."""
        missing = [piece for piece in pieces if piece not in self._pieces]
        start = os.getpid() % max(len(missing), 1)
        for waits in (False, True):
            for piece in missing[start:] + missing[:start]:
                if piece not in self._pieces:
                    self._piece(piece, waits)

    def _piece(self, piece, waits=True):
        if piece in self._pieces:
            self._pieces.move_to_end(piece)
            return self._pieces[piece]
        found = self._read_or_make(piece, waits)
        if found is not None:
            self._pieces[piece] = found
            kept = sum(len(lengths) for lengths in self._pieces.values())
            while kept > KEPT and len(self._pieces) > 1:
                kept -= len(self._pieces.popitem(last=False)[1])
        return found

    def _read_or_make(self, piece, waits):
        """The lengths of a piece; None if another process is at it and `waits` is false."""
        first, size = int(self.order.starts[piece]), int(self.order.sizes[piece])
        identity = self.source.identify(first, first + size)
        if identity is None:
            return self._make(first, size)
        path = cache_path(self.cache_dir, "lengths", *map(str, identity), suffix=".npy")
        found = _load(path, size)
        if found is not None:
            return found
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
            lock.acquire(timeout=-1 if waits else 0)
        except Timeout:
            return None
        except OSError:  # a cache that cannot be written costs time only
            return self._make(first, size)
        try:
            found = _load(path, size)
            if found is None:
                found = self._make(first, size)
                with suppress(OSError), written_atomically(path) as file:
                    np.save(file, found)
        finally:
            lock.release()
        return found

    def _make(self, first, size):
        if hasattr(self.source, "lengths"):
            return np.asarray(self.source.lengths(first, first + size), dtype=np.int32)
        return np.array([_length(self.source, index) for index in range(first, first + size)], dtype=np.int32)

    def build(self) -> int:
        """Find all lengths that are not kept yet; returns the number of samples."""
        for piece in range(len(self.order.sizes)):
            if self.order.sizes[piece]:
                self._piece(piece)
        return int(self.order.total)


def _length(source, index):
    try:
        return source.length(index)
    except BadSample:  # counted when it is read
        return 0


def _load(path, size):
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):  # not there yet, or damaged: found again
        return None
    return found if found.dtype == np.int32 and found.shape == (size,) else None
