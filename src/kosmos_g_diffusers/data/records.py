"""A sample as it is stored, before anything about it is drawn. Every form of data becomes records; a shard of ours holds them.

So what training reads does not depend on the form, and `kosmos-g data import` writes what it reads.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import PIL.Image

from .recipes import (
    BACKGROUND,
    OMNIGEN_MARK,
    WORD_DROPOUT,
    caption_sample,
    check_caption,
    composition_sample,
    edit_sample,
)
from .sample import BadSample, Sample, clean_text, decode_image

MOST_PARTS = 64  # images and texts of a prompt, pairs of an edit, entities of a composition
IMAGE_NAME = re.compile(r"[0-9]{1,3}(\.[a-z]+)?")
SIDES = ("left", "right")  # of an image of two views

Image = PIL.Image.Image
ReadImage = Callable[[], bytes | Image]  # bytes of an image file, or RGB PIL image; raises BadSample


@dataclass(frozen=True)
class Record:
    """What a sample holds, in the layout of our shards (docs/data.md).

    Attributes:
        key: says where it came from, for messages.
        content: what KEY.json holds: `caption`, `edit`, `input`, `entities`, `boxes`, `prompt`, `prompts`, `note`.
        images: name ("target", "0", "0.source", "0.cutout", ...) -> function that reads it, in the order in which they are shown.
    """

    key: str
    content: Mapping[str, Any]
    images: Mapping[str, ReadImage] = field(default_factory=dict)

    def image(self, name: str) -> Image:
        """An image by name, RGB. Raises BadSample ("image")."""
        if name not in self.images:
            raise BadSample("image", f"{self.key} has no image {name}")
        image = self.images[name]()
        return decode_image(image, self.key) if isinstance(image, bytes) else image

    def target(self) -> Image | None:
        """The image `target`, or the only one that has no name, as in shards made by img2dataset. None without."""
        return next((self.image(name) for name in ("target", "") if name in self.images), None)

    def entity(self, number: int, whole: bool) -> Image:
        """An entity's image with its background (`whole`) or cut out; the other one where only that is there; else its box."""
        first, second = (f"{number}", f"{number}.cutout") if whole else (f"{number}.cutout", f"{number}")
        if not {first, second} & set(self.images) and "boxes" in self.content:
            return self._crop(number)
        return self.image(second if second in self.images and first not in self.images else first)

    def _crop(self, number):
        """The part of the target that an entity's box has: fractions of its sides, or pixels where one is above 1."""
        boxes, target = self.content["boxes"], self.target()
        box = boxes[number] if isinstance(boxes, list) and number < len(boxes) else None
        sound = isinstance(box, list) and len(box) == 4 and all(_is_number(side) for side in box)
        if target is None or not sound:
            raise BadSample("row", f"{self.key} has no box of four numbers for its entity {number}")
        scale = (1, 1) if max(box) > 1 else target.size
        left, right = (min(max(box[place] * scale[0], 0), target.width) for place in (0, 2))
        top, bottom = (min(max(box[place] * scale[1], 0), target.height) for place in (1, 3))
        if right - left < 1 or bottom - top < 1:
            raise BadSample("row", f"{self.key} has an empty box for its entity {number}: {box}")
        return target.crop((round(left), round(top), round(right), round(bottom)))

    def make_sample(
        self, rng: Random, word_dropout: float = WORD_DROPOUT, background: float = BACKGROUND
    ) -> Sample:
        """The sample, with every random choice drawn from `rng`. Raises BadSample."""
        content = self.content
        if "prompt" in content or "prompts" in content:
            return self._make_prompt(rng)
        if "edit" in content:
            return self._make_edit(rng, word_dropout)
        if "entities" in content:
            return self._make_composition(rng, word_dropout, background)
        return caption_sample(self.key, draw_text(content.get("caption"), rng), self.target())

    def _make_composition(self, rng, word_dropout, background):
        caption, entities = draw_text(self.content.get("caption"), rng), self.content["entities"]
        sound = isinstance(entities, list) and all(isinstance(words, str) for words in entities)
        if not sound or len(entities) > MOST_PARTS:
            raise BadSample("row", f"{self.key}: entities is not a list of at most {MOST_PARTS} strings")
        target, chances = self.target(), (word_dropout, background)
        return composition_sample(self.key, caption, entities, self.entity, target, rng, *chances)

    def _make_prompt(self, rng):
        parts, prompt = self.content.get("prompt"), []
        if "prompts" in self.content:
            prompts = self.content["prompts"]
            parts = rng.choice(prompts) if isinstance(prompts, list) and prompts else None
        if not isinstance(parts, list) or not 0 < len(parts) <= MOST_PARTS:
            raise BadSample("row", f"{self.key}: prompt is not a list of 1 to {MOST_PARTS} parts")
        for part in parts:
            if isinstance(part, str):
                prompt.append(clean_text(part, self.key))
            elif isinstance(part, dict) and IMAGE_NAME.fullmatch(str(part.get("image"))):
                prompt.append(self.image(str(part["image"])))
            else:
                raise BadSample("row", f'{self.key}: a prompt part is neither text nor {{"image": "0"}}')
        return Sample(self.key, tuple(prompt), self.target(), self._optional_caption(rng))

    def _make_edit(self, rng, word_dropout):
        pairs = 0
        while f"{pairs}.source" in self.images and pairs < MOST_PARTS:
            pairs += 1
        if not pairs:
            raise BadSample("row", f"{self.key} is an edit without the images 0.source and 0.target")
        pair = rng.randrange(pairs)
        source, target = self.image(f"{pair}.source"), self.image(f"{pair}.target")
        words, edit = (draw_text(self.content.get(name), rng) for name in ("input", "edit"))
        if not isinstance(words, str | None):
            raise BadSample("row", f"{self.key} has an input of type {type(words).__name__}, not text")
        return edit_sample(
            self.key, words, edit, source, target, self._optional_caption(rng), rng, word_dropout
        )

    def _optional_caption(self, rng):
        caption = draw_text(self.content.get("caption"), rng)
        return None if caption is None or caption == "" else check_caption(caption, self.key)


def draw_text(value: Any, rng: Random) -> Any:
    """A text; of a list of them, one that is drawn, or None if there is none."""
    if not isinstance(value, list):
        return value
    texts = [text for text in value if isinstance(text, str) and text.strip()]
    return texts[0] if len(texts) == 1 else rng.choice(texts) if texts else None


def place_images(key: str, words: Any, images: int, reads_marks: bool = True) -> list[str | dict[str, str]]:
    """Words -> parts of a prompt, an image {"image": "0"} where its `OMNIGEN_MARK` is; images without a mark come first, in order.

    Args:
        words: text; with `reads_marks`, the mark of image 1 is <img><|image_1|></img>.
        images: how many there are.

    Raises:
        BadSample: it is not text, empty, or has a mark of an image that is not there.
    """
    if not isinstance(words, str):
        raise BadSample("caption", f"{key} has a prompt of type {type(words).__name__}")
    words, parts, start, marked = clean_text(words, key), [], 0, set()
    for mark in OMNIGEN_MARK.finditer(words) if reads_marks else ():
        number = int(mark[1]) - 1
        if number >= images:
            raise BadSample("row", f"{key} has the mark {mark[0]}, and {images} images")
        parts += [words[start : mark.start()], {"image": str(number)}]
        start = mark.end()
        marked.add(number)
    first = [{"image": str(number)} for number in range(images) if number not in marked]
    prompt = [part for part in [*first, *parts, words[start:]] if not isinstance(part, str) or part.strip()]
    if not prompt:
        raise BadSample("caption", f"{key} has an empty prompt")
    return prompt


def interleave_document(
    key: str, texts: Any, images: Sequence[Any], places: Any = None
) -> tuple[list[str | dict[str, str]], list[Any]]:
    """(parts of a prompt, its images) of a document of texts and images in reading order.

    Args:
        texts: list of strings; without `places` it may have None where `images`, of the same length, has an image (OBELICS).
        images: anything that stands for an image, or None.
        places: for each image the number of the text that it stands in front of (MMC4).

    Raises:
        BadSample: lists that do not fit each other, or nothing in them.
    """
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise BadSample("row", f"{key} has a document whose texts are not a list of strings")
    if places is None:
        if len(images) not in (0, len(texts)):
            raise BadSample(
                "row", f"{key} has a document of {len(texts)} texts and {len(images)} images, without places"
            )
        slots = [[image] for image in images] or [[]] * len(texts)
    else:
        sound = isinstance(places, list) and len(places) == len(images)
        if not sound or not all(isinstance(place, int) and 0 <= place < len(texts) for place in places):
            raise BadSample("row", f"{key} has places of images that do not fit its texts and images")
        slots = [
            [image for image, at in zip(images, places, strict=True) if at == n] for n in range(len(texts))
        ]
    parts, kept = [], []
    for text, before in zip(texts, slots, strict=True):
        for image in before:
            if image is not None:
                parts.append({"image": str(len(kept))})
                kept.append(image)
        if text is not None and text.strip():
            parts.append(clean_text(text, key))
    if not parts:
        raise BadSample("caption", f"{key} has an empty document")
    return parts, kept


class TwoViews:
    """Two views next to each other in one image, as two images, decoded once.

    Args:
        read: reads the image of both.
        border: pixels that are cut off every side of each half.
    """

    read: ReadImage
    border: int
    key: str

    def __init__(self, read: ReadImage, border: int, key: str):
        self.read, self.border, self.key, self._whole = read, border, key, None

    def side(self, name: str) -> Image:
        """The "left" or "right" half, RGB. Raises BadSample."""
        if self._whole is None:
            whole = self.read()
            self._whole = decode_image(whole, self.key) if isinstance(whole, bytes) else whole
        half, start = self._whole.width // 2, SIDES.index(name) * (self._whole.width // 2)
        if min(half, self._whole.height) <= 2 * self.border:
            size = f"{self._whole.width} x {self._whole.height}"
            raise BadSample("image", f"{self.key} has an image of {size}, too small for two views")
        edges = (start + self.border, self.border, start + half - self.border)
        return self._whole.crop((*edges, self._whole.height - self.border))


def image_file(image: bytes | Image, kept: Sequence[str] = ("JPEG", "PNG", "WEBP")) -> tuple[str, bytes]:
    """(ending, bytes) of an image as a file: a file of a `kept` format as it is, all else as PNG. Raises BadSample."""
    if isinstance(image, bytes):
        try:
            with PIL.Image.open(io.BytesIO(image), formats=kept) as opened:
                return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[opened.format], image
        except (OSError, KeyError):
            image = decode_image(image, "the image")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
