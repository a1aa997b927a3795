"""Image words of a session: made of images, saved to a file and loaded from one. Each is kept as a file of its own."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from .errors import FieldError, at
from .images import MAX_BYTES, MAX_FILES, open_square
from .session import MAX_WORDS
from .store import WORDS_SUFFIX

if TYPE_CHECKING:
    from .queue import Caller
    from .service import Service
    from .session import Session


async def add_word(
    service: "Service",
    session: "Session",
    model: str,
    name: str,
    paths: Sequence[str],
    caller: "Caller | None" = None,
) -> str:
    """Make images a word of the session, for a model by its name; returns the word. Raises FieldError."""
    word = f"<{name.strip().strip('<>').lower()}>"
    if not paths:
        raise FieldError("words", "Drop the image that the word is to mean.")
    if word == "<>":
        raise FieldError("words", "Give the word a name, such as my-dog.")
    if len(paths) > MAX_FILES:
        raise FieldError("words", f"A word may mean {MAX_FILES} images, and {len(paths)} were given.")
    _check_room(session, [word])

    def make(ticket):
        with service.models.image_words(model) as pipe:
            side = pipe.get_processor().image_size
            images = [open_square(path, "words", side) for path in paths]
            pipe.add_image_word(word, images)
            return service.store.keep_word(pipe, word)

    with service.store.using(paths):
        file = await service.carry_out(service.worker, make, "words", caller)
    _learn(service, session, {word: file}, model)
    return word


async def save_words(
    service: "Service", session: "Session", model: str, caller: "Caller | None" = None
) -> Path:
    """Path of a file with the session's words of a model. Raises FieldError."""
    words = session.words_of(model)
    if not words:
        raise FieldError("words", "This session knows no image words of this model. Name an image first.")
    paths = service.store.find_all(words.values(), "words")

    def make(ticket):
        with service.models.image_words(model, paths) as pipe:
            file = service.store.new_upload_path(
                f"image-words-{time.strftime('%Y%m%d-%H%M%S')}{WORDS_SUFFIX}"
            )
            pipe.save_image_words(file, list(words))
            return file

    return await service.carry_out(service.worker, make, "words", caller)


async def load_words(
    service: "Service", session: "Session", model: str, path: str, caller: "Caller | None" = None
) -> list[str]:
    """Take the words of a file into the session; returns them. Raises FieldError."""

    def look(ticket):
        with at("words"):
            try:
                if Path(path).stat().st_size > MAX_BYTES:
                    raise ValueError(f"This file is larger than {MAX_BYTES // 2**20} MB.")
                names = read_words(path)
            except FileNotFoundError:
                raise ValueError("This file is no longer on the server. Load it again.") from None
            except (OSError, SafetensorError):
                raise ValueError("This is not a file of image words. Pass one that was saved here.") from None
        _check_room(session, names)
        return names

    def make(ticket):
        with service.models.image_words(model, [path]) as pipe:
            return {word: service.store.keep_word(pipe, word) for word in names}

    with service.store.using([path]):
        names = await service.carry_out(service.reading, look, "words", caller)
        kept = await service.carry_out(service.worker, make, "words", caller)
    _learn(service, session, kept, model)
    return names


def forget_word(service: "Service", session: "Session", word: str) -> None:
    """Take a word out of a session; nothing happens if it does not know it."""
    if word in session.words:
        service.store.release(session, session.words[word])
    session.forget_word(word)


def _learn(service, session, words, model):
    """The session keeps the files of its words from being deleted."""
    service.store.hold(session, words.values())
    session.learn_words(words, model)


def read_words(path: str | Path) -> list[str]:
    """Names of the words in a file. Raises OSError or SafetensorError."""
    with safe_open(path, framework="numpy") as file:  # names alone are read
        return sorted(file.keys())


def _check_room(session, names):
    taken = [name for name in names if name in session.words]
    if taken:
        raise FieldError("words", f"{taken[0]} is an image word already. Take another name, or forget it.")
    if len(session.words) + len(names) > MAX_WORDS:
        raise FieldError("words", f"A session may have {MAX_WORDS} image words. Save and forget some first.")
