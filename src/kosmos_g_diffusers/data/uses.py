"""The uses of a line: what each column, member or file of somebody else's data is to us, and the record that they give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .records import SIDES, ReadImage, Record, TwoViews, interleave_document, place_images
from .sample import IMAGE_LENGTH, BadSample, FilteredSample

TEXTS = ("caption", "edit", "input", "prompt", "texts", "places", "entities", "boxes")  # of a name each
SINGLE_IMAGES = ("image", "source")
MARKS = ("omnigen", "none")
OPTIONS = ("marks", "min_score", "split_image", "split_border")
USES = (*SINGLE_IMAGES, *TEXTS, "images", "score", *OPTIONS)


@dataclass(frozen=True)
class Uses:
    """What the uses of a line name.

    Attributes:
        names: use -> name of a column, member or file; uses that are not there are left out.
        images: names of the images of a prompt or document, or of entities.
        scores: names of numbers, of which the smallest counts.
        min_score: samples below are left out; None keeps all.
        marks: "omnigen" reads the marks of images in prompts.
        split_image: half of `image` that is drawn; the other one is shown. None takes `image` whole.
        split_border: pixels cut off each side of both halves.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[str] = ()
    scores: Sequence[str] = ()
    min_score: float | None = None
    marks: str = MARKS[0]
    split_image: str | None = None
    split_border: int = 0

    @property
    def all_names(self) -> list[tuple[str, str]]:
        """(use, name) of everything that is read."""
        several = [("images", name) for name in self.images] + [("score", name) for name in self.scores]
        return [*self.names.items(), *several]

    @property
    def texts(self) -> dict[str, str]:
        return {use: name for use, name in self.names.items() if use in TEXTS}

    def length(self, texts: Mapping[str, Any]) -> int:
        """Rough length of a prompt in characters, from its texts by use."""
        of_images = ("edit" in self.names) or (self.split_image is not None)
        of_images += 0 if "texts" in texts or "entities" in texts else len(self.images)
        characters = 0
        for use, text in texts.items():
            if isinstance(text, list) and use == "places":
                of_images += len(text)
            elif isinstance(text, list) and use in ("entities", "boxes"):
                of_images += len(text) * (use == "boxes" or "boxes" not in texts)
            elif isinstance(text, list) and use == "texts":
                characters += sum(len(part) for part in text if isinstance(part, str))
                of_images += text.count(None)
            else:
                text = text[0] if isinstance(text, list) and text else text
                characters += len(text) if isinstance(text, str) else 0
        return characters + IMAGE_LENGTH * of_images

    def check_score(self, key: str, scores: Sequence[Any]) -> None:
        """Raises FilteredSample for a score under `min_score`, BadSample for what is not a number."""
        if self.min_score is None:
            return
        try:
            score = min(float(score) for score in scores)
        except (TypeError, ValueError) as error:
            raise BadSample("row", f"{key} has no score: {', '.join(map(repr, scores))[:100]}") from error
        if not score >= self.min_score:
            raise FilteredSample("score", f"{key} has the score {score:g}, under {self.min_score:g}")

    def make_record(
        self,
        key: str,
        texts: Mapping[str, Any],
        read_one: Callable[[str], ReadImage],
        read_several: Callable[[], Sequence[ReadImage | None]],
    ) -> Record:
        """The record of a sample.

        Args:
            texts: use -> text, list of texts, or what else is there.
            read_one: use ("image", "source") -> function that reads it.
            read_several: gives those of `images`, None where there is none.

        Raises:
            BadSample: what is there does not make a sample.
        """
        images = {"target": read_one("image")} if "image" in self.names else {}
        content = {use: texts[use] for use in ("caption", "input", "edit") if texts.get(use) is not None}
        shown = []
        if self.split_image is not None:
            views = TwoViews(images["target"], self.split_border, key)
            images["target"] = partial(views.side, self.split_image)
            shown = [partial(views.side, SIDES[1 - SIDES.index(self.split_image)])]
        if "edit" in self.names:
            content.setdefault("edit", None)
            source = shown[0] if shown else read_one("source")
            return Record(key, content, {"0.source": source, "0.target": images["target"]})
        if "prompt" in self.names:
            shown = shown or [_there(image, key) for image in read_several()]
            content |= self._place(key, texts.get("prompt"), len(shown))
        elif "texts" in self.names:
            found = read_several() if self.images else []
            content["prompt"], shown = interleave_document(
                key, texts.get("texts"), found, texts.get("places")
            )
        elif "entities" in self.names or "boxes" in self.names:
            content |= _entities(key, texts)
            shown = [_there(image, key) for image in read_several()] if self.images else []
            if shown and len(shown) != len(content["entities"]):
                entities = len(content["entities"])
                raise BadSample("row", f"{key} has {entities} entities and {len(shown)} images of them")
        return Record(key, content, images | {str(number): image for number, image in enumerate(shown)})

    def _place(self, key, words, images):
        """`prompt`, or of a list of several texts `prompts`, with the images where the words mark them."""
        several = (
            [text for text in words if isinstance(text, str) and text.strip()]
            if isinstance(words, list)
            else []
        )
        placed = [place_images(key, text, images, self.marks == "omnigen") for text in several or [words]]
        return {"prompt": placed[0]} if len(placed) == 1 else {"prompts": placed}


def parse_uses(what: str, options: Mapping[str, Any]) -> Uses:
    """Uses from the options of a line.

    Args:
        what: begins errors, such as "The dataset x".
        options: use -> name; None and "" are none. `images` and `score` may be several names with commas between them.

    Raises:
        ValueError: uses that do not go together, or values that are not known.
    """
    given = {use: options.get(use) or None for use in USES}
    names = {use: given[use] for use in (TEXTS[0], *SINGLE_IMAGES, *TEXTS[1:]) if given[use] is not None}
    images, scores = _split(given["images"]), _split(given["score"])
    marks, split, border = given["marks"] or MARKS[0], given["split_image"], given["split_border"] or 0

    def refuse(why):
        shown = ", ".join(f"{use}={value}" for use, value in given.items() if value is not None)
        raise ValueError(f"{what} was given {shown or 'nothing'}. {why}")

    if (given["score"] is None) != (given["min_score"] is None):
        refuse("Pass both, or none of them: score= and min_score=.")
    min_score = _as_number(what, "min_score", given["min_score"], float)
    border = _as_number(what, "split_border", border, int)
    for option, value, known in (("marks", marks, MARKS), ("split_image", split or SIDES[0], SIDES)):
        if value not in known:
            raise ValueError(f"{what} was given {option}={value}. Expected one of {', '.join(known)}.")
    if "edit" in names and not ("image" in names and ("source" in names or split)):
        refuse(
            "An edit needs the images before (source) and after it (image), or both in one (image and split_image)."
        )
    if sum(use in names for use in ("edit", "prompt", "texts")) > 1:
        refuse("Only one of edit, prompt and texts can be given.")
    if "prompt" in names and not images and not split:
        refuse("A prompt needs the words (prompt) and its images (images, or image and split_image).")
    if images and not {"prompt", "texts", "entities"} & set(names):
        refuse("images are those of a prompt (prompt), a document (texts) or its entities (entities).")
    if "texts" in names and (set(names) - {"texts", "places"} or split):
        refuse("A document has texts, images and perhaps places, and nothing else.")
    if "places" in names and "texts" not in names:
        refuse("places are those of the images of a document: they need texts= and images=.")
    if {"entities", "boxes"} & set(names) and not (
        {"image", "caption"} <= set(names) and (images or "boxes" in names)
    ):
        refuse("A composition needs image, caption, and boxes or entities with images or boxes.")
    if split and not ("image" in names and {"prompt", "edit"} & set(names)):
        refuse("split_image cuts image in two: one is drawn, and shown with prompt= or edit= the other.")
    if split and "source" in names:
        refuse("With split_image the image before an edit is the other half of image: leave source out.")
    return Uses(names, images, scores, min_score, marks, split, border)


def find_field(value: Any, field: str) -> Any:
    """What a name with dots stands for within dicts and lists, see `walk`."""
    return walk(value, field.split("."))


def walk(value: Any, names: Sequence[str]) -> Any:
    """The value within dicts and lists that names lead to: `a`, `b` is b in a; `a`, `1` the second of the list a.

    A name within a list of dicts gives the list of its values (`image_info`, `image_name`). Raises KeyError, IndexError, TypeError.
    """
    for place, name in enumerate(names):
        if value is None:
            return None
        if isinstance(value, list) and not name.isdecimal():
            return [walk(one, names[place:]) for one in value]
        value = value[int(name) if isinstance(value, list) else name]
    return value


def _entities(key, texts):
    """`entities` and perhaps `boxes` of a composition; GRIT's boxes say where in the caption their words are."""
    entities, boxes = texts.get("entities"), texts.get("boxes")
    if entities is not None:
        return {"entities": entities} | ({"boxes": boxes} if boxes is not None else {})
    caption, found = texts.get("caption"), {}
    for box in boxes if isinstance(boxes, list) else [None]:
        if not isinstance(box, list) or len(box) < 6 or not isinstance(caption, str):
            raise BadSample(
                "row",
                f"{key} has boxes that are not rows of first and last place in the caption, left, top, right, bottom",
            )
        first, last = (int(place) if isinstance(place, int | float) else 0 for place in box[:2])
        words = caption[max(first, 0) : max(last, 0)].strip()
        if words:
            found.setdefault(words, box[2:6])  # of several of the same words, the first
    return {"entities": list(found), "boxes": list(found.values())}


def _there(image, key):
    if image is None:
        raise BadSample("image", f"{key} has no image")
    return image


def _split(names):
    return [name for name in (names or "").split(",") if name]


def _as_number(what, name, value, kind):
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} was given {name}={value}. Expected a number.") from error
