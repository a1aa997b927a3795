"""Hugging Face `datasets` as a source of captions, edits or prompts."""

import glob
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import first_line
from .recipes import WORD_DROPOUT, draw_text, sample_of_uses
from .sample import (
    IMAGE_LENGTH,
    BadSample,
    FilteredSample,
    Sample,
    decode_base64_image,
    decode_image,
    find_encoding,
)

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset

TEXT_FORMATS = ("text", "json", "csv")  # names of datasets' own readers
REPLACED = "\ufffd"  # what they make of bytes in another encoding
GROUP = 10_000  # rows that are shuffled together: an Arrow table has no files to shuffle
CAPTION = "text"  # its column, unless said otherwise
MARKS = ("omnigen", "none")
MOST_PATH = 4096  # characters
IMAGES = "images, bytes, {bytes, path}, base64 or paths of files"


class HubDatasetSource:
    """Rows of a map-style `datasets.Dataset`: captioned images, texts, edits where an `edit` column is named, or prompts.

    Columns are named as they are, those within others with dots (`meta.caption`). Texts may be lists of strings, of which one is
    drawn each time. Images may be of the feature datasets.Image, bytes, dicts of bytes and path, base64 or paths of files.

    Args:
        dataset: a `datasets.Dataset`.
        name: for messages.
        caption: column of the caption; with `edit`, of what the edited image shows; with `prompt`, of what the target shows. None or
            "" is none; the default is left out of edits and prompts where there is no such column.
        image: column of the image to draw: the captioned or the edited one; None reads text alone.
        edit: column of the instruction; None for captions.
        source: column of the image before the edit.
        input: column of what that shows, which is dropped with probability `word_dropout`.
        prompt: column of the words of a prompt with images.
        images: columns of these images, with commas between them; lists of images too.
        marks: "omnigen" puts each image where the words have its `<img><|image_1|></img>`; those without a mark come first, as with
            "none" all of them do.
        score, min_score: rows whose number in this column is smaller are left out.
        root: folder that paths of images are relative to; None takes no paths.

    Raises:
        ValueError: no rows, a column that is not there (those there are listed) or does not hold images.
    """

    dataset: "Dataset"
    name: str
    columns: dict[str, str | None]
    word_dropout: float
    groups: list[int]

    def __init__(
        self,
        dataset: "Dataset",
        *,
        name: str,
        caption: str | None = CAPTION,
        image: str | None = None,
        edit: str | None = None,
        source: str | None = None,
        input: str | None = None,
        prompt: str | None = None,
        images: str | None = None,
        marks: str = MARKS[0],
        score: str | None = None,
        min_score: float | str | None = None,
        root: str | Path | None = None,
        word_dropout: float = WORD_DROPOUT,
    ):
        if caption == CAPTION and (edit or prompt) and find_column(dataset.features, CAPTION) is None:
            caption = None
        columns = {"caption": caption, "image": image, "edit": edit, "source": source, "input": input}
        columns |= {"prompt": prompt, "score": score}
        self.columns = columns = {use: column or None for use, column in columns.items()}
        self.images = [column for column in (images or "").split(",") if column]
        named = [(use, column) for use, column in columns.items() if column is not None]
        named += [("images", column) for column in self.images]
        self._places = {column: find_column(dataset.features, column) for _, column in named}
        missing = [f"{use}={column}" for use, column in named if self._places[column] is None]
        if missing:
            raise ValueError(
                f"The dataset {name} has no column for {', '.join(missing)}. Its columns: {', '.join(dataset.column_names)}."
            )
        if columns["edit"] is not None and not (image and source):
            raise ValueError(
                f"The dataset {name} was given edit={edit} with source={source} and image={image}. An edit needs the "
                "columns of the image before (source) and after (image)."
            )
        if (prompt is None) != (not self.images) or (prompt and edit):
            raise ValueError(
                f"The dataset {name} was given prompt={prompt}, images={images} and edit={edit}. A prompt needs the columns of its "
                "words (prompt) and of its images (images), and is not an edit."
            )
        if marks not in MARKS:
            raise ValueError(
                f"The dataset {name} was given marks={marks}. Expected one of {', '.join(MARKS)}."
            )
        self.marks, self.min_score = marks, _as_score(name, score, min_score)
        if len(dataset) == 0:
            raise ValueError(f"No data found: the dataset {name} holds no rows.")
        self.name, self.word_dropout = name, word_dropout
        self.root = None if root is None else Path(root)
        # as Arrow has them, only those that are used: decoding is ours, where a bad image costs one sample
        self.dataset = _select(dataset, self._places.values())
        self._text_uses = [use for use in ("caption", "edit", "input", "prompt") if columns[use] is not None]
        self._texts = _select(dataset, [self._places[columns[use]] for use in self._text_uses])
        for column in [columns[use] for use in ("image", "source") if columns[use] is not None] + self.images:
            self._check_images(column, is_list_allowed=column in self.images)
        self.groups = [min(GROUP, len(dataset) - first) for first in range(0, len(dataset), GROUP)]

    @classmethod
    def load(
        cls,
        name: str,
        *,
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        data_dir: str | None = None,
        data_files: str | None = None,
        **columns: Any,
    ) -> "HubDatasetSource":
        """Load by name from the Hub, or from a folder: one of `save_to_disk`, or one that `load_dataset` reads.

        Paths of images are relative to that folder, `data_dir` or the folder of `data_files`.

        Raises:
            ImportError: the package datasets is not installed.
            OSError: it is not there, or the Hub cannot be reached.
            ValueError: it cannot be read, or has no such split; and as the class does.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "Reading Hugging Face datasets needs the package datasets: pip install 'kosmos-g-diffusers[train]'"
            ) from error
        try:
            if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
                dataset = datasets.load_from_disk(name)
                if isinstance(dataset, datasets.DatasetDict):
                    if split not in dataset:
                        raise ValueError(f"it has no split {split!r}, only {', '.join(dataset)}: pass split=")
                    dataset = dataset[split]
            else:
                options = {
                    "data_dir": data_dir,
                    "data_files": data_files,
                    **_encoding_options(name, data_files),
                }
                dataset = datasets.load_dataset(name, config, split=split, revision=revision, **options)
        except ConnectionError as error:
            raise OSError(
                f"The dataset {name} cannot be fetched: {first_line(error)}. Without a network pass a folder that holds it: "
                "datasets:/data/folder?..."
            ) from error
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = (
                error.__cause__ or error
                if isinstance(error, datasets.exceptions.DatasetGenerationError)
                else error
            )
            raise ValueError(f"The dataset {name} cannot be read: {first_line(reason)}.") from error
        return cls(dataset, name=name, root=_root_of(name, data_dir, data_files), **columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def length(self, index: int) -> int:
        row = self._row(self._texts, index) if self._text_uses else {}
        texts = [self._value(row, self.columns[use]) for use in self._text_uses]
        texts = [text[0] if isinstance(text, list) and text else text for text in texts]
        images = (self.columns["edit"] is not None) + len(self.images)
        return sum(len(text) for text in texts if isinstance(text, str)) + IMAGE_LENGTH * images

    def read(self, index: int, rng: Random) -> Sample:
        key = f"{self.name}:{index}"
        row = self._row(self.dataset, index)
        values = {use: self._value(row, column) for use, column in self.columns.items() if column is not None}
        self._check_score(values.get("score"), key)
        texts = {use: draw_text(values[use], rng) for use in self._text_uses}
        if self.name in TEXT_FORMATS and any(
            REPLACED in text for text in texts.values() if isinstance(text, str)
        ):
            raise BadSample("row", f"{key} has text that is not UTF-8. Save it as UTF-8")
        target = self._image(values["image"], key) if "image" in values else None
        source = self._image(values["source"], key) if "source" in values else None
        images = [
            image for column in self.images for image in self._list_images(self._value(row, column), key)
        ]
        options = {"reads_marks": self.marks == "omnigen", "word_dropout": self.word_dropout}
        return sample_of_uses(key, texts, target, rng, source, images, **options)

    def _row(self, dataset, index):
        try:
            return dataset[int(index)].to_pylist()[0]
        except Exception as error:  # whatever Arrow or a file of the dataset raises costs this row
            raise BadSample("row", f"{self.name}:{index} cannot be read ({error})") from error

    def _value(self, row, column):
        for name in self._places[column].names:
            row = None if row is None else row[name]
        return row

    def _check_score(self, score, key):
        if self.min_score is None:
            return
        if not isinstance(score, (int, float)):
            raise BadSample("row", f"{key} has no score: {score!r}")
        if not score >= self.min_score:
            raise FilteredSample("score", f"{key} has the score {score:g}, under {self.min_score:g}")

    def _list_images(self, value, key):
        """The images of a column, of which each may be a list."""
        if value is None:
            raise BadSample("image", f"{key} has no images")
        return [self._image(one, key) for one in (value if isinstance(value, list) else [value])]

    def _image(self, value: Any, key: str) -> "PIL.Image.Image":
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            return decode_image(value, key)
        if isinstance(value, str):
            if value.startswith("data:"):
                value = value.partition(",")[2]
            elif (file := self._find_file(value, key)) is not None:
                return decode_image(file.read_bytes(), key)
            return decode_base64_image(value.encode("utf-8", "replace"), key)
        if path is None:
            raise BadSample("image", f"{key} has no image")
        try:
            return decode_image((Path(path) if self.root is None else self.root / path).read_bytes(), key)
        except OSError as error:
            raise BadSample("image", f"{key} has an image that cannot be read ({error})") from error

    def _find_file(self, text, key):
        """The file that a string names, None if it names none."""
        if len(text) > MOST_PATH or "\0" in text or "\n" in text:
            return None
        if text.lower().startswith(("http://", "https://")):
            raise BadSample("image", f"{key} has the URL of an image, {text[:100]}: it is not fetched")
        if self.root is None or text.startswith(
            ("//", "\\\\")
        ):  # on Windows, these are paths on other machines
            return None
        try:
            file = self.root / text
            return file if file.is_file() else None
        except OSError:  # a name that is too long
            return None

    def _check_images(self, column, is_list_allowed):
        """ValueError if a column cannot hold images, or if the first row says that it does not."""
        feature = self._places[column].feature
        kind = _list_item(feature) if is_list_allowed and _list_item(feature) is not None else feature
        problem = None if _holds_images(kind) else f"{feature}, not images"
        if problem is None and str(getattr(kind, "dtype", "")).startswith(("string", "large_string")):
            value = self._value(self.dataset[0].to_pylist()[0], column)
            value = value[0] if isinstance(value, list) and value else value
            try:
                if isinstance(value, str):
                    self._image(value, column)
            except (BadSample, OSError):
                places = "base64" if self.root is None else f"base64, nor a file below {self.root}"
                problem = f"text such as {value[:80]!r}, not images (not {places})"
        if problem is not None:
            raise ValueError(
                f"The column {column} of the dataset {self.name} holds {problem}. Expected {IMAGES}."
            )


class Column(NamedTuple):
    """Where a value lies in a row: names from the row inwards, and datasets' feature of it."""

    names: tuple[str, ...]
    feature: Any


def find_column(features: Any, name: str) -> Column | None:
    """The column of a name; `a.b` is b within a, unless a column is called so. None if there is none."""
    if name in features:
        return Column((name,), features[name])
    for place in range(len(name)):
        inner = features.get(name[:place]) if name[place] == "." else None
        if isinstance(inner, dict) and (found := find_column(inner, name[place + 1 :])) is not None:
            return Column((name[:place], *found.names), found.feature)
    return None


def _select(dataset, columns):
    return dataset.select_columns(list(dict.fromkeys(column.names[0] for column in columns))).with_format(
        "arrow"
    )


def _list_item(feature):
    """The feature of the elements of a list, None of anything else."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _holds_images(feature):
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in (
        *("binary", "large_binary", "binary_view"),
        *("string", "large_string", "string_view"),
    )


def _as_score(name, score, min_score):
    if (score is None) != (min_score is None):
        raise ValueError(
            f"The dataset {name} was given score={score} and min_score={min_score}. Pass both, or none of them."
        )
    try:
        return None if min_score is None else float(min_score)
    except ValueError as error:
        raise ValueError(f"The dataset {name} was given min_score={min_score}. Expected a number.") from error


def _root_of(name, data_dir, data_files):
    """The folder that paths of images are relative to."""
    if data_files is not None:
        found = glob.glob(data_files, recursive=True)
        return Path(found[0]).parent if found else None
    return next(
        (Path(place) for place in (data_dir, name) if place is not None and Path(place).is_dir()), None
    )


def _encoding_options(name, data_files):
    """How datasets' own readers decode local files: by their byte order mark, and bad bytes do not end the run."""
    if name not in TEXT_FORMATS or data_files is None:
        return {}
    encodings = set()
    for path in glob.glob(data_files, recursive=True):
        with open(path, "rb") as file:
            encodings.add(find_encoding(file.read(4))[0])
    if len(encodings) > 1:
        raise ValueError(
            f"The files {data_files} are in several encodings: {', '.join(sorted(encodings))}. Save all as UTF-8."
        )
    options = {} if name == "json" else {"encoding_errors": "replace"}
    if encodings - {"utf-8"}:
        options["encoding"] = encodings.pop().rpartition("-")[0]  # Python leaves the mark out by these names
    return options
