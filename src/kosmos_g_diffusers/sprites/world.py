"""The miniature world: images of one to four coloured sprites on a coloured background, and captions that say it all.

Every image is drawn from a `Scene`, so what is true of it is known. A fifth of the (shape, colour, pattern) triples is
held out: no training data shows or names them, and what a model makes of them tells whether it has learned to combine.
"""

import math
import random
from collections.abc import Sequence
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
MOST_SPRITES = 4
REACH = 1.05  # of a sprite from its centre, in radii
MARGIN = 0.5  # pixels that a sprite keeps from the image's edges
# pixels between sprites that stand anywhere: the rules that read images tell them apart so
GAP_ACROSS, GAP_DOWN = 2.0, 5.0


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
    """One to four sprites, of two that `render` places the first on the left, on a background out of BACKGROUNDS."""

    sprites: tuple[Sprite, ...]
    background: str

    @property
    def caption(self) -> str:
        """Such as "a large red striped star and a small blue plain ring on a mint background".

        Of four sprites it leaves the articles out: the small text encoder reads 22 words, and these are 22.
        """
        text = f"{' and '.join(map(str, self.sprites))} on a {self.background} background"
        return text if len(self.sprites) < MOST_SPRITES else text.replace("a ", "", 1).replace(" a ", " ")


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
    """A `Scene` of one or two sprites (drawn evenly unless n_sprites says, up to four), no two of one shape and colour.

    Of three and four, one at most is large: they have to find room.
    """
    n_sprites = n_sprites or rng.choice((1, 2))
    sprites = [draw_sprite_at_random(rng, held_out) for _ in range(n_sprites)]
    for index in range(1, n_sprites):
        while sprites[index].triple[:2] in [sprite.triple[:2] for sprite in sprites[:index]]:
            sprites[index] = draw_sprite_at_random(rng, held_out)
    if n_sprites > 2:
        large = rng.randrange(2 * n_sprites)  # in half of the scenes one of them may be
        sprites = [
            sprite if index == large else replace(sprite, size="small")
            for index, sprite in enumerate(sprites)
        ]
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
    scene: Scene,
    rng: random.Random,
    colours: tuple[tuple[Colour, ...], Colour] | None = None,
    anywhere: bool = False,
) -> "Image.Image":
    """Draw a scene; rng (a random.Random) places the sprites and varies their size a little.

    Args:
        colours: of `draw_colours_at_random`, in place of those that the scene names.
        anywhere: one sprite or two in any place, as three and four always are. Otherwise, and if two are large, one is near the
            middle and two stand next to each other, the first on the left.

    Returns:
        RGB image of IMAGE_SIZE x IMAGE_SIZE pixels.

    Raises:
        ValueError: there is no room for the sprites, such as three large ones.
    """
    return render_at(scene, place_at_random(scene, rng, anywhere), colours)


def place_at_random(
    scene: Scene, rng: random.Random, anywhere: bool = False
) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each sprite in pixels, as `render` places them: none hides a part of another."""
    radii, centres, half = [], [], IMAGE_SIZE / 2
    n_large = sum(sprite.size == "large" for sprite in scene.sprites)
    if len(scene.sprites) > 2 or (anywhere and n_large < 2):
        return _place_anywhere(
            [SIZES[sprite.size] * rng.uniform(0.95, 1.02) for sprite in scene.sprites], rng
        )
    for index, sprite in enumerate(scene.sprites):
        radius = SIZES[sprite.size] * rng.uniform(0.95, 1.02)
        # a sprite of two keeps to its half
        left, right = (0, IMAGE_SIZE) if len(scene.sprites) == 1 else (index * half, (index + 1) * half)
        reach = min(right - left - 2 * radius, 2 * JITTER) / 2
        radii.append(radius)
        centres.append(((left + right) / 2 + rng.uniform(-reach, reach), half + rng.uniform(-JITTER, JITTER)))
    return [(x, y, radius) for (x, y), radius in zip(centres, radii, strict=True)]


def in_reading_order(
    scene: Scene, places: Sequence[tuple[float, float, float]]
) -> tuple[Scene, list[tuple[float, float, float]]]:
    """The same scene and places, named from left to right, and from top to bottom where sprites stand above each other."""
    order = sorted(range(len(places)), key=lambda index: places[index][0] + places[index][1] / 2)
    sprites = tuple(scene.sprites[index] for index in order)
    return replace(scene, sprites=sprites), [places[index] for index in order]


def _place_anywhere(radii, rng):
    """(x, y, radius) of sprites whose boxes keep GAP_ACROSS or GAP_DOWN from each other; the largest chooses first."""
    order = sorted(range(len(radii)), key=lambda index: -radii[index])
    for _ in range(1_000):
        places = {}
        for index in order:
            r, edge = radii[index], REACH * radii[index] + MARGIN
            for _ in range(30):
                x, y = (rng.uniform(edge, IMAGE_SIZE - edge) for _ in range(2))
                if all(
                    abs(x - u) >= REACH * (r + s) + GAP_ACROSS or abs(y - v) >= REACH * (r + s) + GAP_DOWN
                    for u, v, s in places.values()
                ):
                    places[index] = (x, y, r)
                    break
            else:  # no room is left: from the beginning
                break
        else:
            return [places[index] for index in range(len(radii))]
    raise ValueError(
        f"There is no room for {len(radii)} sprites of {', '.join(f'{radius:.1f}' for radius in radii)} pixels of radius in "
        f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels. Of three and four, let one at most be large."
    )


def render_at(
    scene: Scene,
    places: Sequence[tuple[float, float, float]],
    colours: tuple[tuple[Colour, ...], Colour] | None = None,
) -> "Image.Image":
    """As `render`, with the sprites in places of `place_at_random`."""
    from PIL import Image

    named = tuple(COLOURS[sprite.colour] for sprite in scene.sprites), BACKGROUNDS[scene.background]
    paints, ground = colours or named
    image = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, ground)
    for sprite, (x, y, radius), paint in zip(scene.sprites, places, paints, strict=True):
        paint_sprite(image, sprite, (x, y), radius, paint)
    return image.reduce(SUPERSAMPLING)


@dataclass(frozen=True)
class Form:
    """How a shape is drawn, in radii where nothing else is said; the defaults are the world's own."""

    turn: float = 0.0  # degrees, against the clock
    width: float = 1.0  # over the height
    star: tuple[int, float] = (5, 0.48)  # points, inner radius
    hole: float = 0.42  # of a ring
    moon: tuple[float, float, float] = (0.62, -0.3, 0.78)  # place and radius of what is cut out
    arm: float = 0.36  # half the width of a cross's arms
    square: float = 0.85
    triangle: tuple[float, float] = (0.95, 0.85)  # above and below the centre
    rim: float = 0.0  # pixels of a thin line around the shape, not a border


def paint_sprite(
    image: "Image.Image",
    sprite: Sprite,
    centre: tuple[float, float],
    radius: float,
    colour: Colour,
    form: Form | None = None,
) -> None:
    """Draw a sprite in (R, G, B) onto an image of SUPERSAMPLING times its size; centre and radius in pixels of its own size."""
    from PIL import Image, ImageChops, ImageDraw

    form = form or Form()
    scale = SUPERSAMPLING
    side = math.ceil(2 * radius * scale * (1.0 if form == Form() else 1.5)) + 2
    silhouette, hole = Image.new("L", (side, side)), Image.new("L", (side, side))
    _draw_shape(
        ImageDraw.Draw(silhouette), ImageDraw.Draw(hole), sprite.shape, side / 2, radius * scale, form
    )
    silhouette, hole = (_transform(mask, form) for mask in (silhouette, hole))
    ink = Image.new("L", (side, side))
    _draw_pattern(ImageDraw.Draw(ink), silhouette, sprite.pattern, scale)
    if sprite.pattern == "bordered":
        ink = ImageChops.subtract(silhouette, _erode(silhouette, round(2.0 * scale)))
    elif form.rim:
        ink = ImageChops.lighter(
            ink, ImageChops.subtract(silhouette, _erode(silhouette, round(form.rim * scale)))
        )
    body = Image.new("RGB", (side, side), colour)
    body.paste(INK, mask=ink)
    corner = tuple(round(coordinate * scale - side / 2) for coordinate in centre)
    image.paste(body, corner, ImageChops.subtract(silhouette, hole))


def _transform(mask, form):
    from PIL import Image

    if form.width != 1:
        side, width = mask.width, round(mask.width * form.width)
        narrow = mask.resize((width, side), Image.Resampling.BILINEAR)
        mask = Image.new("L", (side, side))
        mask.paste(narrow, ((side - width) // 2, 0))
    return mask.rotate(form.turn, Image.Resampling.BILINEAR) if form.turn else mask


def _draw_shape(draw, hole, shape, middle, radius, form):
    def box(x, y, reach):
        return [middle + x - reach, middle + y - reach, middle + x + reach, middle + y + reach]

    points = []
    if shape in ("circle", "ring", "moon"):
        draw.ellipse(box(0, 0, radius), fill=255)
    if shape == "ring":
        hole.ellipse(box(0, 0, form.hole * radius), fill=255)
    elif shape == "moon":
        draw.ellipse(box(*(radius * length for length in form.moon)), fill=0)
    elif shape == "square":
        draw.rectangle(box(0, 0, form.square * radius), fill=255)
    elif shape == "triangle":
        top, bottom = middle - form.triangle[0] * radius, middle + form.triangle[1] * radius
        points = [(middle, top), (middle + radius, bottom), (middle - radius, bottom)]
    elif shape == "star":
        n_points, inner = form.star
        for k in range(2 * n_points):
            angle, reach = 2 * math.pi * k / (2 * n_points), radius * (1.05, inner)[k % 2]
            points.append((middle + reach * math.sin(angle), middle - reach * math.cos(angle)))
    elif shape == "cross":
        arm = form.arm * radius
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
