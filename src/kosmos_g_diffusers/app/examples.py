"""What a user can load with one click: sprites for small models, photos for the real one."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from ..serving.images import data_uri
from ..sprites.world import Scene, Sprite, make_rng, render

# what the first example became, drawn by the small model with `make app-figures`; it carries its settings
RESULT = Path(__file__).parent / "static" / "example.png"
PHOTOS = Path(__file__).parent / "static" / "pictures"  # CC0; PROVENANCE.txt there says whose


@dataclass(frozen=True)
class Example:
    prompt: str
    images: tuple[Any, ...] = ()  # (name of the file, PIL image or path of a file of this package) for each

    def thumbnails(self, side: int = 64) -> list[str]:
        """data: URIs of its images."""
        found = []
        for _, image in self.images:
            if isinstance(image, Path):
                with PIL.Image.open(image) as opened:
                    opened.thumbnail((side, side))  # as JPEG, which is read at an eighth of its size
                    image = opened.convert("RGB")
            found.append(data_uri(image, side=0))
        return found


def placeholder(is_small: bool) -> str:
    """A prompt that a model can draw, for a small one or another."""
    return (sprite_examples() if is_small else photo_examples())[0].prompt


def result_uri() -> str | None:
    """The result of the first example as a data: URI, with its mark and its settings; None where it was not drawn yet."""
    if not RESULT.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(RESULT.read_bytes()).decode()}"


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
