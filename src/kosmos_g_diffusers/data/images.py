"""Bytes that someone else wrote -> a picture, or a BadSample. Nothing here trusts its input."""

import base64
import binascii
import io

import PIL.Image

from ..processing_kosmos_g import open_image
from .sample import BadSample

# What Pillow decodes by itself: EPS, for one, would start Ghostscript on the file's program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MOST_BYTES = 64 * 1024**2


def decode_picture(data, key):
    """Bytes of a picture file -> RGB PIL image, upright.

    Args:
        data: bytes of a file in one of `FORMATS`, at most `MOST_BYTES`.
        key: names the sample in the error.

    Raises:
        BadSample: cause "image"; too many bytes or pixels, damaged, or not a picture.
    """
    if len(data) > MOST_BYTES:
        raise BadSample(
            "image", f"{key} has a picture of {len(data):,} bytes; at most {MOST_BYTES:,} are read"
        )
    try:
        return open_image(PIL.Image.open(io.BytesIO(data), formats=FORMATS), "the picture")
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly anything
        raise BadSample("image", f"{key} has a picture that cannot be read ({error})") from error


def decode_base64_picture(text, key):
    """As `decode_picture`, from base64 text (bytes)."""
    if len(text) > MOST_BYTES // 3 * 4:
        raise BadSample("image", f"{key} has a picture of {len(text):,} base64 characters, which is too many")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image", f"{key} has a picture that is not base64 ({error})") from error
    return decode_picture(data, key)
