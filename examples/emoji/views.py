"""Views of a subject: placed on a ground, its hue turned, with words for what is seen.

The grounds are textures of scikit-image's wheel under CC0 (`skimage.data.brick`, `grass` and `gravel`, which are grey and
get a tint here) and plain colours.
"""

from functools import cache

import numpy as np
import skimage.data
from PIL import Image
from skimage.color import rgb2lab

TURNS = (0, 60, 120, 180, 240, 300)  # degrees of hue
TINTS = {"brick": (230, 150, 120), "grass": (150, 225, 90), "gravel": (215, 210, 205)}
PLAIN = {
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "grey": (128, 128, 128),
    "red": (205, 45, 45),
    "orange": (240, 145, 40),
    "yellow": (240, 215, 70),
    "green": (60, 160, 75),
    "blue": (50, 95, 200),
    "purple": (130, 70, 180),
    "pink": (240, 160, 195),
}
# ground -> the words for it
GROUNDS = {name: f"on {name}" for name in TINTS} | {name: f"on a {name} background" for name in PLAIN}
# what the colour words of captions mean, for subjects; several shades may have one word
SHADES = (
    ("red", (200, 30, 40)),
    ("orange", (245, 130, 30)),
    ("yellow", (250, 205, 50)),
    ("green", (60, 160, 60)),
    ("green", (140, 200, 80)),
    ("blue", (40, 90, 200)),
    ("blue", (90, 180, 235)),
    ("purple", (120, 70, 180)),
    ("pink", (245, 130, 175)),
    ("brown", (125, 75, 45)),
    ("brown", (190, 140, 100)),
    ("black", (35, 35, 40)),
    ("grey", (125, 125, 130)),
    ("white", (235, 235, 240)),
)
SECOND = 0.25  # share of a subject from which a second colour is said
LONG = 1.5  # ratio of sides from which a subject is called tall or wide


def view(subject, ground, size, rng, turn=0, scale=(0.6, 0.95), tilt=15.0):
    """An RGB image, `size` x `size`, of a subject somewhere on a ground.

    Args:
        subject: RGBA PIL image.
        ground: of GROUNDS.
        rng: random.Random; decides place, size, mirroring, tilt and the piece of the ground.
        turn: degrees of hue.
        scale: of the subject, in sides of the image: from, to.
        tilt: degrees, at most, to either side.
    """
    canvas = _cut_ground(ground, size, rng)
    side = round(size * rng.uniform(*scale))
    if turn:
        subject = turn_hue(subject, turn)
    if rng.random() < 0.5:
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    subject = subject.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC)
    subject = subject.resize((side, side), Image.Resampling.LANCZOS)
    canvas.paste(subject, (rng.randint(0, size - side), rng.randint(0, size - side)), subject)
    return canvas


def turn_hue(image, degrees):
    """An RGBA image with its hue turned; greys stay as they are."""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    hue = hue.point(lambda byte: (byte + round(degrees / 360 * 256)) % 256)
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    turned.putalpha(image.getchannel("A"))
    return turned


def say_looks(image):
    """What an RGBA image looks like, in words: tall or wide if it is, then one or two colours. "tall red and white"."""
    pixels = np.asarray(image.resize((24, 24), Image.Resampling.BOX))
    opaque = pixels[..., 3] >= 128
    if not opaque.any():  # faint all over
        opaque = pixels[..., 3] >= pixels[..., 3].max()
    rows, columns = (np.ptp(np.flatnonzero(opaque.any(axis))) + 1 for axis in (1, 0))
    words = ["tall"] if rows >= LONG * columns else ["wide"] if columns >= LONG * rows else []
    colours = rgb2lab(pixels[opaque][:, :3])
    shades = rgb2lab(np.array([shade for _, shade in SHADES], dtype=np.uint8))
    nearest = np.linalg.norm(colours[:, None] - shades[None], axis=-1).argmin(1)
    shares = {}
    for number in nearest:
        name = SHADES[number][0]
        shares[name] = shares.get(name, 0) + 1 / len(nearest)
    first, *others = sorted(shares, key=shares.get, reverse=True)
    words.append(first)
    if others and shares[others[0]] >= SECOND:
        words += ["and", others[0]]
    return " ".join(words)


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _cut_ground(ground, size, rng):
    if ground in PLAIN:
        return Image.new("RGB", (size, size), PLAIN[ground])
    texture = _texture(ground)
    side = rng.randint(texture.width // 3, texture.width // 2)
    left, top = rng.randint(0, texture.width - side), rng.randint(0, texture.height - side)
    return texture.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))


@cache
def _texture(name):
    # every four pixels one: finer grain is lost at our size
    grey = Image.fromarray(getattr(skimage.data, name)()).reduce(4)
    values = np.asarray(grey, dtype=float)[..., None] / 160  # its lights stay below white, with the tint
    return Image.fromarray((values.clip(0, 1.1) * np.array(TINTS[name])).clip(0, 255).astype(np.uint8))
