"""The output folder of the app: drawn images, and the images and image words that they were made from.

    images/20270131-235959-1f2e3d4c5b6a.png   what was made; the name cannot be guessed
    inputs/<sha256>.png                       what it was made from, named by its contents
    uploads/                                  of gradio; a day later they are deleted

Settings name inputs by their path from an image, so that `kosmos-g generate --from` finds them too. A client names
files by their contents alone: no string of a client is ever taken as a path.
"""

import base64
import io
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from ..files import hash_bytes, remove_partial_files, written_atomically
from ..generation.settings import InputImage
from ..provenance import UNMARKED, Marker
from .errors import FieldError
from .libraries import reading

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 20 * 2**20  # of a file
MAX_PIXELS = 40_000_000  # of an image, before it is decoded
MAX_FILES = 10  # at once: images of a prompt, or of an image word
WORDS_SUFFIX = ".safetensors"
UPLOADS_KEPT = 86_400  # seconds; what a run used is among the inputs by then
IMAGES, INPUTS, UPLOADS = "images", "inputs", "uploads"


def check_image_file(path: str | Path | BinaryIO, field: str = "pictures") -> str:
    """Format of an image file, a path or an open file, not decoded. FieldError for an unknown format or one too large."""
    size = path.getbuffer().nbytes if hasattr(path, "getbuffer") else os.path.getsize(path)
    if size > MAX_BYTES:
        raise FieldError(field, f"This file has {size / 2**20:.0f} MB; {MAX_BYTES // 2**20} MB are possible.")
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            pixels, kind = image.width * image.height, image.format
    except PIL.Image.DecompressionBombError:
        raise FieldError(
            field, f"This image has too many pixels; it may have {MAX_PIXELS // 1_000_000} million pixels."
        ) from None
    except (OSError, ValueError, SyntaxError):
        raise FieldError(
            field, f"This file is not an image that can be read. Pass one of {', '.join(FORMATS)}."
        ) from None
    if pixels > MAX_PIXELS:
        raise FieldError(
            field,
            f"This image has {pixels / 1e6:.0f} million pixels; it may have {MAX_PIXELS // 1_000_000} million.",
        )
    return kind


def image_file_size(path: str | Path) -> tuple[int, int] | None:
    """(width, height) of an image file, without decoding it; None if it cannot be read."""
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return None


def open_image_file(path: str | Path | BinaryIO, field: str, with_alpha: bool = False) -> PIL.Image.Image:
    """An image file, which is checked -> PIL image, upright: RGB as `open_image` reads it, or RGBA as it is stored.

    FieldError if it is cut short, or its values are none of an image.
    """
    check_image_file(path, field)
    if hasattr(path, "seek"):
        path.seek(0)
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            if with_alpha:
                return reading().read_image(image, "This image").convert("RGBA")
            return reading().open_image(image, "This image")
    except (OSError, ValueError, SyntaxError) as error:
        raise FieldError(field, "This image is damaged: its file ends too early.") from error


class Store:
    """Files of the app in `folder`, which is made when it is not there."""

    folder: Path

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in (IMAGES, INPUTS, UPLOADS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.folder / name, older_than=UPLOADS_KEPT)
        for path in (self.folder / UPLOADS).iterdir():
            if time.time() - path.stat().st_mtime > UPLOADS_KEPT:
                (shutil.rmtree if path.is_dir() else os.unlink)(path)

    def put_example(self, name: str, image: str | Path | PIL.Image.Image) -> Path:
        """Write an image, a path or a PIL image, among the uploads, under a name that users see; returns its path."""
        path = self.folder / UPLOADS / "examples" / name
        with written_atomically(path) as file:
            if isinstance(image, PIL.Image.Image):
                image.save(file, format="PNG")
            else:
                file.write(Path(image).read_bytes())
        return path

    def new_image_path(self) -> Path:
        """Path for an image that is about to be written."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}.png"
        return self.folder / IMAGES / name

    def keep_upload(self, path: str | Path, field: str) -> InputImage:
        """Keep an uploaded image; returns it as settings name it. Raises FieldError as `check_image_file` does."""
        suffix = f".{check_image_file(path, field).lower()}"
        return self._keep(Path(path).read_bytes(), suffix)

    def keep_drawn(self, image: PIL.Image.Image) -> InputImage:
        """The same for a PIL image that was made here."""
        file = io.BytesIO()
        image.save(file, format="PNG")
        return self._keep(file.getvalue(), ".png")

    def keep_word(self, pipe: Any, word: str) -> InputImage:
        """The same for an image word that a pipeline knows."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"word{WORDS_SUFFIX}"
            pipe.save_image_words(file, [word])
            return self._keep(file.read_bytes(), WORDS_SUFFIX)

    def _keep(self, content, suffix):
        digest = hash_bytes(content)
        kept = self.folder / INPUTS / f"{digest}{suffix}"
        if not kept.exists():
            with written_atomically(kept) as file:
                file.write(content)
        return InputImage(f"../{INPUTS}/{kept.name}", digest)

    def find(self, file: InputImage) -> Path | None:
        """Path of an InputImage by its SHA-256, checked when it was made, and not by its path; None if it is not here."""
        return next((self.folder / INPUTS).glob(f"{file.sha256}.*"), None)

    def find_all(self, files: Iterable[InputImage], field: str) -> list[Path]:
        """The same for several. Raises FieldError if one is not here."""
        found = [self.find(file) for file in files]
        if None in found:
            raise FieldError(field, "An image of this run is no longer on the server. Drop it again.")
        return found


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
