"""Files of images that are small and want gigabytes or hours: refused by their headers, or read without what wants them."""

import base64
import io
import struct
import tracemalloc
import zlib
from urllib.parse import quote

import PIL.Image
import pytest

from kosmos_g_diffusers.serving.errors import FieldError
from kosmos_g_diffusers.serving.images import (
    check_image_file,
    image_file_size,
    open_image_file,
    read_data_url,
)

SIDE = 64
SAME = 1_000_000  # bytes of each tag, which are the same for all
TAGS = 100


def written(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def tags_of_the_same_bytes(*own):
    """A directory of TIFF: `own` tags (number, type, count, value), and a hundred that are the same bytes."""
    end = 8 + 2 + 12 * (len(own) + TAGS) + 4
    entries = [*own, *((33_000 + number, 7, SAME, end) for number in range(TAGS))]
    packed = [struct.pack("<HHI", *entry[:3]) + struct.pack("<I", entry[3]) for entry in sorted(entries)]
    return b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(4) + bytes(SAME)


def png_with(name, content, count=1):
    body = written(PIL.Image.new("RGB", (SIDE, SIDE)), "PNG")
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    place = body.index(b"IDAT") - 4
    return body[:place] + count * chunk + body[place:]


def jpeg_with(segments):
    body = written(PIL.Image.new("RGB", (SIDE, SIDE)), "JPEG")
    return body[:2] + segments + body[2:]


def jpeg_of_tags():
    content, segments = tags_of_the_same_bytes((274, 3, 1, 1)), b""
    for start in range(0, len(content), 65_000):
        part = b"Exif\0\0" + content[start : start + 65_000]
        segments += b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part
    return jpeg_with(segments)


def tiff(*own, content=b""):
    own = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), *own]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(own))
    return b"II*\0" + struct.pack("<IH", 8, len(own)) + packed + bytes(4) + content


def gif_with(extensions):
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    return head + extensions + b"\x2c" + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\2\2\x4c\1\0\x3b"


def bmp_in_runs(width):
    colours = bytes(4 * 256)
    body = b"\0\2\xff\xff"  # go on 255 rows further up
    head = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + len(head) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + colours + body


@pytest.mark.parametrize(
    ("content", "is_taken"),
    [
        (png_with(b"eXIf", tags_of_the_same_bytes((274, 3, 1, 1))), True),
        (jpeg_of_tags(), True),
        (written(PIL.Image.new("RGB", (SIDE, SIDE)), "WEBP", exif=tags_of_the_same_bytes()), True),
        (tags_of_the_same_bytes((256, 4, 1, SIDE), (257, 4, 1, SIDE), (262, 3, 1, 1)), False),
    ],
    ids=["PNG", "JPEG", "WEBP", "TIFF"],
)
def test_tags_that_lie_over_each_other_take_no_memory(content, is_taken):
    file = io.BytesIO(content)
    open_image_file(io.BytesIO(written(PIL.Image.new("L", (1, 1)), "PNG")), "images")  # imports what it needs
    tracemalloc.start()
    try:
        assert image_file_size(file) == ((SIDE, SIDE) if is_taken else None)
        if is_taken:
            assert open_image_file(file, "images").size == (SIDE, SIDE)
        else:
            with pytest.raises(FieldError, match="cannot be read|not an image"):
                check_image_file(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * SAME  # of a hundred tags as many


def test_tile_of_a_tiff_counts_as_what_is_decoded_of_it():
    # a megabyte of zeros becomes 2 GB
    tiles = [(322, 4, 1, 40_000), (323, 4, 1, 50_000), (324, 4, 1, 200), (325, 4, 1, 50)]
    with pytest.raises(FieldError, match="has 2000 million pixels"):
        check_image_file(io.BytesIO(tiff(*tiles, content=bytes(500))))
    image = PIL.Image.effect_noise((100, 80), 50).convert("RGB")
    small = {322: 48, 323: 32}  # as other programs write large images
    file = io.BytesIO(written(image, "TIFF", tiffinfo=small, compression="tiff_deflate"))
    assert open_image_file(file, "images").tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        gif_with(b"\x21\xfe" + 20_000 * (b"\xff" + 255 * b"x") + b"\0"),
        gif_with(200_000 * b"\x21\xfe\1x\0"),
        png_with(b"prVt", b"", 20_000),
        jpeg_with(20_000 * b"\xff\xe5\0\2"),
        jpeg_with(200_000 * b"\xff"),
    ],
    ids=["GIF of one comment", "GIF of many", "PNG of chunks", "JPEG of segments", "JPEG of nothing"],
)
def test_file_in_very_many_pieces_is_refused_soon(content):
    reads = []

    class File(io.BytesIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    with pytest.raises(FieldError, match="not an image that can be read"):
        check_image_file(File(content))
    assert len(reads) < 10_000


def test_bmp_in_runs_is_refused_by_its_header():
    # a thousand bytes become 10 GB
    with pytest.raises(FieldError, match="BMP is compressed"):
        check_image_file(io.BytesIO(bmp_in_runs(40_000_000)))
    image = PIL.Image.effect_noise((30, 20), 50)
    assert open_image_file(io.BytesIO(written(image, "BMP")), "images").size == (30, 20)


def test_escapes_of_a_data_url_take_little_memory():
    content = bytes(range(256)) * 800
    whole = base64.b64encode(content).decode()
    for text in (
        whole,
        quote(whole, safe=""),
        quote(whole, safe="").replace("%2F", "%2f"),
        f"{whole[:-1]}%3D",
    ):
        assert read_data_url(f"data:image/png;base64,{text}", "images") == content
    assert read_data_url("data:image/png," + quote(content[:256]), "images") == content[:256]
    text = "data:image/png," + 2_000_000 * "%41"
    tracemalloc.start()
    try:
        with pytest.raises(FieldError, match="more than 100,000 escapes. Send base64"):
            read_data_url(text, "images")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(text)  # its copies
