"""What every source of training data gives: samples, and the protocol by which the mixture asks for them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image


@dataclass(frozen=True)
class Sample:
    """One piece of training data, before any model's preprocessing.

    Attributes:
        key: says where it came from, for messages: "captions/0007.tsv:17".
        prompt: strings and RGB pictures in reading order; a caption is `("a dog",)`.
        target: RGB picture that stage 3 learns to draw; None if there is none.
        caption: plain words for the target, which stage 2 gives to CLIP; None if there are none.
    """

    key: str
    prompt: tuple[str | PIL.Image.Image, ...]
    target: PIL.Image.Image | None = None
    caption: str | None = None


class BadSample(Exception):
    """A sample that cannot be used. The mixture counts it and takes another in its place.

    Args:
        cause: a short word to count it under: "image", "row", "caption", "shard".
        message: what is wrong with which sample.
    """

    def __init__(self, cause, message):
        super().__init__(cause, message)
        self.cause, self.message = cause, message

    def __str__(self):
        return f"{self.cause}: {self.message}"


class FilteredSample(BadSample):
    """A sound sample that a filter leaves out (too small, too long). Counted apart: the limit for bad data ignores it."""


class Source(Protocol):
    """Samples that can be read in any order, as often as wanted, from any process.

    Attributes:
        name: short, for messages and counts.
        groups: how many samples each file or shard holds, in order; their sum is the length. The mixture shuffles the
            groups and reads a few of them at a time.
    """

    name: str
    groups: Sequence[int]

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Rough length of the prompt in characters, a picture counting `IMAGE_LENGTH`. Cheap: no picture is decoded."""

    def read(self, index: int, rng: random.Random) -> Sample:
        """Sample number `index`; every random choice within it is drawn from `rng`. Raises BadSample."""


# A picture takes 66 tokens of the prompt (64 states and two marks) and a token is about four characters of English.
IMAGE_LENGTH = 264
