"""How alike the subjects of two images are in colour: histograms over CIELAB in which what looks like background counts little.

There is no mask. What stands at the border of an image is taken for background, and so is every pixel whose colour the
border has; what is left counts more in the middle than at the sides.
"""

import numpy as np
import PIL.Image

SIDE = 64  # pixels that an image is reduced to; its shape does not matter for a histogram
BORDER = 4  # width of the frame that is background
# border pixels of a colour that make it background: some, since a subject may touch the border
NEIGHBOURS = 20
CONTRAST = 12.0  # distance in CIELAB from which a colour is no longer the background's
SPREAD = 0.35  # of the weight over the image, in sides
LIGHTNESS_STEP, COLOUR_STEP = 25.0, 16.0  # between bins; lightness is coarser, for it changes with the light
LIGHTNESS_BINS, COLOUR_BINS = 5, 15  # 0 to 100, and -112 to 112: all of sRGB
# IEC 61966-2-1, white point D65
TO_XYZ: np.ndarray = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def colour_histogram(image: PIL.Image.Image) -> np.ndarray:
    """Histogram of the colours of an image's subject, as a vector whose inner products compare.

    Args:
        image: RGB PIL image.

    Returns:
        (D,) float32 of unit length, the square roots of the histogram: the inner product of two of them is the
        Bhattacharyya coefficient, 1 for equal histograms and 0 for those that share nothing.
    """
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), PIL.Image.Resampling.BOX))
    lab = as_lab(pixels)
    histogram = _fill(lab.reshape(-1, 3), _weigh_foreground(lab).reshape(-1))
    return np.sqrt(histogram / histogram.sum()).astype(np.float32)


def _weigh_foreground(lab):
    """(SIDE, SIDE, 3) colours -> (SIDE, SIDE) weights in [0, 1]."""
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    border = lab[~inside]
    distances = np.linalg.norm(lab.reshape(-1, 1, 3) - border[None], axis=-1)
    nearest = np.partition(distances, NEIGHBOURS, axis=1)[:, NEIGHBOURS].reshape(SIDE, SIDE)
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    place = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * SPREAD**2))
    # never nothing: an image of one colour is a subject of that colour
    return place * (1e-6 + nearest**2 / (nearest**2 + CONTRAST**2))


def as_lab(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) sRGB in [0, 255] -> (..., 3) CIELAB: lightness in [0, 100], two axes of colour around 0."""
    rgb = pixels / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ TO_XYZ.T / TO_XYZ.sum(1)
    cubic = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(cubic, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _fill(lab, weights):
    """(N, 3) colours and (N,) weights -> flat histogram. A colour is shared among the bins around it."""
    shape = (LIGHTNESS_BINS, COLOUR_BINS, COLOUR_BINS)
    middle = COLOUR_BINS // 2
    places = lab / (LIGHTNESS_STEP, COLOUR_STEP, COLOUR_STEP) + (0, middle, middle)
    places = np.clip(places, 0, np.array(shape) - 1)
    low = np.minimum(places.astype(int), np.array(shape) - 2)
    share = places - low
    histogram = np.zeros(shape)
    for corner in np.ndindex(2, 2, 2):
        index = low + corner
        part = np.prod(np.where(corner, share, 1 - share), axis=1)
        np.add.at(histogram, tuple(index.T), weights * part)
    return histogram.ravel()
