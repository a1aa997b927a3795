"""What one user has: image words, what was made, and the run that is under way."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.settings import InputImage

if TYPE_CHECKING:
    from .queue import Ticket

MAX_WORDS = 20
MAX_HISTORY = 200  # images; the files stay


@dataclass(eq=False)
class Session:
    """Kept by the page for as long as it is open. Starts empty; every user gets a copy of the first one."""

    words: OrderedDict[str, InputImage] = field(default_factory=OrderedDict)  # name -> InputImage of its file
    models: dict[str, str] = field(
        default_factory=dict
    )  # name of a word -> name of the model that it was made with
    word_images: dict[str, list[str | None]] = field(
        default_factory=dict
    )  # name of a word -> what its images look like, as data: URIs, where it was made here
    history: list[Path] = field(default_factory=list)  # paths of images, the newest first
    shown: list[Path] = field(default_factory=list)  # paths of the images of the last run
    chosen: Path | None = None  # path of the image whose settings are shown
    tickets: list["Ticket"] = field(default_factory=list)  # of its runs that have not ended
    board_path: str | None = None  # of the image to change that is painted on
    restored_mask: tuple[str, str] | None = None  # path of an image to change, and strokes that belong on it
    error: object = None  # FieldError of the last action, until the page has shown it

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        return Session()  # what the page copies is the empty one

    def remember(self, paths: Iterable[Path]) -> None:
        self.history[:0] = reversed(paths)
        del self.history[MAX_HISTORY:]

    def words_of(self, model: str) -> dict[str, InputImage]:
        """Name -> InputImage of the words that were made with a model."""
        return {name: file for name, file in self.words.items() if self.models[name] == model}

    def learn_words(self, words: Mapping[str, InputImage], model: str) -> None:
        """Words of a model: name -> InputImage."""
        self.words.update(words)
        self.models.update(dict.fromkeys(words, model))

    def forget_word(self, name: str) -> None:
        self.words.pop(name, None)
        self.models.pop(name, None)
        self.word_images.pop(name, None)
