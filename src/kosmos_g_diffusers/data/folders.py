"""Images in folders with text files next to them, as kohya's scripts have them, as a source of samples."""

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

from .recipes import WORD_DROPOUT, sample_of_uses
from .sample import IMAGE_LENGTH, BadSample, Sample, decode_image, decode_text, printable

GROUP = 10_000  # files that are shuffled together
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CAPTION_SUFFIXES = (".txt", ".caption")
MOST_TEXT_BYTES = 1024**2
TEXT_USES, IMAGE_USES = ("caption", "edit", "input", "prompt"), ("source", "image")


class FolderSource:
    """Images below a folder, each a sample, with its texts in files of the same name.

    Args:
        folder: with folders inside or not; hidden files are left out.
        name: for messages; None takes the folder's.
        uses: use -> ending of its file's name, such as {"image": "_after.png", "source": "_before.png", "edit": ".txt"}. Without
            any, every image has its caption in `.txt` or `.caption`. `images` of a prompt are endings with commas between them.
        word_dropout: probability that an edit loses the words of what its source shows.

    Raises:
        ValueError: there is no such folder, or no image in it; uses that do not go together.
    """

    name: str
    folder: Path
    uses: dict[str, str]
    word_dropout: float
    keys: list[str]
    groups: Sequence[int]

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        uses: dict[str, str] | None = None,
        word_dropout: float = WORD_DROPOUT,
    ):
        self.folder, self.uses, self.word_dropout = Path(folder).expanduser(), uses or {}, word_dropout
        self.name = name or str(folder)
        if not self.folder.is_dir():
            raise ValueError(f"No data found: there is no folder {str(folder)!r}.")
        endings = (self.uses["image"],) if "image" in self.uses else IMAGE_SUFFIXES
        self.keys = sorted(
            os.path.relpath(os.path.join(place, file), self.folder)
            for place, folders, files in os.walk(self.folder)
            if not _hide(folders)
            for file in files
            if file[0] != "." and (file.endswith(endings) if self.uses else file.lower().endswith(endings))
        )
        if not self.keys:
            raise ValueError(f"No data found: no file below {str(folder)!r} ends in {', '.join(endings)}.")
        self.groups = [min(GROUP, len(self.keys) - first) for first in range(0, len(self.keys), GROUP)]

    def __len__(self) -> int:
        return len(self.keys)

    def length(self, index: int) -> int:
        base, size = self._base(index), 0
        for use in TEXT_USES:
            file = self._file(base, use)
            size += file.stat().st_size if file is not None and file.is_file() else 0
        return size + IMAGE_LENGTH * (("source" in self.uses) + len(self._endings("images")))

    def read(self, index: int, rng: Random) -> Sample:
        base, key = self._base(index), printable(f"{self.folder.name}/{self.keys[index]}")
        texts = {use: self._text(base, use, key) for use in TEXT_USES if use in self.uses or use == "caption"}
        target = self._image(self.folder / self.keys[index], key)
        source = self._image(Path(base + self.uses["source"]), key) if "source" in self.uses else None
        images = [self._image(Path(base + ending), key) for ending in self._endings("images")]
        return sample_of_uses(key, texts, target, rng, source, images, word_dropout=self.word_dropout)

    def _base(self, index):
        """Path of a sample without the ending of its image."""
        path = str(self.folder / self.keys[index])
        return path.removesuffix(self.uses["image"]) if "image" in self.uses else os.path.splitext(path)[0]

    def _endings(self, use):
        return [ending for ending in self.uses.get(use, "").split(",") if ending]

    def _file(self, base, use):
        if use in self.uses:
            return Path(base + self.uses[use]) if self.uses[use] else None
        if use != "caption" or "edit" in self.uses or "prompt" in self.uses:
            return None
        files = [Path(base + ending) for ending in CAPTION_SUFFIXES]
        return next((file for file in files if file.is_file()), files[0])

    def _text(self, base, use, key):
        file = self._file(base, use)
        if file is None:
            return None
        try:
            if file.stat().st_size > MOST_TEXT_BYTES:
                raise BadSample("row", f"{key} has a {file.name} of over {MOST_TEXT_BYTES:,} bytes")
            return decode_text(file.read_bytes(), key)
        except OSError as error:
            raise BadSample("caption", f"{key} has no {file.name} ({error.strerror})") from error

    def _image(self, file, key):
        try:
            return decode_image(file.read_bytes(), key)
        except OSError as error:
            raise BadSample("image", f"{key} has no {file.name} ({error.strerror})") from error


def _hide(folders):
    """Take hidden folders out of a walk, in place."""
    folders[:] = [folder for folder in folders if folder[0] != "."]
