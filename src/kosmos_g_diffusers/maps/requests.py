"""What a call asks for: maps, a weight of binding, regions. All of it is checked here, before any model runs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from .boxes import Box, read_box, short

WORDS, NULL_TOKEN = "words", "null token"  # labels, behind those of the images


@dataclass(frozen=True)
class MapRequest:
    """The request of one call.

    Attributes:
        labels: for each prompt what its tokens are of: its images in reading order, WORDS, NULL_TOKEN. An image word is one
            image, called by its name; the others are "image 1", "image 2", ...
        regions: for each prompt and each of its images a (H, W) float32 tensor in [0, 1], or None.
        binding: weight of the guidance that gives each image a region of its own; 0 is none.
        return_maps: whether maps are returned.
    """

    labels: list[list[str]]
    regions: list[list[torch.Tensor | None]]
    binding: float
    return_maps: bool

    @classmethod
    def read(
        cls,
        prompts: Sequence[Sequence[Any]],
        image_words: Sequence[str],
        size: tuple[int, int],
        open_mask: Callable[..., PIL.Image.Image],
        return_maps: Any = False,
        binding: Any = 0.0,
        regions: Any = None,
    ) -> "MapRequest | None":
        """Check the keywords of a pipeline's call; None if they ask for nothing.

        Args:
            prompts: of `KosmosGProcessor.parse`.
            image_words: names that the tokenizer knows.
            size: (height, width) of the images that are drawn, in pixels.
            open_mask: of the processing module.
            return_maps, binding, regions: as the user gave them.

        Raises:
            TypeError, ValueError: what is given is not what it should be, named by prompt and image.
        """
        if not isinstance(return_maps, (bool, np.bool_)):
            raise TypeError(f"return_maps={short(return_maps)} was given. Expected True or False.")
        binding = read_binding(binding)
        labels = [[*_labels_of(prompt, image_words), WORDS, NULL_TOKEN] for prompt in prompts]
        counts = [len(row) - 2 for row in labels]
        read = [
            [
                _read_region(entry, f"regions of prompt {index}, image {number + 1}", size, open_mask)
                for number, entry in enumerate(row)
            ]
            for index, row in enumerate(_as_rows(regions, counts))
        ]
        # a single image has nothing to be kept apart from
        request = cls(labels, read, binding if max(counts) > 1 else 0.0, bool(return_maps))
        return request if request.return_maps or request.is_guided else None

    @property
    def is_guided(self) -> bool:
        """Whether the image is drawn in another way, and not only looked at."""
        return self.binding > 0 or any(region is not None for row in self.regions for region in row)


def read_binding(binding: Any) -> float:
    """A weight of binding, a number from 0 to 10. ValueError, TypeError for anything else."""
    is_number = isinstance(binding, (int, float, np.number)) and not isinstance(binding, (bool, np.bool_))
    if not is_number:
        raise TypeError(
            f"binding={short(binding)} was given. Expected a number from 0 (off) to 10, such as 1."
        )
    if not 0 <= binding <= 10:  # also for NaN
        raise ValueError(f"binding={binding} was given. Expected a number from 0 (off) to 10, such as 1.")
    return float(binding)


def _labels_of(prompt, image_words):
    """What the images of a parsed prompt are called, in reading order."""
    labels, number = [], 0
    pattern = "|".join(sorted(map(re.escape, image_words), key=len, reverse=True))
    for part in prompt:
        if not isinstance(part, str):
            number += 1
            labels.append(f"image {number}")
        elif pattern:
            labels += re.findall(pattern, part)
    return labels


def _as_rows(regions, counts):
    """regions in any of their forms -> a list of as many entries as images for each prompt."""
    if regions is None:
        return [[None] * count for count in counts]
    if not isinstance(regions, (list, tuple)):
        raise TypeError(
            f"regions is of type {type(regions).__name__}. Expected a list with one entry for each image of the prompt: (x0, y0, "
            "x1, y1), a mask, or None; for a batch a list of such lists."
        )
    is_nested = any(isinstance(row, (list, tuple)) and not _is_box(row) for row in regions)
    if not is_nested and len(counts) == 1:
        regions = [regions]
    elif len(regions) != len(counts) or not all(row is None or _is_row(row) for row in regions):
        raise ValueError(
            f"regions with {len(regions)} entries was given for {len(counts)} prompts. Expected a list for each prompt, with one "
            "entry for each of its images."
        )
    rows = [[None] * count if row is None else list(row) for row, count in zip(regions, counts, strict=True)]
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if len(row) != count:
            raise ValueError(
                f"{len(row)} regions were given for prompt {index}, which has {count} {'image' if count == 1 else 'images'}. Pass one "
                "entry for each image in reading order (an image word is one); None leaves an image free."
            )
    return rows


def _is_row(row):
    return isinstance(row, (list, tuple)) and not _is_box(row)


def _is_box(row):
    """Whether a list is one region and not the regions of a prompt: it holds numbers (or what is not a region either)."""
    return len(row) > 0 and all(isinstance(side, (int, float, np.number, str)) for side in row)


def _read_region(region, name, size, open_mask):
    if region is None:
        return None
    height, width = size
    if isinstance(region, (list, tuple)):
        return box_mask(read_box(region, name), height, width)
    if isinstance(region, (str, bytes)) or not (
        isinstance(region, (np.ndarray, torch.Tensor)) or hasattr(region, "getextrema")
    ):
        raise TypeError(
            f"{name} is of type {type(region).__name__}. Expected (x0, y0, x1, y1) in fractions, a mask of the image's size (a PIL "
            "image, an array or a tensor), or None."
        )
    shape = region.size[::-1] if hasattr(region, "getextrema") else tuple(region.shape[-2:])
    if isinstance(region, np.ndarray) and region.ndim == 3:
        shape = region.shape[:2]
    if tuple(shape) != (height, width):
        raise ValueError(
            f"{name} is a mask of {shape[-1]} x {shape[0]} pixels, and the image has {width} x {height}. Pass a mask of the image's "
            "size, or (x0, y0, x1, y1) in fractions."
        )
    mask = torch.from_numpy(np.asarray(open_mask(region, name), dtype=np.float32) / 255)
    if mask.max() < 0.5:
        raise ValueError(f"{name} is dark all over. Pass a mask that is white where the image is to be.")
    return mask


def box_mask(box: Box, height: int, width: int) -> torch.Tensor:
    """(height, width) float32 in [0, 1]: the share of each pixel that a box in fractions covers."""
    x0, y0, x1, y1 = box

    def cover(first, last, length):
        edges = torch.arange(length, dtype=torch.float64)
        return ((last * length - edges).clamp(0, 1) - (first * length - edges).clamp(0, 1)).float()

    return torch.outer(cover(y0, y1, height), cover(x0, x1, width))
