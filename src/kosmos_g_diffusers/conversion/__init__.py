"""From released weights to a folder that diffusers loads: an official checkpoint, or Kosmos-2 and a Stable Diffusion."""

from .kosmos2 import initialize
from .official import convert_checkpoint

__all__ = ["convert_checkpoint", "initialize"]
