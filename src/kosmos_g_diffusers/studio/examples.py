"""What a visitor can load with one click: sprites for small models, photos for the real one."""

from dataclasses import dataclass
from pathlib import Path

from ..sprites.world import Scene, Sprite, make_rng, render

PHOTOS = Path(__file__).parent / "pictures"  # CC0; PROVENANCE.txt there says whose


@dataclass(frozen=True)
class Example:
    prompt: str
    pictures: tuple = ()  # PIL images, or paths of files of this package


def _sprite(*names, background="white"):
    return render(Scene((Sprite(*names),), background), make_rng(*names))


def sprite_examples():
    """The kinds of prompt that the small model was trained on."""
    star, ring = _sprite("star", "red", "striped", "large"), _sprite("ring", "blue", "plain", "small")
    heart = _sprite("heart", "pink", "dotted", "large", background="mint")
    return (
        Example("<i> and <i> on a mint background", (star, ring)),
        Example("<i> on a brown background", (heart,)),
        Example("<i> , green", (star,)),
        Example("<i> and a small cyan plain moon on a beige background", (heart,)),
        Example("a large purple bordered square on a grey background"),
    )


def photo_examples():
    """The official demo's kinds of prompt: a place, another look, a style, an attribute, two pictures."""
    cat, coffee = PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"
    return (
        Example("<i> in the snow", (cat,)),
        Example("<i> wearing a red hat", (cat,)),
        Example("<i> as an oil painting in the style of Van Gogh", (cat,)),
        Example("<i> beside <i> on a wooden table", (cat, coffee)),
        Example("<i>, green cup", (coffee,)),
    )
