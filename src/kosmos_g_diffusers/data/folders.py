"""Images in folders with text files next to them, as kohya's scripts have them, as a source of samples."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from ..files import first_line, hash_bytes
from .recipes import BACKGROUND, WORD_DROPOUT
from .records import Record
from .sample import MOST_IMAGE_BYTES, BadSample, Sample, decode_text, printable
from .uses import Uses, find_field

GROUP = 10_000  # files that are shuffled together
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CAPTION_SUFFIXES = (".txt", ".caption")
JSON_SUFFIX = ".json"
MOST_TEXT_BYTES = 1024**2


class FolderSource:
    """Images below a folder, each a sample, with its texts in files of the same name.

    Args:
        folder: with folders inside or not; hidden files are left out.
        name: for messages; None takes the folder's.
        uses: use -> ending of its file's name, such as {"image": "_after.png", "source": "_before.png", "edit": ".txt"}, or a
            field of a JSON file, ".json.edit". Without any, every image has its caption in `.txt` or `.caption`.
        word_dropout: probability that an edit loses the words of what its source shows.
        background, cache_dir: as in `TsvSource`.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """

    name: str
    folder: Path
    uses: Uses
    word_dropout: float
    background: float
    keys: list[str]
    groups: Sequence[int]

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        uses: Uses | None = None,
        word_dropout: float = WORD_DROPOUT,
        background: float = BACKGROUND,
        cache_dir: str | Path | None = None,
    ):
        self.cache_dir = cache_dir
        self.folder, self.uses = Path(folder).expanduser(), uses or Uses({"image": ""})
        self.word_dropout, self.background = word_dropout, background
        self.name = name or str(folder)
        if not self.folder.is_dir():
            raise ValueError(f"No data found: there is no folder {str(folder)!r}.")
        ending = self.uses.names.get("image", "")
        endings = (ending,) if ending else IMAGE_SUFFIXES
        self.keys = sorted(
            os.path.relpath(os.path.join(place, file), self.folder)
            for place, folders, files in os.walk(self.folder)
            if not _hide(folders)
            for file in files
            if file[0] != "." and (file.endswith(endings) if ending else file.lower().endswith(endings))
        )
        if not self.keys:
            raise ValueError(f"No data found: no file below {str(folder)!r} ends in {', '.join(endings)}.")
        self.groups = [min(GROUP, len(self.keys) - first) for first in range(0, len(self.keys), GROUP)]

    def __len__(self) -> int:
        return len(self.keys)

    def identify(self, first: int, last: int) -> tuple[Any, ...]:
        """What the lengths of these samples depend on: their names. That a text has changed since is not looked at."""
        names = hash_bytes("\n".join(self.keys[first:last]).encode("utf-8", "surrogateescape"))
        return (self.folder.resolve(), sorted(self.uses.all_names), first, names)

    def length(self, index: int) -> int:
        """From the sizes of the files: nothing is read."""
        base, texts = self._base(index), {}
        for use, name in self._text_names(base).items():
            file = _file_of(base, name)[0]
            texts[use] = " " * (file.stat().st_size if file.is_file() else 0)
        return self.uses.length(texts)

    def read(self, index: int, rng: Random) -> Sample:
        return self.record(index).make_sample(rng, self.word_dropout, self.background)

    def record(self, index: int) -> Record:
        """Sample number `index` as it is stored. Raises BadSample."""
        base, key = self._base(index), printable(f"{self.folder.name}/{self.keys[index]}")
        texts = {use: self._text(base, name, key) for use, name in self._text_names(base).items()}
        self.uses.check_score(key, [self._text(base, name, key) for name in self.uses.scores])
        target = {"image": self.folder / self.keys[index]}

        def read_one(use):
            return partial(_read_image, target.get(use) or Path(base + self.uses.names[use]), key)

        def read_several():
            return [partial(_read_image, Path(base + ending), key) for ending in self.uses.images]

        return self.uses.make_record(key, texts, read_one, read_several)

    def _base(self, index):
        """Path of a sample without the ending of its image."""
        path, ending = str(self.folder / self.keys[index]), self.uses.names.get("image", "")
        return path.removesuffix(ending) if ending else os.path.splitext(path)[0]

    def _text_names(self, base):
        """Use -> ending of each text; without any, the caption's that is there."""
        if self.uses.texts:
            return self.uses.texts
        return {"caption": next((end for end in CAPTION_SUFFIXES if Path(base + end).is_file()), ".txt")}

    def _text(self, base, name, key):
        file, field = _file_of(base, name)
        try:
            if file.stat().st_size > MOST_TEXT_BYTES:
                raise BadSample("row", f"{key} has a {file.name} of over {MOST_TEXT_BYTES:,} bytes")
            text = decode_text(file.read_bytes(), key)
            return text if field is None else find_field(json.loads(text), field)
        except OSError as error:
            raise BadSample("caption", f"{key} has no {file.name} ({error.strerror})") from error
        except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
            raise BadSample(
                "row", f"{key} has no {field} in its {file.name} ({first_line(error)})"
            ) from error


def _file_of(base, name):
    """(file, field of its JSON or None) of the ending of a text."""
    ending, json_suffix, field = name.partition(f"{JSON_SUFFIX}.")
    return (Path(f"{base}{ending}{JSON_SUFFIX}"), field) if json_suffix else (Path(base + name), None)


def _read_image(file, key):
    try:
        with open(file, "rb") as opened:
            return opened.read(MOST_IMAGE_BYTES + 1)
    except OSError as error:
        raise BadSample("image", f"{key} has no {file.name} ({error.strerror})") from error


def _hide(folders):
    """Take hidden folders out of a walk, in place."""
    folders[:] = [folder for folder in folders if folder[0] != "."]
