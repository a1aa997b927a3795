"""Images and words beyond the world's own, for training: what other people draw and type, in forms drawn at random.

Nothing here is of `drawings` or `typed_words`, which measure what a model makes of them: another renderer, other lists.
"""

import colorsys
import math
import string
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from .world import (
    BACKGROUNDS,
    COLOURS,
    CONTRAST,
    IMAGE_SIZE,
    SIZES,
    SUPERSAMPLING,
    Colour,
    Form,
    Scene,
    Sprite,
    paint_sprite,
)

if TYPE_CHECKING:
    from PIL import Image

MOST_WORDS = 22  # that the small text encoder reads
SMALLEST, LARGEST = 4.3, 28.0  # radius in pixels
SMALLEST_PATTERNED = 8.0
SIZE_BOUND = math.sqrt(SIZES["small"] * SIZES["large"])  # between a small and a large sprite
WHOLE = 0.45  # share of prompts that name all there is
OPENINGS = (
    "a photo of", "a sketch of", "an illustration of", "a photograph of", "a render of", "show me",
    "draw me", "please make", "i want", "there is", "this is",
)  # fmt: skip
ENDINGS = (
    "masterpiece", "best quality", "8k", "hd", "detailed", "very detailed", "intricate", "sharp", "digital art",
    "cinematic light", "ultra realistic", "award winning", "by a famous artist", "unreal engine", "soft light", "vivid",
    "16k", "high resolution", "focus", "bokeh", "concept art", "popular on the web", "wallpaper", "no text",
)  # fmt: skip


def draw_varied_photo(sprite: Sprite, rng: Random) -> "Image.Image":
    """RGB image of a sprite alone as others might draw it: any size, place, turn, proportions, edges, near colours.

    The colour of `sprite` stays the named one that is nearest, and its size the one whose radius is nearer.
    """
    from PIL import Image, ImageFilter

    ground = BACKGROUNDS[rng.choice(list(BACKGROUNDS))] if rng.random() < 0.5 else _pale(rng)
    paint = _near(sprite, ground, rng) if rng.random() < 0.6 else COLOURS[sprite.colour]
    radius = SIZES[sprite.size] * rng.uniform(0.9, 1.1)
    if rng.random() < 0.6:
        low, high = (SMALLEST, SIZE_BOUND) if sprite.size == "small" else (SIZE_BOUND, LARGEST)
        if sprite.pattern != "plain":  # on less, no pattern can be seen
            low = max(low, SMALLEST_PATTERNED)
        radius = math.exp(rng.uniform(math.log(low), math.log(high)))
    form = draw_form_at_random(sprite.shape, rng)
    middle = IMAGE_SIZE / 2
    reach = max(0.0, middle - radius - rng.uniform(0, 3))
    if rng.random() < 0.5:  # near the middle
        reach = min(reach, 8.0)
    centre = middle + rng.uniform(-reach, reach), middle + rng.uniform(-reach, reach)
    if rng.random() < 0.2:  # in a corner
        centre = tuple(middle + rng.choice((-1, 1)) * reach for _ in range(2))
    image = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, ground)
    paint_sprite(image, sprite, centre, radius, paint, form)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(SUPERSAMPLING * rng.uniform(0.3, 1.7)))
    return image.reduce(SUPERSAMPLING)


def draw_form_at_random(shape: str, rng: Random) -> Form:
    """A `Form` in which a shape is still what it is called."""
    turn = rng.uniform(-50, 50) if rng.random() < 0.5 else rng.gauss(0, 3)
    away, angle = rng.uniform(0.42, 0.75), rng.uniform(-1.0, 0.4)
    return Form(
        turn=0.0 if shape in ("circle", "ring") else turn,
        width=rng.uniform(0.8, 1.0) if rng.random() < 0.3 else 1.0,
        star=(rng.choice((5, 5, 5, 5, 6, 6, 7, 8)), rng.uniform(0.3, 0.58)),
        hole=rng.uniform(0.3, 0.68),
        moon=(away * math.cos(angle), away * math.sin(angle), rng.uniform(0.7, 0.95)),
        arm=rng.uniform(0.2, 0.42),
        square=rng.uniform(0.75, 0.95),
        triangle=(rng.uniform(0.75, 1.05), rng.uniform(0.4, 0.9)),
        rim=rng.uniform(0.4, 1.4) if rng.random() < 0.15 else 0.0,
    )


def _near(sprite, ground, rng) -> Colour:
    """A paint whose nearest named colour is the sprite's, and that can be told from the ground."""
    named = COLOURS[sprite.colour]
    for _ in range(50):
        other = (
            COLOURS[rng.choice(list(COLOURS))]
            if rng.random() < 0.6
            else tuple(rng.randrange(256) for _ in range(3))
        )
        share = rng.uniform(0, 0.5)
        paint = tuple(round((1 - share) * a + share * b) for a, b in zip(named, other, strict=True))
        nearest = min(COLOURS, key=lambda name: math.dist(COLOURS[name], paint))
        if nearest == sprite.colour and math.dist(paint, ground) > CONTRAST:
            return paint
    return named


def _pale(rng) -> Colour:
    """Light, or grey to brown as the darkest of BACKGROUNDS."""
    if rng.random() < 0.2:
        return tuple(rng.randrange(90, 256) for _ in range(3))
    channels = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.8, 1.0))
    return tuple(round(255 * channel) for channel in channels)


# Words ------------------------------------------------------------------------------------------------------------


def type_scene(scene: Scene, rng: Random) -> tuple[str, str]:
    """(a prompt as people type it, the caption that says what it names) of a scene of one to four sprites."""
    if rng.random() < WHOLE:
        caption = text = scene.caption
        if (
            len(scene.sprites) == 4 and rng.random() < 0.5
        ):  # with the articles that the short caption leaves out
            text = f"{' and '.join(map(str, scene.sprites))} on a {scene.background} background"
        return _spoil(text, rng), caption
    share, sides = rng.choice((0.3, 0.6, 0.9)), rng.random()
    grounded = sides < 0.6
    kept = [
        [(name, getattr(sprite, name)) for name in ("size", "colour", "pattern") if rng.random() < share]
        for sprite in scene.sprites
    ]
    caption = _say(
        [
            " ".join([*(word for _, word in names), s.shape])
            for names, s in zip(kept, scene.sprites, strict=True)
        ],
        scene.background if grounded else None,
    )
    parts = []
    for names, sprite in zip(kept, scene.sprites, strict=True):
        words = [word for _, word in names]
        if rng.random() < 0.4:
            rng.shuffle(words)
        article = rng.random() < 0.6
        form = rng.random()
        if form < 0.75 or not words:
            text = " ".join([*words, sprite.shape])
        elif form < 0.9:
            text, article = f"{sprite.shape}, {', '.join(words)}", False
        else:
            text = f"{sprite.shape}, {' and '.join(words)}"
        parts.append(with_article(text) if article else text)
    text = rng.choice((" and ", " and ", ", ")).join(parts)
    if grounded:
        ground = f"{scene.background} background"
        text = rng.choice((
            f"{text} on a {ground}", f"{text} on a {ground}", f"{text} on {ground}", f"{text}, {ground}",
            f"{ground}, {text}", f"on a {ground} {text}", f"{text}, on a {ground}",
        ))  # fmt: skip
    return _spoil(text, rng), caption


def _say(sprites: Sequence[str], background):
    """A caption of at most MOST_WORDS words: without articles if it has to be."""
    ground = "" if background is None else f" on a {background} background"
    caption = " and ".join(map(with_article, sprites)) + ground
    if len(caption.split()) > MOST_WORDS:
        caption = " and ".join(sprites) + ground.replace(" a ", " ")
    return caption


def with_article(words: str) -> str:
    """ "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _spoil(text, rng):
    """The text with what people add: an opening, endings, foreign words, a typing error, a full stop."""
    words = text.split(" ")
    if rng.random() < 0.25:
        words = _mistype(words, rng)
    text = " ".join(words)
    if rng.random() < 0.2:
        text = f"{rng.choice(OPENINGS) if rng.random() < 0.8 else _nonsense(rng)} {text}"
    chance = rng.random()
    if chance < 0.25:
        endings = [
            rng.choice(ENDINGS) if rng.random() < 0.7 else _nonsense(rng) for _ in range(rng.randint(1, 4))
        ]
        text = ", ".join([text, *endings])
    elif chance < 0.45:
        text += rng.choice((".", ".", "!", " ."))
    return text


def _nonsense(rng):
    """Words of any letters."""
    vowels, others = "aeiouy", "".join(sorted(set(string.ascii_lowercase) - set("aeiouy"))) + "0123456789"
    words = []
    for _ in range(rng.randint(1, 3)):
        length = rng.randint(1, 10)
        words.append("".join(rng.choice(vowels if rng.random() < 0.4 else others) for _ in range(length)))
    return " ".join(words)


def _mistype(words, rng):
    """One of the words of four letters or more with a letter lost, doubled, changed, added or changed over with the next."""
    long = [number for number, word in enumerate(words) if len(word) > 3]
    if not long:
        return words
    number = rng.choice(long)
    word = words[number]
    place = rng.randrange(len(word) - 1)
    letter = rng.choice(string.ascii_lowercase)
    spoiled = rng.choice((
        word[:place] + word[place + 1 :],
        word[:place] + word[place] + word[place:],
        word[:place] + letter + word[place + 1 :],
        word[:place] + letter + word[place:],
        word[:place] + word[place + 1] + word[place] + word[place + 2 :],
        word[:place] + word[place + 1] + word[place] + word[place + 2 :],
    ))  # fmt: skip
    return [*words[:number], spoiled, *words[number + 1 :]]
