"""Images of strangers: checked by their headers, decoded one at a time on the whole server, and made small while they are.

A file of a few kilobytes may hold 40 million pixels, which take up to 600 MB while they are read. So what decodes holds
`DECODING`, and lets it go only when the image is as small as it is needed. What a header says is not believed either: tags
that lie over each other, tiles larger than the image and a thousand comments make Pillow take gigabytes or hours.
"""

import base64
import ctypes
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import unquote_to_bytes

import PIL.Image
from PIL import TiffImagePlugin

from ..provenance import UNMARKED, Marker
from .bodies import NOT_FETCHED
from .errors import FieldError
from .libraries import reading

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 20 * 2**20  # of a file
MAX_PIXELS = 40_000_000  # of an image with 8 bits a channel, before it is decoded
MAX_WIDE_PIXELS = 10_000_000  # with 16 or 32 bits: Pillow takes four times the memory for them
MAX_WEBP_PIXELS = 20_000_000  # whose decoder holds two more of it
MAX_FILES = 10  # at once: images of a prompt, or of an image word
MOST_ESCAPED = 100_000  # bytes of a data: URL that are written as %41: each becomes a piece of its own, and a list of them
ESCAPED = [(escaped, sign) for sign in "+/=" for escaped in (f"%{ord(sign):X}", f"%{ord(sign):x}")]
SMALL_PIXELS = 4_000_000  # images that may be decoded beside another
MOST_HEADER_READS = (
    5000  # pieces in which a header is read: Pillow adds each comment of a GIF to all before it
)
MOST_READS = 200_000  # of a whole file
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
SHRINKABLE = ("RGB", "RGBA", "L", "CMYK", "YCbCr")  # modes whose colours can be averaged as they are


def read_data_url(text: object, field: str) -> bytes:
    """Bytes of the image in a data: URL. FieldError for any other text: nothing is fetched or opened."""
    if not isinstance(text, str) or text[:5].lower() != "data:":
        raise FieldError(field, NOT_FETCHED)
    head, comma, body = text[5:].partition(",")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise FieldError(field, f"An image has more than {MAX_BYTES // 2**20} MB.")
    is_base64 = head.lower().endswith(";base64")
    for escaped, sign in ESCAPED if is_base64 else ():
        body = body.replace(escaped, sign)
    if body.count("%") > MOST_ESCAPED:
        raise FieldError(field, f"This data: URL has more than {MOST_ESCAPED:,} escapes. Send base64.")
    try:
        content = unquote_to_bytes(body)
        if is_base64:
            content = base64.b64decode(content, validate=True)
        if not comma or not content:
            raise ValueError
    except ValueError:
        example = "data:image/png;base64,..."
        raise FieldError(field, f"This is not a data: URL of an image, such as {example}") from None
    return content


class _Decoding:
    """A lock for one thread at a time, which may take it several times; at the end the memory of large images goes back.

    The C library keeps what is freed for the next image, in pieces that do not fit it.
    """

    def __init__(self):
        self._lock, self._depth, self._was_large = threading.RLock(), 0, False
        try:
            self._trim = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):  # not glibc
            self._trim = lambda kept: None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def expect(self, pixels: int) -> None:
        """Say what is about to be decoded."""
        self._was_large |= pixels > SMALL_PIXELS

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth and self._was_large:
            self._trim(0)
            self._was_large = False
        self._lock.release()


DECODING = _Decoding()


class _Tags(TiffImagePlugin.ImageFileDirectory_v2):
    """Tags of a TIFF or of EXIF that hold no more bytes than there are: Pillow reads each, and a thousand may be the same 20 MB."""

    def load(self, fp: IO[bytes]) -> None:
        start = fp.tell()
        size = fp.seek(0, os.SEEK_END)
        fp.seek(start)
        count, entry = ("Q", "HHQ8x") if self._bigtiff else ("H", "HHI4x")
        count, entry = struct.Struct(f"{self._endian}{count}"), struct.Struct(f"{self._endian}{entry}")
        (number,) = count.unpack(fp.read(count.size))
        entries = fp.read(min(number, 2**16) * entry.size)
        entries = entries[: len(entries) // entry.size * entry.size]
        units = {kind: unit for kind, (unit, _) in self._load_dispatch.items()}
        if sum(length * units.get(kind, 0) for _, kind, length in entry.iter_unpack(entries)) > size:
            raise ValueError("its tags hold more bytes than there are")
        fp.seek(start)
        super().load(fp)


TiffImagePlugin.ImageFileDirectory_v2 = _Tags  # which Pillow has for EXIF too


class _Pieces:
    """A file that is read in so many pieces at most."""

    def __init__(self, file: BinaryIO, most: int):
        self._file, self._left = file, most

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError("it is in too many pieces")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _opened(path: str | Path | BinaryIO, most: int = MOST_HEADER_READS) -> "Iterator[PIL.Image.Image]":
    """An image file, a path or an open file that stays open, as Pillow opens it. Raises nearly anything."""
    with nullcontext(path) if hasattr(path, "seek") else open(path, "rb") as file:
        file.seek(0)
        with PIL.Image.open(_Pieces(file, most), formats=FORMATS) as image:
            yield image


def check_image_file(path: str | Path | BinaryIO, field: str = "pictures") -> str:
    """Format of an image file, a path or an open file, not decoded. FieldError for an unknown format or one too large."""
    try:
        size = path.getbuffer().nbytes if hasattr(path, "getbuffer") else os.path.getsize(path)
    except OSError:
        raise FieldError(field, "An image is no longer on the server. Drop it again.") from None
    if size > MAX_BYTES:
        raise FieldError(field, f"This file has {size / 2**20:.0f} MB; {MAX_BYTES // 2**20} MB are possible.")
    try:
        with _opened(path) as image:
            pixels, kind, is_wide = image.width * image.height, image.format, image.mode[0] in "IF"
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile is decoded as a whole
                sides = (int(image.tag_v2.get(tag, 0)) for tag in (TILE_WIDTH, TILE_LENGTH))
                pixels = max(pixels, math.prod(sides))
            is_in_runs = any(tile[0] == "bmp_rle" for tile in image.tile)
    except PIL.Image.DecompressionBombError:
        raise FieldError(
            field, f"This image has too many pixels; it may have {MAX_PIXELS // 1_000_000} million pixels."
        ) from None
    except Exception:  # noqa: BLE001  damaged bytes make Pillow raise nearly anything
        raise FieldError(
            field, f"This file is not an image that can be read. Pass one of {', '.join(FORMATS)}."
        ) from None
    if is_in_runs:  # four bytes of it are up to 255 rows, which Pillow writes one after the other
        raise FieldError(field, "This BMP is compressed, which is not taken here. Save it as PNG.")
    most, what = MAX_PIXELS, ""
    if is_wide:
        most, what = MAX_WIDE_PIXELS, " with more than 8 bits a channel"
    elif kind == "WEBP":
        most, what = MAX_WEBP_PIXELS, " as WEBP"
    if pixels > most:
        raise FieldError(
            field,
            f"This image{what} has {pixels / 1e6:.0f} million pixels; it may have {most // 1_000_000} million.",
        )
    return kind


def image_file_size(path: str | Path | BinaryIO) -> tuple[int, int] | None:
    """(width, height) of an image file, without decoding it; None if it cannot be read."""
    try:
        with _opened(path) as image:
            return image.size
    except Exception:  # noqa: BLE001  as above
        return None


def decoding_of(paths: Iterable[str | Path]) -> AbstractContextManager[object]:
    """`DECODING` if some of these files are large; nothing to wait for otherwise."""
    sizes = (image_file_size(path) or (0, 0) for path in paths)
    pixels = sum(width * height for width, height in sizes)
    if pixels <= SMALL_PIXELS:
        return nullcontext()
    return _decoding_large(pixels)


@contextmanager
def _decoding_large(pixels):
    with DECODING:
        DECODING.expect(pixels)
        yield


def open_image_file(path: str | Path | BinaryIO, field: str, with_alpha: bool = False) -> PIL.Image.Image:
    """An image file, which is checked -> PIL image, upright: RGB as `open_image` reads it, or RGBA as it is stored.

    Whoever makes it smaller holds `DECODING` until then. FieldError if it is cut short, or its values are none of an image.
    """
    return _decode(path, field, None, with_alpha)


def open_shrunk(path: str | Path | BinaryIO, field: str, side: int) -> PIL.Image.Image:
    """The same as RGB whose longer side is at most `side` pixels: to look at, not to draw from."""
    return _decode(path, field, side)


def open_square(path: str | Path | BinaryIO, field: str, side: int) -> PIL.Image.Image:
    """An image of a prompt as the model's processor cuts it, bit for bit: RGB, `side` pixels a side. Raises FieldError.

    Ten images of a prompt would take more than a gigabyte as they are.
    """
    with DECODING:
        image = open_image_file(path, field)
        try:
            image = reading().crop_to_square(image, side, PIL.Image.Resampling.BICUBIC)
        except ValueError as error:
            raise FieldError(field, str(error)) from error
        return image  # by this name: the large one is gone before others may decode


def _decode(path, field, side, with_alpha=False):
    check_image_file(path, field)
    with DECODING:
        try:
            with _opened(path, MOST_READS) as image:
                DECODING.expect(image.width * image.height)
                if side is not None and image.mode in SHRINKABLE:
                    image.thumbnail(
                        (side, side)
                    )  # JPEG by its `draft`: an eighth of the pixels is decoded at all
                if with_alpha:
                    return reading().read_image(image, "This image").convert("RGBA")
                image = reading().open_image(image, "This image")
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise FieldError(field, "This image is damaged: its file ends too early.") from error
        if side is not None:
            image.thumbnail((side, side))
        return image


def data_uri(
    image: PIL.Image.Image, side: int = 256, marker: Marker = UNMARKED, composite: bool = False
) -> str:
    """A PIL image as text that a page shows without asking the server for a file; the longer side at least `side`.

    marker, composite: of an image that a model drew.
    """
    scale = max(1, side // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.BICUBIC)
    content = marker.encode(image.convert("RGB"), "JPEG", composite, quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
