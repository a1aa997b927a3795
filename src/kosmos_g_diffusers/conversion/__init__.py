"""From released weights to a folder that diffusers loads: an official checkpoint, or Kosmos-2 and a Stable Diffusion."""

from typing import TYPE_CHECKING

from ..environment import lazy_names

if TYPE_CHECKING:
    from .kosmos2 import initialize
    from .official import convert_checkpoint

__all__ = ["convert_checkpoint", "initialize"]

__getattr__, __dir__ = lazy_names(__name__, {".kosmos2": "initialize", ".official": "convert_checkpoint"})
