"""What samples are made of: the files of a folder, read ahead by workers. Names and bytes may come from anyone."""

import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch.utils.data

from ...files import hash_bytes
from ..sample import MOST_IMAGE_BYTES, BadSample, decode_image

logger = logging.getLogger(__name__)

ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


@dataclass(frozen=True)
class Input:
    """One thing that becomes a sample, or is skipped.

    Attributes:
        name: what it is called in its folder or data set; as a file name, it may hold any bytes.
    """

    name: str

    @property
    def key(self) -> str:
        """Of the sample: what is plain in the name, and a hash of all of it. The same name gives the same key."""
        digest = hash_bytes(os.fsencode(self.name))[:16]
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.name).stem).strip("-")[:32]
        return f"{plain}-{digest}" if plain else digest

    @property
    def source(self) -> str:
        """The name as text, for people."""
        return os.fsencode(self.name).decode("utf-8", errors="replace")


def find_images(folder: str | Path, leave_out: str | Path | None = None) -> list[Input]:
    """The image files in a folder and all below it, as a sorted list of `Input`, named by their path from there.

    A file counts by its ending; what it holds is looked at when it is read. Links to folders are not followed.

    Args:
        leave_out: a folder in it that is passed over, such as the one that is written.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Pass the folder of the images.")
    leave_out = None if leave_out is None else Path(leave_out).resolve()
    found, others = [], 0
    for place, folders, files in os.walk(folder, onerror=_log_unreadable):
        folders[:] = [name for name in folders if Path(place, name).resolve() != leave_out]
        for name in files:
            if Path(name).suffix.lower() in ENDINGS:
                found.append(Path(place, name).relative_to(folder).as_posix())
            else:
                others += 1
    if not found:
        raise ValueError(
            f"There is no image in {folder} ({others:,} other files). Expected files ending in {', '.join(sorted(ENDINGS))}."
        )
    logger.info("%s: %s images, %s other files", folder, f"{len(found):,}", f"{others:,}")
    return [Input(name) for name in sorted(found)]


def read_image_file(path: str | Path, key: str) -> PIL.Image.Image:
    """An image file -> RGB PIL image, upright. Raises BadSample ("image")."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise BadSample("image", f"{key} is not a regular file")
        with open(path, "rb") as file:
            data = file.read(MOST_IMAGE_BYTES + 1)
    except OSError as error:
        raise BadSample("image", f"{key} cannot be read ({error.strerror})") from error
    return decode_image(data, key)


def shrink(image: PIL.Image.Image, shorter_side: int) -> PIL.Image.Image:
    """An image whose shorter side is at most `shorter_side` pixels; smaller ones are left as they are."""
    scale = shorter_side / min(image.size)
    if scale >= 1:
        return image
    return image.resize([max(shorter_side, round(side * scale)) for side in image.size])


def read_ahead(dataset: torch.utils.data.Dataset[Any], batch_size: int, workers: int) -> Iterator[list[Any]]:
    """Iterator of lists of up to `batch_size` items of a map-style dataset, in order, made by `workers` processes.

    The processes start here: before a model is loaded, which they would otherwise carry along.
    """
    options = {"batch_size": batch_size, "collate_fn": list, "num_workers": workers}
    return iter(torch.utils.data.DataLoader(dataset, **options))


def _log_unreadable(error):
    logger.warning("A folder cannot be listed: %s", error)
