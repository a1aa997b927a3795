"""Small data sets as others store them: images that are told apart by their shade, files, tar archives, tables."""

import io
import json
import random
import tarfile

import numpy as np
import PIL.Image

from kosmos_g_diffusers.data import build_source


def make_image(shade, size=(8, 8)):
    return PIL.Image.new("RGB", size, (shade, 0, 0))


def encode(image):
    """Bytes of a PNG, of an image or of a shade."""
    buffer = io.BytesIO()
    (make_image(image) if isinstance(image, int) else image).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image):
    return int(np.asarray(image)[0, 0, 0])


def shown(sample):
    """A prompt with the shades of its images."""
    return [part if isinstance(part, str) else shade(part) for part in sample.prompt]


def write_files(folder, files):
    """Write files, of bytes or text, below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_tar(path, members, mode="w"):
    """Write a tar file of (name, bytes) pairs, or of a dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_lines(path, rows):
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(line, index, seed=0, **options):
    """One sample of a line."""
    return build_source(line, **options).read(index, random.Random(seed))
