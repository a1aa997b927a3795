"""A run is tried before it costs anything (`kosmos-g train STAGE --rehearse`)."""

from typing import TYPE_CHECKING

from ...environment import lazy_names

if TYPE_CHECKING:
    from .rehearsing import Rehearsal, rehearse, write_pages
    from .report import describe

__all__ = ["Rehearsal", "describe", "rehearse", "write_pages"]

__getattr__, __dir__ = lazy_names(
    __name__, {".rehearsing": "Rehearsal rehearse write_pages", ".report": "describe"}
)
