"""Images to be looked at: several as one, small ones enlarged."""

import math
from collections.abc import Sequence

import PIL.Image
from diffusers.utils import make_image_grid


def grid_of(images: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Images of one size -> one image, as square as can be; places left over are white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = PIL.Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)


def enlarge(image: PIL.Image.Image, times: int) -> PIL.Image.Image:
    """A PIL image with sides so many times as long; its pixels become squares."""
    return image.resize((image.width * times, image.height * times), PIL.Image.Resampling.NEAREST)
