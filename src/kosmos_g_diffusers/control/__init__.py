"""Control images for ControlNets: the table of controls, and the annotators that make them."""

from typing import TYPE_CHECKING

from ..environment import lazy_names
from .table import CONTROLS

if TYPE_CHECKING:
    from .controls import control_image, control_preview, load_annotator, load_controlnet

__all__ = ["CONTROLS", "control_image", "control_preview", "load_annotator", "load_controlnet"]

__getattr__, __dir__ = lazy_names(
    __name__, {".controls": "control_image control_preview load_annotator load_controlnet"}
)
