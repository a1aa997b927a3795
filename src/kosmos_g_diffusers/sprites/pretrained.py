"""The small model that ships with the package: what draws, reads and is evaluated where no model is given."""

from pathlib import Path

import torch
from diffusers import ControlNetModel

from ..pipeline_kosmos_g import DTYPE_KEYWORD

SPRITES = str(Path(__file__).parent / "model")  # trained by examples/sprites
SPRITES_CONTROL = "canny"  # the control that its ControlNet was trained for
SPRITES_NOTE = (
    "Note: no model was given, so the small model that ships is taken. It knows nothing but sprites: 64 pixel pictures of one "
    'or two shapes, and prompts such as "<i> on a mint background" or "a large red striped star on a white background". '
    "Photos and other words mean nothing to it. Convert a checkpoint (kosmos-g convert --help) and pass --model for more."
)


def load_sprites_controlnet(name, dtype=torch.float32):
    """The ControlNet of the small model.

    Args:
        name: kind of control, of `control.CONTROLS`.

    Raises:
        ValueError: the small model has none for this kind.
    """
    if name != SPRITES_CONTROL:
        raise ValueError(
            f"The small model that ships has a ControlNet for {SPRITES_CONTROL} alone, and {name!r} was asked for. Pass "
            f"--model with the model that you have converted, take {SPRITES_CONTROL}, or pass a --controlnet."
        )
    return ControlNetModel.from_pretrained(SPRITES, subfolder="controlnet", **{DTYPE_KEYWORD: dtype})
