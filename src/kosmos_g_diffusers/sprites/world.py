"""The miniature world: images of one or two coloured sprites on a coloured background, and captions that say it all.

Every image is drawn from a `Scene`, so what is true of it is known. A fifth of the (shape, colour, pattern) triples is
held out: no training data shows or names them, and what a model makes of them tells whether it has learned to combine.
"""

import math
import random
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Colour = tuple[int, int, int]  # R, G, B from 0 to 255

IMAGE_SIZE = 64  # pixels, height and width
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 45),
    "green": (45, 160, 65),
    "cyan": (40, 195, 220),
    "blue": (45, 75, 215),
    "purple": (130, 50, 175),
    "pink": (250, 130, 190),
}
PATTERNS = ("plain", "striped", "dotted", "bordered")
JITTER = 8.0  # pixels that a sprite's centre may be off the middle of its place
SIZES = {"large": 15.0, "small": 10.5}  # radius in pixels
# no colour of a sprite and never black, so that the black ink of a pattern and every sprite can be seen on all of them
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (160, 160, 160),
    "beige": (235, 215, 170),
    "mint": (185, 240, 210),
    "lavender": (205, 195, 245),
    "brown": (115, 80, 55),
}
INK = (20, 20, 20)
CONTRAST = 70  # distance in RGB of colours that can be told apart
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Sprite:
    """One object: names out of SHAPES, COLOURS, PATTERNS and SIZES."""

    shape: str
    colour: str
    pattern: str
    size: str

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.pattern

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.pattern} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two sprites, the first on the left, on a background out of BACKGROUNDS."""

    sprites: tuple[Sprite, ...]
    background: str

    @property
    def caption(self) -> str:
        """Such as "a large red striped star and a small blue plain ring on a mint background"."""
        return f"{' and '.join(map(str, self.sprites))} on a {self.background} background"


def is_held_out(sprite: Sprite) -> bool:
    """Whether no training data may show or name the sprite's (shape, colour, pattern): 52 of the 256 triples.

    They are spread evenly: each shape keeps every colour and every pattern, and each colour every pattern.
    """
    shape, colour, pattern = sprite.triple
    return (SHAPES.index(shape) + 2 * list(COLOURS).index(colour) + 3 * PATTERNS.index(pattern)) % 5 == 0


TRIPLES: tuple[tuple[str, str, str], ...] = tuple(product(SHAPES, COLOURS, PATTERNS))
HELD_OUT_TRIPLES: tuple[tuple[str, str, str], ...] = tuple(
    triple for triple in TRIPLES if is_held_out(Sprite(*triple, "large"))
)
TRAINING_TRIPLES: tuple[tuple[str, str, str], ...] = tuple(
    triple for triple in TRIPLES if triple not in HELD_OUT_TRIPLES
)


def draw_sprite_at_random(rng: random.Random, held_out: bool = False) -> Sprite:
    """A `Sprite` of the training triples or of the held-out ones; rng is a random.Random."""
    return Sprite(*rng.choice(HELD_OUT_TRIPLES if held_out else TRAINING_TRIPLES), rng.choice(list(SIZES)))


def draw_scene_at_random(rng: random.Random, n_sprites: int | None = None, held_out: bool = False) -> Scene:
    """A `Scene` of one or two sprites (drawn evenly unless n_sprites says), two of different shape or colour."""
    n_sprites = n_sprites or rng.choice((1, 2))
    sprites = [draw_sprite_at_random(rng, held_out) for _ in range(n_sprites)]
    while n_sprites == 2 and sprites[0].triple[:2] == sprites[1].triple[:2]:
        sprites[1] = draw_sprite_at_random(rng, held_out)
    return Scene(tuple(sprites), rng.choice(list(BACKGROUNDS)))


def recolour(sprite: Sprite, rng: random.Random) -> Sprite:
    """The sprite in another colour, a training triple if it was one, else a held-out one. ValueError if there is none."""
    others = other_colours(sprite)
    if not others:
        raise ValueError(f"There is no other held-out colour for {sprite}. Take one that has other_colours.")
    return rng.choice(others)


def other_colours(sprite: Sprite) -> list[Sprite]:
    """The sprite in every other colour that is a training triple, or held out, as the sprite itself is."""
    others = [replace(sprite, colour=colour) for colour in COLOURS if colour != sprite.colour]
    return [other for other in others if is_held_out(other) is is_held_out(sprite)]


def draw_colours_at_random(scene: Scene, rng: random.Random) -> tuple[tuple[Colour, ...], Colour]:
    """Colours for a scene, out of all there are: none makes a held-out triple of a sprite.

    Returns:
        ((R, G, B) of each sprite, (R, G, B) of the background), 0 to 255, which differ as much as named colours do.
    """
    ground = tuple(rng.randrange(90, 256) for _ in range(3))
    colours = []
    for sprite in scene.sprites:
        while True:
            colour = tuple(rng.randrange(256) for _ in range(3))
            nearest = min(COLOURS, key=lambda name: math.dist(COLOURS[name], colour))
            if (
                min(math.dist(colour, INK), math.dist(colour, ground)) > CONTRAST
                and not is_held_out(replace(sprite, colour=nearest))
            ):  # fmt: skip
                break
        colours.append(colour)
    return tuple(colours), ground


def render(
    scene: Scene, rng: random.Random, colours: tuple[tuple[Colour, ...], Colour] | None = None
) -> "Image.Image":
    """Draw a scene; rng (a random.Random) places the sprites and varies their size a little.

    Args:
        colours: of `draw_colours_at_random`, in place of those that the scene names.

    Returns:
        RGB image of IMAGE_SIZE x IMAGE_SIZE pixels.
    """
    from PIL import Image

    named = tuple(COLOURS[sprite.colour] for sprite in scene.sprites), BACKGROUNDS[scene.background]
    paints, ground = colours or named
    image = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, ground)
    half = IMAGE_SIZE / 2
    for index, sprite in enumerate(scene.sprites):
        radius = SIZES[sprite.size] * rng.uniform(0.95, 1.02)
        # a sprite of two keeps to its half
        left, right = (0, IMAGE_SIZE) if len(scene.sprites) == 1 else (index * half, (index + 1) * half)
        reach = min(right - left - 2 * radius, 2 * JITTER) / 2
        centre = (left + right) / 2 + rng.uniform(-reach, reach), half + rng.uniform(-JITTER, JITTER)
        paint_sprite(image, sprite, centre, radius, paints[index])
    return image.reduce(SUPERSAMPLING)


def paint_sprite(
    image: "Image.Image", sprite: Sprite, centre: tuple[float, float], radius: float, colour: Colour
) -> None:
    """Draw a sprite in (R, G, B) onto an image of SUPERSAMPLING times its size; centre and radius in pixels of its own size."""
    from PIL import Image, ImageChops, ImageDraw

    scale = SUPERSAMPLING
    side = math.ceil(2 * radius * scale) + 2
    silhouette, hole = Image.new("L", (side, side)), Image.new("L", (side, side))
    _draw_shape(ImageDraw.Draw(silhouette), ImageDraw.Draw(hole), sprite.shape, side / 2, radius * scale)
    ink = Image.new("L", (side, side))
    _draw_pattern(ImageDraw.Draw(ink), silhouette, sprite.pattern, scale)
    if sprite.pattern == "bordered":
        ink = ImageChops.subtract(silhouette, _erode(silhouette, round(2.0 * scale)))
    body = Image.new("RGB", (side, side), colour)
    body.paste(INK, mask=ink)
    corner = tuple(round(coordinate * scale - side / 2) for coordinate in centre)
    image.paste(body, corner, ImageChops.subtract(silhouette, hole))


def _draw_shape(draw, hole, shape, middle, radius):
    def box(x, y, reach):
        return [middle + x - reach, middle + y - reach, middle + x + reach, middle + y + reach]

    points = []
    if shape in ("circle", "ring", "moon"):
        draw.ellipse(box(0, 0, radius), fill=255)
    if shape == "ring":
        hole.ellipse(box(0, 0, 0.42 * radius), fill=255)
    elif shape == "moon":
        draw.ellipse(box(0.62 * radius, -0.3 * radius, 0.78 * radius), fill=0)
    elif shape == "square":
        draw.rectangle(box(0, 0, 0.85 * radius), fill=255)
    elif shape == "triangle":
        top, bottom = middle - 0.95 * radius, middle + 0.85 * radius
        points = [(middle, top), (middle + radius, bottom), (middle - radius, bottom)]
    elif shape == "star":
        for k in range(10):
            angle, reach = 2 * math.pi * k / 10, radius * (1.05, 0.48)[k % 2]
            points.append((middle + reach * math.sin(angle), middle - reach * math.cos(angle)))
    elif shape == "cross":
        arm = 0.36 * radius
        draw.rectangle([middle - radius, middle - arm, middle + radius, middle + arm], fill=255)
        draw.rectangle([middle - arm, middle - radius, middle + arm, middle + radius], fill=255)
    elif shape == "heart":
        for t in (2 * math.pi * k / 64 for k in range(64)):
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5
            points.append((middle + radius * math.sin(t) ** 3, middle - radius * y / 15.5))
    if points:
        draw.polygon(points, fill=255)


def _draw_pattern(draw, silhouette, pattern, scale):
    """Ink of a pattern on the square around a sprite; a border is made of the silhouette by the caller."""
    side = silhouette.width
    period = 6.5 * scale
    if pattern == "striped":
        for k in range(-1, math.ceil(side / period) + 1):
            top = side / 2 + (k - side / period / 2) // 1 * period + 0.25 * period
            draw.rectangle([0, top, side, top + 0.45 * period], fill=255)
    elif pattern == "dotted":
        reach = 1.75 * scale
        for row, column in product(range(-4, 5), repeat=2):
            x = side / 2 + (column + 0.5 * (row % 2)) * period
            y = side / 2 + row * 0.87 * period
            draw.ellipse([x - reach, y - reach, x + reach, y + reach], fill=255)


def _erode(mask, reach):
    """Each pixel the darkest of the square around it; as PIL's MinFilter, which takes eight times as long for a wide one."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(mask)
    for axis in (0, 1):
        padding = [(reach, reach) if axis == other else (0, 0) for other in (0, 1)]
        padded = np.pad(pixels, padding, mode="edge")
        pixels = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis).min(axis=-1)
    return Image.fromarray(pixels)


def make_rng(*parts: object) -> random.Random:
    """random.Random that depends on nothing but `parts`."""
    return random.Random("/".join(map(str, parts)))
