"""Drawings as other people make them: the world's shapes by a renderer of its own, of which no model was shown anything.

Nothing here is shared with `world.render` but the names: other outlines, sizes, places, edges and colours, on a canvas of
CANVAS pixels that is made smaller (LANCZOS) in the end, so that a drawing has the soft edges of any drawing program.
"""

import colorsys
import math
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from .world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES

if TYPE_CHECKING:
    from PIL import Image

CANVAS = 960  # pixels, side on which is drawn
PIXEL = CANVAS / IMAGE_SIZE  # of the finished drawing
KINDS = {
    "plain": "as large as the world's sprites, near the middle",
    "small": "smaller than the world's two sizes",
    "large": "larger than them",
    "corner": "in a corner",
    "tinted": "colours between the named ones, the background's too",
    "soft": "blurred edges",
    "outlined": "a thin line around, black or darker than the paint",
    "large canvas": "256 to 1024 pixels wide",
    "turned": "by 15 to 45 degrees",
    "mixed": "several of these at once",
}
ROUND = ("circle", "ring")  # turned, they are the same


@dataclass(frozen=True)
class Drawing:
    """What a drawing shows: a name out of KINDS and SHAPES, the paint (R, G, B) and the named colour next to it."""

    kind: str
    shape: str
    paint: tuple[int, int, int]
    colour: str


def draw_at_random(kind: str, rng: Random) -> "tuple[Drawing, Image.Image]":
    """A `Drawing` of a kind and its RGB image; rng is a random.Random."""
    from PIL import Image, ImageFilter  # not above: the command line names the kinds

    traits = {kind}
    if kind == "mixed":
        size, place = rng.choice(("plain", "small", "large")), rng.choice(("plain", "corner"))
        traits = {size, place, *rng.sample(("tinted", "soft", "outlined", "large canvas", "turned"), 2)}
    shape = rng.choice([shape for shape in SHAPES if "turned" not in traits or shape not in ROUND])
    colour, other = rng.sample(list(COLOURS), 2)
    paint, ground = COLOURS[colour], rng.choice(list(BACKGROUNDS.values()))
    if "tinted" in traits:
        paint, ground = _between(paint, COLOURS[other], rng), _pale(rng)
    # where a mixture of two colours comes near a third, that one is the nearest
    colour = min(COLOURS, key=lambda name: math.dist(COLOURS[name], paint))

    low, high = (4.5, 8.0) if "small" in traits else (18.0, 27.0) if "large" in traits else (10.0, 15.5)
    radius = rng.uniform(low, high)
    middle, reach = IMAGE_SIZE / 2, min(8.0, IMAGE_SIZE / 2 - radius)
    centre = [middle + rng.uniform(-reach, reach) for _ in range(2)]
    if "corner" in traits:  # a pixel or three from both sides
        away = middle - radius - rng.uniform(1.0, 3.0)
        centre = [middle + rng.choice((-1, 1)) * away for _ in range(2)]
    degrees = rng.choice((-1, 1)) * rng.uniform(15, 45) if "turned" in traits else 0

    mask = _silhouette(shape, [PIXEL * place for place in centre], PIXEL * radius, degrees)
    image = Image.new("RGB", mask.size, ground)
    if "outlined" in traits:
        line = rng.choice(((0, 0, 0), tuple(round(0.5 * channel) for channel in paint)))
        image.paste(line, mask=mask)
        mask = mask.filter(ImageFilter.BoxBlur(PIXEL * rng.uniform(0.7, 1.3))).point([0] * 254 + [255] * 2)
    image.paste(paint, mask=mask)
    if "soft" in traits:
        image = image.filter(ImageFilter.GaussianBlur(PIXEL * rng.uniform(0.8, 1.6)))
    side = rng.choice((256, 400, 512, 800, 1024)) if "large canvas" in traits else IMAGE_SIZE
    return Drawing(kind, shape, paint, colour), image.resize((side, side), Image.Resampling.LANCZOS)


def _between(one, other, rng):
    share = rng.uniform(0.15, 0.4)
    return tuple(round((1 - share) * a + share * b) for a, b in zip(one, other, strict=True))


def _pale(rng):
    """Light enough that every paint stands out."""
    channels = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.2), rng.uniform(0.93, 1.0))
    return tuple(round(255 * channel) for channel in channels)


def _silhouette(shape, centre, radius, degrees):
    """(CANVAS, CANVAS) "L" mask of a shape."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(mask)
    turn = math.radians(degrees)

    def place(x, y):
        """From the shape's own coordinates, radius 1 and y upwards, to the canvas."""
        x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
        return centre[0] + radius * x, centre[1] - radius * y

    def disc(x, y, reach, fill=255):
        (x, y), reach = place(x, y), radius * reach
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)

    def polygon(*points):
        draw.polygon([place(*point) for point in points], fill=255)

    if shape in ("circle", "ring", "moon"):
        disc(0, 0, 1)
    if shape == "ring":
        disc(0, 0, 0.55, fill=0)
    elif shape == "moon":
        disc(0.5, 0.15, 0.85, fill=0)
    elif shape == "square":
        polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    elif shape == "triangle":  # of equal sides
        polygon(*((math.sin(2 * math.pi * k / 3), math.cos(2 * math.pi * k / 3)) for k in range(3)))
    elif shape == "star":  # as a pen draws it in one go: its inner radius is that of the pentagram
        reach = (1.0, 0.382)
        polygon(
            *(
                (reach[k % 2] * math.sin(math.pi * k / 5), reach[k % 2] * math.cos(math.pi * k / 5))
                for k in range(10)
            )
        )
    elif shape == "cross":
        for across, along in ((0.28, 1), (1, 0.28)):
            polygon((-across, -along), (across, -along), (across, along), (-across, along))
    elif shape == "heart":  # two discs on a point
        for side in (-0.46, 0.46):
            disc(side, 0.36, 0.54)
        polygon((-0.93, 0.1), (0, -0.95), (0.93, 0.1), (0.4, 0.5), (-0.4, 0.5))
    return mask
