"""Hugging Face `datasets` as a source of captions, edits or prompts."""

import glob
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import first_line
from .parquet_files import CACHE_GIB, ParquetFiles, find_parquet_files
from .recipes import BACKGROUND, WORD_DROPOUT
from .records import Record
from .sample import MOST_IMAGE_BYTES, BadSample, Sample, decode_base64, decode_image, find_encoding
from .uses import SINGLE_IMAGES, Uses, parse_uses, walk

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_FORMATS = ("text", "json", "csv")  # names of datasets' own readers
REPLACED = "\ufffd"  # what they make of bytes in another encoding
LENGTH_ROWS = 1000  # whose texts are read at a time
GROUP = 10_000  # rows that are shuffled together: an Arrow table has no files to shuffle
CAPTION = "text"  # its column, unless said otherwise
MOST_PATH = 4096  # characters
IMAGES = "images, bytes, {bytes, path}, base64 or paths of files"


class HubDatasetSource:
    """Rows of a map-style `datasets.Dataset`: captioned images, texts, edits, prompts, documents or compositions.

    Columns are named as they are, those within others with dots (`meta.caption`; `turns.1.value` is of the second of a list). Texts may
    be lists of strings, of which one is drawn each time. Images may be of the feature datasets.Image, bytes, dicts of bytes and path,
    base64 or paths of files.

    Args:
        dataset: a `datasets.Dataset`, or `ParquetFiles`.
        name: for messages.
        caption: column of the caption; with `edit`, of what the edited image shows; with `prompt`, of what the target shows. None or
            "" is none; the default is left out of edits, prompts and documents where there is no such column.
        root: folder that paths of images are relative to; None takes no paths.
        word_dropout, background, cache_dir: as in `TsvSource`.
        uses: what other columns are, see docs/data.md: image, edit, source, input, prompt, images, marks, texts, places, entities, boxes,
            score, min_score, split_image, split_border.

    Raises:
        ValueError: no rows, uses that do not go together, a column that is not there (those there are listed) or does not hold images.
    """

    dataset: "Dataset"
    name: str
    uses: Uses
    word_dropout: float
    background: float
    groups: list[int]

    def __init__(
        self,
        dataset: "Dataset | ParquetFiles",
        *,
        name: str,
        caption: str | None = CAPTION,
        root: str | Path | None = None,
        word_dropout: float = WORD_DROPOUT,
        background: float = BACKGROUND,
        cache_dir: str | Path | None = None,
        **uses: Any,
    ):
        self.cache_dir = cache_dir
        others = any(uses.get(use) for use in ("edit", "prompt", "texts"))
        if (
            caption == CAPTION
            and others
            and (uses.get("texts") or find_column(dataset.features, CAPTION) is None)
        ):
            caption = None
        self.uses = parse_uses(f"The dataset {name}", {**uses, "caption": caption})
        self._places = {column: find_column(dataset.features, column) for _, column in self.uses.all_names}
        missing = [f"{use}={column}" for use, column in self.uses.all_names if self._places[column] is None]
        if missing:
            raise ValueError(
                f"The dataset {name} has no column for {', '.join(missing)}. Its columns: {', '.join(dataset.column_names)}."
            )
        if len(dataset) == 0:
            raise ValueError(f"No data found: the dataset {name} holds no rows.")
        self.name, self.word_dropout, self.background = name, word_dropout, background
        self.root = None if root is None else Path(root)
        # as Arrow has them, only those that are used: decoding is ours, where a bad image costs one sample
        self.dataset = _select(dataset, self._places.values())
        self._texts = _select(dataset, [self._places[column] for column in self.uses.texts.values()])
        for use in SINGLE_IMAGES:
            if use in self.uses.names:
                self._check_images(self.uses.names[use], is_list_allowed=False)
        for column in self.uses.images:
            self._check_images(column, is_list_allowed=True)
        self.groups = getattr(dataset, "groups", None) or [
            min(GROUP, len(dataset) - first) for first in range(0, len(dataset), GROUP)
        ]

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
        streaming: str | bool = False,
        cache_gib: str | float | None = None,
        cache_dir: str | Path | None = None,
        root: str | None = None,
        **columns: Any,
    ) -> "HubDatasetSource":
        """Load by name from the Hub, or from a folder: one of `save_to_disk`, or one that `load_dataset` reads.

        Paths of images are relative to that folder, `data_dir` or the folder of `data_files`.

        Args:
            streaming: fetch files of Parquet one by one when they are needed, see `ParquetFiles`; "true" and "false" in lines.
            cache_gib, cache_dir: of `ParquetFiles`.
            root: another folder that paths of images are relative to.

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
            root = root or _root_of(name, data_dir, data_files)
            if _is_true(name, streaming):
                options = {"data_dir": data_dir, "data_files": data_files, "revision": revision}
                urls = find_parquet_files(name, split, config, **options)
                gib = CACHE_GIB if cache_gib is None else _as_gib(name, cache_gib)
                files = ParquetFiles(urls, cache_dir=cache_dir, cache_gib=gib)
                return cls(files, name=name, root=root, cache_dir=cache_dir, **columns)
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
        return cls(dataset, name=name, root=root, cache_dir=cache_dir, **columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def identify(self, first: int, last: int) -> tuple[Any, ...] | None:
        """What the lengths of these rows depend on; None if `datasets` does not say."""
        fingerprint = getattr(self.dataset, "fingerprint", None) or getattr(self._texts, "_fingerprint", None)
        return None if fingerprint is None else (fingerprint, sorted(self.uses.all_names), first, last)

    def lengths(self, first: int, last: int) -> list[int]:
        """Lengths of many rows."""
        found = []
        for start in range(first, last, LENGTH_ROWS):
            rows = range(start, min(start + LENGTH_ROWS, last))
            try:
                values = (
                    self._texts[rows.start : rows.stop].to_pylist() if self.uses.texts else [{}] * len(rows)
                )
            except Exception:  # a row or file that cannot be read: one by one
                values = []
            if len(values) == len(rows):
                found += [self._length_of(row) for row in values]
            else:
                found += [self._length_or_none(row) for row in rows]
        return found

    def _length_or_none(self, index):
        try:
            return self.length(index)
        except BadSample:  # counted when it is read
            return 0

    def _length_of(self, row):
        return self.uses.length({use: self._value(row, column) for use, column in self.uses.texts.items()})

    def length(self, index: int) -> int:
        return self._length_of(self._row(self._texts, index) if self.uses.texts else {})

    def read(self, index: int, rng: Random) -> Sample:
        return self.record(index).make_sample(rng, self.word_dropout, self.background)

    def record(self, index: int) -> Record:
        """Row number `index` as it is stored. Raises BadSample."""
        key = f"{self.name}:{index}"
        row = self._row(self.dataset, index)
        self.uses.check_score(key, [self._value(row, column) for column in self.uses.scores])
        texts = {use: self._value(row, column) for use, column in self.uses.texts.items()}
        if self.name in TEXT_FORMATS and any(REPLACED in text for text in _strings(list(texts.values()))):
            raise BadSample("row", f"{key} has text that is not UTF-8. Save it as UTF-8")

        def read_one(use):
            return partial(self._read_image, self._value(row, self.uses.names[use]), key)

        def read_several():
            columns = [self._value(row, column) for column in self.uses.images]
            if None in columns:
                raise BadSample("image", f"{key} has no images")
            values = [one for value in columns for one in (value if isinstance(value, list) else [value])]
            return [None if one is None else partial(self._read_image, one, key) for one in values]

        return self.uses.make_record(key, texts, read_one, read_several)

    def _row(self, dataset, index):
        try:
            return dataset[int(index)].to_pylist()[0]
        except BadSample:
            raise
        except Exception as error:  # whatever Arrow or a file of the dataset raises costs this row
            raise BadSample("row", f"{self.name}:{index} cannot be read ({error})") from error

    def _value(self, row, column):
        try:
            return walk(row, self._places[column].names)
        except (KeyError, IndexError, TypeError):  # a list that is too short
            return None

    def _read_image(self, value: Any, key: str) -> bytes:
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            if value.startswith("data:"):
                value = value.partition(",")[2]
            elif (file := self._find_file(value, key)) is not None:
                return _read_file(file)
            return decode_base64(value.encode("utf-8", "replace"), key)
        if path is None:
            raise BadSample("image", f"{key} has no image")
        try:
            return _read_file(Path(path) if self.root is None else self.root / path)
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
            value = next(filter(None, value), None) if isinstance(value, list) else value
            try:
                if isinstance(value, str):
                    decode_image(self._read_image(value, column), column)
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
    """The column of a name; `a.b` is b within a, unless a column is called so. None if there is none.

    Within lists, `a.1` is the second element, and `a.b` the list of b of all elements.
    """
    item = _list_item(features)
    if item is not None:
        first, _, rest = name.partition(".")
        found = (
            find_column(item, rest if first.isdecimal() else name)
            if rest or not first.isdecimal()
            else Column((), item)
        )
        if found is None:
            return None
        return (
            Column((first, *found.names), found.feature)
            if first.isdecimal()
            else Column(found.names, [found.feature])
        )
    if not isinstance(features, dict):
        return None
    if name in features:
        return Column((name,), features[name])
    for place in range(len(name)):
        inner = features.get(name[:place]) if name[place] == "." else None
        if inner is not None and (found := find_column(inner, name[place + 1 :])) is not None:
            return Column((name[:place], *found.names), found.feature)
    return None


def _strings(value):
    """All texts within lists."""
    if isinstance(value, list):
        return [text for one in value for text in _strings(one)]
    return [value] if isinstance(value, str) else []


def _read_file(file):
    with open(file, "rb") as opened:
        return opened.read(MOST_IMAGE_BYTES + 1)


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


def _is_true(name, streaming):
    if str(streaming).lower() not in ("true", "false"):
        raise ValueError(f"The dataset {name} was given streaming={streaming}. Expected true or false.")
    return str(streaming).lower() == "true"


def _as_gib(name, value):
    try:
        number = float(value)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise ValueError(f"The dataset {name} was given cache_gib={value}. Expected a number of GiB above 0.")
    return number


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
