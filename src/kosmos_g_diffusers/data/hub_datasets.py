"""Hugging Face `datasets` as a source of captions or edits."""

import glob
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from .recipes import WORD_DROPOUT, caption_sample, check_caption, edit_sample
from .sample import IMAGE_LENGTH, BadSample, Sample, decode_image, find_encoding

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_FORMATS = ("text", "json", "csv")  # names of datasets' own readers
REPLACED = "\ufffd"  # what they make of bytes in another encoding
GROUP = 10_000  # rows that are shuffled together: an Arrow table has no files to shuffle


class HubDatasetSource:
    """Rows of a map-style `datasets.Dataset`: captioned images, texts, or edits where an `edit` column is named.

    Args:
        dataset: a `datasets.Dataset`.
        name: for messages.
        caption: column of the caption; with `edit`, of what the edited image shows (may be None).
        image: column of the image to draw: the captioned or the edited one; None reads text alone.
        edit: column of the instruction; None for captions.
        source: column of the image before the edit.
        input: column of what that shows, which is dropped with probability `word_dropout`.

    Raises:
        ValueError: no rows, or a column that is not there (those there are listed).
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
        caption: str | None = "text",
        image: str | None = None,
        edit: str | None = None,
        source: str | None = None,
        input: str | None = None,
        word_dropout: float = WORD_DROPOUT,
    ):
        import datasets

        columns = {"caption": caption, "image": image, "edit": edit, "source": source, "input": input}
        there = dataset.column_names
        missing = [f"{use}={column}" for use, column in columns.items() if column not in (None, *there)]
        if missing:
            raise ValueError(
                f"The dataset {name} has no column for {', '.join(missing)}. Its columns: {', '.join(there)}."
            )
        if edit is not None and not (image and source):
            raise ValueError(
                f"The dataset {name} was given edit={edit} with source={source} and image={image}. An edit needs the "
                "columns of the image before (source) and after (image)."
            )
        if len(dataset) == 0:
            raise ValueError(f"No data found: the dataset {name} holds no rows.")
        for column in (image, source):
            if column is not None:
                if not isinstance(dataset.features[column], datasets.Image):
                    raise ValueError(
                        f"The column {column} of the dataset {name} holds {dataset.features[column]}, not images. "
                        "Expected a column of the feature datasets.Image."
                    )
                # the bytes as they are: decoding is ours, where a bad image costs one sample
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.name, self.columns, self.word_dropout = dataset, name, columns, word_dropout
        texts = [columns[use] for use in ("caption", "edit", "input") if columns[use] is not None]
        self._texts = dataset.select_columns(texts)
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

        Raises:
            ImportError: the package datasets is not installed.
            ValueError: as the class does.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "Reading Hugging Face datasets needs the package datasets: pip install 'kosmos-g-diffusers[train]'"
            ) from error
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(name)
            dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        else:
            dataset = datasets.load_dataset(
                name,
                config,
                split=split,
                revision=revision,
                data_dir=data_dir,
                data_files=data_files,
                **_encoding_options(name, data_files),
            )
        return cls(dataset, name=name, **columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def length(self, index: int) -> int:
        texts = [text for text in self._texts[int(index)].values() if isinstance(text, str)]
        return sum(map(len, texts)) + IMAGE_LENGTH * (self.columns["edit"] is not None)

    def read(self, index: int, rng: Random) -> Sample:
        key = f"{self.name}:{index}"
        try:
            row = self.dataset[int(index)]
        except Exception as error:  # whatever Arrow or a file of the dataset raises costs this row
            raise BadSample("row", f"{key} cannot be read ({error})") from error
        values = {use: row[column] for use, column in self.columns.items() if column is not None}
        texts = (values.get(use) for use in ("caption", "edit", "input"))
        if self.name in TEXT_FORMATS and any(REPLACED in text for text in texts if isinstance(text, str)):
            raise BadSample("row", f"{key} has text that is not UTF-8. Save it as UTF-8")
        target = self._image(values["image"], key) if "image" in values else None
        if "edit" not in values:
            return caption_sample(key, values.get("caption"), target)
        source, caption = self._image(values["source"], key), values.get("caption")
        caption = check_caption(caption, key) if caption is not None else None
        words, edit = values.get("input"), values["edit"]
        return edit_sample(key, words, edit, source, target, caption, rng, self.word_dropout)

    @staticmethod
    def _image(value, key):
        if not isinstance(value, dict):
            raise BadSample("image", f"{key} has no image")
        data = value.get("bytes")
        if data is None:
            try:
                data = Path(value["path"]).read_bytes()
            except (OSError, TypeError, KeyError) as error:
                raise BadSample("image", f"{key} has an image that cannot be read ({error})") from error
        return decode_image(data, key)


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
