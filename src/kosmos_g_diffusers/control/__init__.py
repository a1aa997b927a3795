"""Control images for ControlNets: the table of controls, and the annotators that make them."""

from .controls import CONTROLS, control_image, control_preview, load_annotator, load_controlnet

__all__ = ["CONTROLS", "control_image", "control_preview", "load_annotator", "load_controlnet"]
