"""What a source needs to know of its files, found before training: `kosmos-g data index`."""

from .lengths import Lengths
from .mixture import EndlessOrder
from .sources import build_source


def build_index(line: str, with_lengths: bool = True) -> int:
    """Find and keep where the samples of a source lie, and how long they are; returns how many there are.

    Args:
        line: see `build_source`.
        with_lengths: which only batches by length need.
    """
    source = build_source(line)
    if with_lengths:
        Lengths(source, EndlessOrder(source.groups, 0)).build()
    return len(source)
