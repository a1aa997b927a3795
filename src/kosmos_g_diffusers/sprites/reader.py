"""Says what an image of the miniature world shows: the scorer of images that a trained model drew.

Rules alone, nothing learned: it knows the world's drawing and nothing of any model. It expects soft edges, noise, colours
a little off, wobbly outlines and sprites in any place.

A pixel is taken for a mixture of three colours: the backdrop, the sprite's paint and black ink. What is not backdrop is
the sprite's cover, and its outline gives shape and size; where the ink lies within the cover gives the pattern.
"""

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image

from .world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    INK,
    SHAPES,
    SIZES,
    SUPERSAMPLING,
    Scene,
    Sprite,
    paint_sprite,
)

# distance in RGB from the backdrop of what does not belong to it; the world's colours keep 88 from its backgrounds
CONTRAST = 45.0
SMALLEST_AREA = 40  # pixels that a sprite has at least; the smallest of the world have 145
WIDEST = 35  # pixels; what is wider is two sprites that touch
WINDOW = 48  # pixels, side of the square around a sprite's centre of mass in which outlines are compared
RADII = tuple(8.5 * 1.05**k for k in range(15))  # in pixels, of the outlines: SIZES and a bit beyond
HALF_PERIOD = 3  # pixels from the middle of a stripe to the middle of a gap, about


def read(image: Image.Image | np.ndarray) -> Scene:
    """What an image shows: always the best guess, however odd the image is.

    Args:
        image: PIL image of 64 x 64 pixels or uint8 array (64, 64, 3), RGB in [0, 255].

    Returns:
        `Scene` of the sprites found from left to right. There may be none, as in an empty image, or more than two.

    Raises:
        ValueError: if the image has another size or kind of numbers.
    """
    background, sprites = _look(image)
    return Scene(tuple(sprite for sprite, _ in sprites), background)


def find_sprites(image: Image.Image | np.ndarray) -> list[tuple[Sprite, np.ndarray]]:
    """The sprites that `read` sees, each with where it is: (64, 64) float32 in [0, 1], how surely a pixel is its own."""
    return _look(image)[1]


def _look(image):
    """Name of the background, and the sprites from left to right with their pixels."""
    pixels = _to_array(image)
    top, bottom, left, right = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
    border = np.concatenate([side.reshape(-1, 3) for side in (top, bottom, left, right)])
    backdrop = np.median(border, axis=0)
    noise = 1.48 * np.median(np.abs(border - backdrop))  # standard deviation, as if it were normal
    contrast = max(CONTRAST, 3.2 * noise)

    distance = np.linalg.norm(pixels - backdrop, axis=-1)
    # squared: what is nearly backdrop counts for little, or the noise of a backdrop close to a mixture would add up
    presence = (distance / (1.33 * contrast)).clip(0, 1) ** 2
    boxes = _find_boxes(_despeckle(distance > contrast), presence)
    own = [presence * place for place in _find_places(boxes)]
    sprites = [(_read_sprite(pixels, backdrop, pixels_of_it), pixels_of_it) for pixels_of_it in own]
    background = min(BACKGROUNDS, key=lambda name: np.linalg.norm(backdrop - BACKGROUNDS[name]))
    return background, sprites


def _to_array(image):
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"The image has shape {array.shape} and numbers of type {array.dtype}. Expected a PIL image of "
            f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels or a uint8 array of shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3): resize a "
            f"PIL image with image.resize(({IMAGE_SIZE}, {IMAGE_SIZE})), scale an array to [0, 255] and use astype."
        )
    return array.astype(np.float32)


# Where the sprites are --------------------------------------------------------------------------------------------


def _despeckle(mask):
    """Majority of each pixel's 3 x 3 neighbourhood."""
    padded = np.pad(mask, 1).astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] >= 5


def _find_boxes(foreground, presence):
    """Boxes (top, bottom, left, right) from left to right: cut at empty columns, then rows, then columns again."""
    boxes = []
    for left, right in _find_runs(foreground.any(0), gap=1):
        # pale stripes may leave rows empty, but never four
        for top, bottom in _find_runs(foreground[:, left:right].any(1), gap=4):
            for first, last in _find_runs(foreground[top:bottom, left:right].any(0), gap=1):
                boxes += _part_touching(presence, (top, bottom, left + first, left + last))
    boxes = [box for box in boxes if foreground[box[0] : box[1], box[2] : box[3]].sum() >= SMALLEST_AREA]
    return sorted(boxes, key=lambda box: box[2] + box[3])


def _part_touching(presence, box):
    """The box, or two if it is too wide for one sprite: cut at the emptiest column about the middle."""
    top, bottom, left, right = box
    if right - left <= WIDEST:
        return [box]
    margin = (right - left) // 4
    cut = left + margin + int(presence[top:bottom, left + margin : right - margin].sum(0).argmin())
    return [(top, bottom, left, cut), (top, bottom, cut, right)]


def _find_runs(occupied, gap):
    """(first, one past the last) of the runs of True; less than `gap` False in a row do not end a run."""
    positions = np.flatnonzero(occupied)
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > gap) + 1)
    return [(run[0], run[-1] + 1) for run in runs if run.size]


def _find_places(boxes, margin=2):
    """(64, 64) bool for each box: the pixels its sprite may cover; soft edges reach out of the box, not into another."""
    owner = np.full((IMAGE_SIZE, IMAGE_SIZE), -1)
    for grown in (margin, 0):
        for index, (top, bottom, left, right) in enumerate(boxes):
            owner[max(top - grown, 0) : bottom + grown, max(left - grown, 0) : right + grown] = index
    return [owner == index for index in range(len(boxes))]


# What they are ----------------------------------------------------------------------------------------------------


class _Outlines(NamedTuple):
    """How the world draws each shape in each of RADII, one row each, in windows (WINDOW, WINDOW) laid flat."""

    shapes: tuple
    radii: np.ndarray
    covers: np.ndarray
    rims: np.ndarray  # the part of the cover that is ink if the sprite is bordered
    # by how much the share of ink in the rim exceeds that within, midway between bordered and dotted sprites
    rim_excess: np.ndarray


@cache
def _draw_outlines():
    rows = []
    for shape, radius in product(SHAPES, RADII):
        cover, rim = _draw_window(shape, "bordered", radius)
        _, dots = _draw_window(shape, "dotted", radius)
        excess = sum(np.subtract(*_share_ink(ink, cover, rim)) for ink in (rim, dots)) / 2
        rows.append((shape, radius, cover.ravel(), rim.ravel(), excess))
    shapes, *columns = zip(*rows, strict=True)
    return _Outlines(shapes, *map(np.array, columns))


def _draw_window(shape, pattern, radius):
    backdrop, paint = BACKGROUNDS["white"], COLOURS["green"]
    image = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, backdrop)
    sprite, middle = Sprite(shape, "green", pattern, "large"), (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    paint_sprite(image, sprite, middle, radius, paint)
    pixels = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32)
    return _centre(*_unmix(pixels, np.array(backdrop), np.array(paint)))


def _read_sprite(pixels, backdrop, presence):
    """`Sprite` whose pixels are those of `presence`, (64, 64) in [0, 1]."""
    colour, paint = _read_colour(pixels, presence)
    cover, ink = (presence * share for share in _unmix(pixels, backdrop, paint))
    cover, ink = _centre(cover, ink)
    outlines = _draw_outlines()
    shared = outlines.covers @ cover.ravel()
    union = (outlines.covers**2).sum(1) + (cover**2).sum() - shared
    best = int((shared / union).argmax())
    size = min(SIZES, key=lambda name: abs(np.log(outlines.radii[best] / SIZES[name])))
    outline, rim = (windows[best].reshape(ink.shape) for windows in (outlines.covers, outlines.rims))
    pattern = _read_pattern(ink, outline, rim, outlines.rim_excess[best])
    return Sprite(outlines.shapes[best], colour, pattern, size)


def _read_colour(pixels, presence):
    """Name of the colour that most pixels are, darkened by ink up to half, and what that paint is in this image."""
    weights = presence[presence > 0.5]
    pixels = pixels[presence > 0.5] - np.array(INK)
    paints = np.array(list(COLOURS.values())) - np.array(INK)
    shares = (pixels @ paints.T / (paints**2).sum(1)).clip(0.5, 1)
    distance = np.linalg.norm(pixels[:, None] - shares[..., None] * paints, axis=-1)
    votes = weights[:, None] * shares * np.exp(-((distance / 35) ** 2))
    best = int(votes.sum(0).argmax())
    # the purest pixels tell the paint
    purity = votes[:, best] * shares[:, best] ** 6 + 1e-9
    return list(COLOURS)[best], np.average(pixels, axis=0, weights=purity) + np.array(INK)


def _unmix(pixels, backdrop, paint):
    """Share in [0, 1] of each pixel that is covered (paint or ink), and share that is ink.

    That of ink may be below 0: where the paint is close to a mixture of backdrop and ink it is noisy, and its mean over
    an area is near the truth only if the noise keeps its sign.
    """
    ends = np.stack([paint, np.array(INK)]) - backdrop
    shares = (pixels - backdrop) @ np.linalg.pinv(ends)
    return shares.clip(0).sum(-1).clip(0, 1), shares[..., 1].clip(-1, 1)


def _centre(cover, ink):
    """The windows (WINDOW, WINDOW) of both around the cover's centre of mass, which is between pixels."""
    steps, half = np.arange(IMAGE_SIZE) + 0.5, WINDOW // 2
    weights = cover + 1e-6  # a strange image may cover nothing
    centre = [float(weights.sum(1 - axis) @ steps / weights.sum()) for axis in (0, 1)]
    (row, column), (y, x) = map(int, centre), (place % 1 for place in centre)
    windows = []
    for plane in (cover, ink):
        # from half a window before the centre to half a window behind it, and a pixel more to interpolate with
        plane = np.pad(plane, half + 1)[row + 1 : row + WINDOW + 2, column + 1 : column + WINDOW + 2]
        plane = (1 - y) * plane[:-1] + y * plane[1:]
        windows.append((1 - x) * plane[:, :-1] + x * plane[:, 1:])
    return windows


def _share_ink(ink, outline, rim):
    """Share of ink in the rim and within it."""
    within = outline - rim
    return (ink * rim).sum() / rim.sum(), (ink * within).sum() / within.sum()


def _read_pattern(ink, outline, rim, rim_excess):
    in_rim, within = _share_ink(ink, outline, rim)
    down = _vary(ink, outline)
    across = _vary(ink.T, outline.T)
    if within > 0.12 and down > 0.7 * (down + across):  # dots and borders: half
        return "striped"
    if in_rim - within > 0.7 * rim_excess:  # 0.7, since blur takes ink from a rim to both its sides
        return "bordered"
    return "plain" if within < 0.09 else "dotted"


def _vary(ink, outline):
    """How much the ink within the outline changes from a row to that half a period below."""
    both = outline[HALF_PERIOD:] * outline[:-HALF_PERIOD]
    return (both * (ink[HALF_PERIOD:] - ink[:-HALF_PERIOD]) ** 2).sum() / both.sum()
