"""Boxes in fractions of an image: what places an image of the prompt. Without torch, for the command line."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

Box = tuple[float, float, float, float]  # left, top, right, bottom


def read_box(box: Sequence[Any], name: str) -> Box:
    """(left, top, right, bottom) in fractions of width and height, checked; `name` begins an error."""
    is_number = [isinstance(side, Real) and not isinstance(side, bool) for side in box]
    if len(box) != 4 or not all(is_number) or not all(map(math.isfinite, box)):
        raise ValueError(
            f"{name} is {short(box)}. Expected four numbers, (x0, y0, x1, y1): left, top, right and bottom in fractions of width "
            "and height."
        )
    x0, y0, x1, y1 = map(float, box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(
            f"{name} is {short(tuple(box))}. Expected fractions of width and height from 0 to 1 with x0 < x1 and y0 < y1: (0, 0, "
            "0.5, 1) is the left half."
        )
    return x0, y0, x1, y1


def read_region(text: str, name: str = "region") -> Box | None:
    """What people write for a region, "0,0,0.5,1" or "none" -> a box or None. ValueError, which begins with `name`."""
    if text.strip().lower() == "none":
        return None
    try:
        box = tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError(
            f"{name} {short(text)} was given. Expected left,top,right,bottom in fractions of width and height, such as 0,0,0.5,1 for "
            "the left half, or none."
        ) from None
    return read_box(box, name)


def region_text(region: Box | None) -> str:
    """The other way round: what `read_region` reads."""
    return "none" if region is None else ",".join(map(str, region))


def short(value: Any, length: int = 80) -> str:
    """What was given, in an error: never more than `length` characters of it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
