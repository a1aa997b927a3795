"""What a map says at a glance: the region of an image."""

import torch
from torch.nn.functional import interpolate

SHARE = 2 / 3  # of a place that is an image's: it draws twice as much of it as all others together


def regions_of(maps: torch.Tensor, labels: list[str], size: tuple[int, int] | None = None) -> torch.Tensor:
    """(sources, h, w) maps of an image and their labels -> (images, H, W) bool: the places that each image of the prompt draws.

    Args:
        size: (H, W) of the result, in pixels for instance; None leaves that of the maps.
    """
    images = maps[: len(labels) - 2].float()  # words and the null token come last
    if size is not None and len(images):
        images = interpolate(images[None], size=size, mode="bilinear", align_corners=False)[0]
    return images > SHARE
