"""Where each image of a prompt went: maps, and guidance by them (docs/maps.md). The pipelines import it when it is asked for."""

from typing import TYPE_CHECKING

from ..environment import lazy_names

if TYPE_CHECKING:
    from .observer import Observer
    from .overlay import draw_overlay
    from .reading import regions_of
    from .requests import MapRequest

__all__ = ["MapRequest", "Observer", "draw_overlay", "regions_of"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".observer": "Observer",
        ".overlay": "draw_overlay",
        ".reading": "regions_of",
        ".requests": "MapRequest",
    },
)
