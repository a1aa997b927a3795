"""What every source of training data gives: samples, and the protocol by which the mixture asks for them.

Bytes that someone else wrote become images here, or a BadSample: nothing trusts its input.
"""

import base64
import binascii
import codecs
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image

from ..processing_kosmos_g import MOST_IMAGE_BYTES, open_image

# What Pillow decodes by itself: EPS, for one, would start Ghostscript on the file's program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# An image takes 66 tokens of the prompt (64 states and two marks) and a token is about four characters of English.
IMAGE_LENGTH = 264
# what editors write in front of a text, longest first: one of UTF-16 begins that of UTF-32
BYTE_ORDER_MARKS: dict[bytes, str] = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
BYTE_ORDER_MARK = "\ufeff"
OBJECT = re.compile(r" ?<\S+ object at 0x[0-9a-f]+>")  # what Pillow calls bytes without a name


@dataclass(frozen=True)
class Sample:
    """One piece of training data, before any model's preprocessing.

    Attributes:
        key: says where it came from, for messages: "captions/0007.tsv:17".
        prompt: strings and RGB images in reading order; a caption is `("a dog",)`.
        target: RGB image that stage 3 learns to draw; None if there is none.
        caption: plain words for the target, which stage 2 gives to CLIP; None if there are none.
    """

    key: str
    prompt: tuple[str | PIL.Image.Image, ...]
    target: PIL.Image.Image | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", printable(self.key))


class BadSample(Exception):
    """A sample that cannot be used. The mixture counts it and takes another in its place.

    Args:
        cause: a short word to count it under: "image", "row", "caption", "shard".
        message: what is wrong with which sample.
    """

    cause: str
    message: str

    def __init__(self, cause: str, message: str):
        super().__init__(cause, message)
        self.cause, self.message = cause, printable(message)

    def __str__(self) -> str:
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
        """Rough length of the prompt in characters, an image counting `IMAGE_LENGTH`. Cheap: no image is decoded."""

    def read(self, index: int, rng: random.Random) -> Sample:
        """Sample number `index`; every random choice within it is drawn from `rng`. Raises BadSample."""


def printable(text: str) -> str:
    """A text that any log and terminal takes: bytes of a name that are not UTF-8 and control characters become `\\x..`."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def find_encoding(start: bytes) -> tuple[str, int]:
    """The name of a text's encoding by its first bytes (four are enough), and the length of its byte order mark.

    Without a mark it is UTF-8.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode_text(data: bytes, key: str) -> str:
    """Bytes of a text file -> its text: UTF-8, or what its byte order mark says, which is left out.

    Args:
        key: names the sample in the error.

    Raises:
        BadSample: cause "row"; it is in another encoding.
    """
    encoding, length = find_encoding(data[:4])
    try:
        return data[length:].decode(encoding)
    except UnicodeDecodeError as error:
        raise BadSample(
            "row", f"{key} has text that is not {encoding.upper()} ({error}). Save it as UTF-8"
        ) from error


def clean_text(text: str, key: str) -> str:
    """A text without a byte order mark at its beginning.

    Raises:
        BadSample: cause "row"; it holds what no text does, such as the zeros of UTF-16 that was read as UTF-8.
    """
    text = text.removeprefix(BYTE_ORDER_MARK)
    if "\0" in text:
        raise BadSample(
            "row",
            f"{key} has text with NUL characters, such as UTF-16 without its byte order mark. Save it as UTF-8",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample("row", f"{key} has text with half a character ({error.reason})") from error
    return text


def decode_image(data: bytes, key: str) -> PIL.Image.Image:
    """Bytes of an image file -> RGB PIL image, upright.

    Args:
        data: bytes of a file in one of `FORMATS`, at most `MOST_IMAGE_BYTES`.
        key: names the sample in the error.

    Raises:
        BadSample: cause "image"; too many bytes or pixels, damaged, or not an image.
    """
    if len(data) > MOST_IMAGE_BYTES:
        raise BadSample("image", f"{key} has an image of {len(data):,} bytes, over {MOST_IMAGE_BYTES:,}")
    try:
        return open_image(PIL.Image.open(io.BytesIO(data), formats=FORMATS), "the image")
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything
        reason = OBJECT.sub("", str(error))  # the same bytes give the same message, in every process
        raise BadSample("image", f"{key} has an image that cannot be read ({reason})") from error


def decode_base64(text: bytes, key: str) -> bytes:
    """Base64 text (bytes) of an image file -> its bytes. Raises BadSample ("image")."""
    if len(text) > MOST_IMAGE_BYTES // 3 * 4:
        raise BadSample("image", f"{key} has an image of {len(text):,} base64 characters, which is too many")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image", f"{key} has an image that is not base64 ({error})") from error
