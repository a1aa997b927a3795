"""Several images as one."""

import math

import PIL.Image
from diffusers.utils import make_image_grid


def grid_of(images):
    """Images of one size -> one image, as square as can be; places left over are white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = PIL.Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)
