"""The small model that ships with the package: what draws, reads and is evaluated where no model is given."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generation.settings import GenerationSettings

SPRITES = str(Path(__file__).parent / "model")  # trained by examples/sprites
# images to try it with, of sprites that it was never shown: a yellow striped star, a red dotted heart
STAR, HEART = (str(Path(__file__).parent / "images" / f"{name}.png") for name in ("star", "heart"))
SPRITES_CONTROL = "canny"  # the control that its ControlNet was trained for
SPRITES_ONLY = (
    "This small model knows nothing but sprites: 64 pixel images of one or two shapes. Photos and other words mean nothing "
    "to it."
)
SPRITES_NOTE = (
    f"Note: no model was given, so the small model that ships is taken. {SPRITES_ONLY} Its prompts are such as "
    '"<i> on a mint background" or "a large red striped star on a white background". '
    "Convert a checkpoint (kosmos-g convert --help) and pass --model for more."
)


def with_small_model(settings: "GenerationSettings") -> "GenerationSettings":
    """GenerationSettings with the small model and its ControlNet if they name no model. ValueError as `sprites_controlnet`."""
    if settings.model is not None:
        return settings
    controls = [
        replace(control, controlnet=control.controlnet or sprites_controlnet(control.name))
        for control in settings.controls
    ]
    return replace(settings, model=SPRITES, controls=tuple(controls))


def sprites_controlnet(name: str) -> str:
    """Folder of the small model's ControlNet for a kind of control. Raises ValueError if it has none for this kind."""
    if name != SPRITES_CONTROL:
        raise ValueError(
            f"The small model that ships has a ControlNet for {SPRITES_CONTROL} alone, and {name!r} was asked for. Pass "
            f"--model with the model that you have converted, take {SPRITES_CONTROL}, or pass a --controlnet."
        )
    return str(Path(SPRITES) / "controlnet")
