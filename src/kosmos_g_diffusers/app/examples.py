"""What a user can load with one click: sprites for small models, photos for the real one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sprites.world import Scene, Sprite, make_rng, render

PHOTOS = Path(__file__).parent / "static" / "pictures"  # CC0; PROVENANCE.txt there says whose


@dataclass(frozen=True)
class Example:
    prompt: str
    images: tuple[Any, ...] = ()  # (name of the file, PIL image or path of a file of this package) for each


def _sprite(colour, pattern, shape, background):
    """An image of one large sprite, and a name for it."""
    name = f"{colour}-{pattern}-{shape}"
    scene = Scene((Sprite(shape, colour, pattern, "large"),), background)
    return f"{name}.png", render(scene, make_rng(name))


def sprite_examples() -> tuple[Example, ...]:
    """The kinds of prompt that the small model was trained on, of sprites that it was never shown and never told of."""
    star = _sprite("yellow", "striped", "star", "lavender")
    heart = _sprite("red", "dotted", "heart", "grey")
    return (
        Example("<i> on a mint background", (star,)),
        Example("<i> and <i> on a white background", (star, heart)),
        Example("<i>, pink", (star,)),
        Example("<i> and a small cyan plain moon on a beige background", (heart,)),
        Example("a large orange striped ring on a lavender background"),
    )


def photo_examples() -> tuple[Example, ...]:
    """The official demo's kinds of prompt: a place, another look, a style, an attribute, two images."""
    cat, coffee = ((name, PHOTOS / name) for name in ("cat.jpg", "coffee.jpg"))
    return (
        Example("<i> in the snow", (cat,)),
        Example("<i> wearing a red hat", (cat,)),
        Example("<i> as an oil painting in the style of Van Gogh", (cat,)),
        Example("<i> beside <i> on a wooden table", (cat, coffee)),
        Example("<i>, green cup", (coffee,)),
    )
