"""How captions, edits and compositions become prompts: the rules that every format shares.

They are the official loaders' (laion2b_loader.py, instructpix2pix_loader.py, openimage_loader.py), with one fix: a
composition whose caption begins with an entity lost its words is kept; there it raises IndexError and is dropped.
"""

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import PIL.Image

from .sample import BadSample, Sample, clean_text

WORD_DROPOUT = 0.5  # probability that the words next to the images are left out, --random-drop-caption-prob
BACKGROUND = 0.5  # probability that an entity is shown with its background

# a colour is not an object to cut out, though a language model lists it among the objects
COLOURS = frozenset(
    "yellow blue red green white black brown grey gray purple pink orange cyan silver gold golden".split()
)
# of an image in a text, as OmniGen's data has it: <img><|image_1|></img>
OMNIGEN_MARK: re.Pattern[str] = re.compile(r"(?:<img>\s*)?<\|image_([1-9][0-9]?)\|>(?:\s*</img>)?")
WORD_ENDS = frozenset(" ,.!?;:)]}")


def check_caption(caption: Any, key: str) -> str:
    """The caption without outer spaces. Raises BadSample when it is empty or not text."""
    if not isinstance(caption, str):
        raise BadSample("caption", f"{key} has a caption of type {type(caption).__name__}")
    caption = clean_text(caption.strip(), key).strip()
    if not caption:
        raise BadSample("caption", f"{key} has an empty caption")
    if mark := OMNIGEN_MARK.search(caption):
        raise BadSample(
            "row", f"{key} has the mark {mark[0]} of an image in its text: it is a prompt, not a caption"
        )
    return caption


def caption_sample(key: str, caption: Any, target: PIL.Image.Image | None = None) -> Sample:
    """A caption and the image that it describes."""
    caption = check_caption(caption, key)
    return Sample(key, (caption,), target, caption)


def edit_sample(
    key: str,
    words: str | None,
    edit: Any,
    source: PIL.Image.Image,
    target: PIL.Image.Image,
    caption: str | None,
    rng: Random,
    word_dropout: float = WORD_DROPOUT,
) -> Sample:
    """`words` (what the source shows, dropped with probability `word_dropout`), the source image, the instruction."""
    edit = check_caption(edit, key)
    words = clean_text(words.strip(), key) if isinstance(words, str) and rng.random() >= word_dropout else ""
    prompt = (words, source, edit) if words else (source, edit)
    return Sample(key, prompt, target, caption or None)


def composition_sample(
    key: str,
    caption: Any,
    entities: Sequence[str],
    image: Callable[[int, bool], PIL.Image.Image],
    target: PIL.Image.Image | None,
    rng: Random,
    word_dropout: float = WORD_DROPOUT,
    background: float = BACKGROUND,
) -> Sample:
    """A caption in which each entity's words are followed by its image.

    Args:
        entities: words of each entity, in the order of their images.
        image: function of (number of an entity, whether with its background) -> RGB PIL image.
        word_dropout: probability that the words of all entities are left out, so that only the images tell.
        background: probability, for each entity, of the image with its background.
    """
    caption = check_caption(caption, key)
    keep_words = rng.random() >= word_dropout
    prompt = interleave(caption, entities, keep_words)
    prompt = [part if isinstance(part, str) else image(part, rng.random() < background) for part in prompt]
    return Sample(key, tuple(prompt), target, caption)


def interleave(caption: str, entities: Sequence[str], keep_words: bool = True) -> list[str | int]:
    """Put the number of each entity behind its words, or in their place: a list of strings and ints in reading order.

    An entity is left out when it is a colour, when it is not in the caption as a whole word, or when its words are part
    of another's ("dog" and "hot dog").
    """
    found = []
    for number, entity in enumerate(entities):
        match = _find(entity, caption)
        inside = sum(_find(entity, other, 0) is not None for other in entities)
        if match and entity not in COLOURS and inside == 1:
            found.append((match.end(), number, entity))
    parts, rest = [], caption
    for _, number, entity in sorted(found):
        match = _find(entity, rest)
        if match is None:  # overlaps the entity before it
            continue
        begin, end = match.span()
        while end < len(rest) and rest[end] not in WORD_ENDS:  # "dog's", "dog-house"
            end += 1
        parts += [rest[: end if keep_words else begin], number]
        rest = rest[end:]
    parts.append(rest)
    return [part for part in parts if not isinstance(part, str) or part.strip()]


def _find(entity, text, flags=re.IGNORECASE):
    return re.search(rf"\b{re.escape(entity)}\b", text, flags) if entity else None
