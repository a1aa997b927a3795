"""Maps for people: over the image that they are of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

if TYPE_CHECKING:
    import torch

SHORTEST = 192  # pixels of a panel's shorter side, at least: labels have to be read
BAR = 18  # pixels of a label
COLOURS = ((230, 60, 50), (50, 110, 235), (40, 165, 70), (235, 165, 20), (160, 70, 200), (20, 170, 185))
PLAIN = (90, 90, 90)  # of words and the null token


def draw_overlay(image: PIL.Image.Image, maps: "torch.Tensor", labels: Sequence[str]) -> PIL.Image.Image:
    """The image, and next to it a panel for each source with the places that come from it.

    Args:
        image: PIL image, RGB.
        maps: (sources, h, w), floats in [0, 1].
        labels: a name for each source.

    Returns:
        RGB PIL image: panels in a row, each with its label below; small images are enlarged to SHORTEST pixels.
    """
    scale = max(1, -(-SHORTEST // min(image.size)))
    image = image.convert("RGB").resize(
        (image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST
    )
    panels = [(image, "image", PLAIN)]
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.5 + 110
    n_images = len(labels) - 2
    for number, (one, label) in enumerate(zip(maps.float().numpy(), labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)] if number < n_images else PLAIN
        share = PIL.Image.fromarray(one).resize(image.size, PIL.Image.Resampling.BILINEAR)
        share = np.asarray(share).clip(0, 1)[..., None]
        mixed = grey * (1 - 0.8 * share) + np.array(colour, dtype=np.float32) * 0.8 * share
        panels.append((PIL.Image.fromarray(mixed.round().astype(np.uint8)), label, colour))
    width, height = image.size
    sheet = PIL.Image.new("RGB", (width * len(panels), height + BAR), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default()
    for index, (panel, label, colour) in enumerate(panels):
        sheet.paste(panel, (index * width, 0))
        draw.text((index * width + 4, height + 3), label[:40], fill=colour, font=font)
    return sheet
