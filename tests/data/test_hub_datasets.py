"""Hugging Face datasets as sources of captions, texts and edits."""

import json
import pickle
import random
import sys

import numpy as np
import PIL.Image
import pytest

from kosmos_g_diffusers.data import BadSample, HubDatasetSource, build_source
from kosmos_g_diffusers.data.sample import IMAGE_LENGTH

datasets = pytest.importorskip("datasets")


def make_image(shade):
    return PIL.Image.new("RGB", (8, 8), (shade, 0, 0))


def shade(image):
    return int(np.asarray(image)[0, 0, 0])


@pytest.fixture
def captions():
    rows = {"text": ["a dog", "a cat", " "], "image": [make_image(10), make_image(20), make_image(30)]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture
def edits():
    rows = {
        "before": [make_image(1)],
        "after": [make_image(2)],
        "instruction": ["make it snow"],
        "what": ["a garden"],
        "result": ["a garden in snow"],
    }
    table = datasets.Dataset.from_dict(rows)
    return table.cast_column("before", datasets.Image()).cast_column("after", datasets.Image())


EDIT_COLUMNS = {
    "edit": "instruction",
    "source": "before",
    "image": "after",
    "input": "what",
    "caption": "result",
}


def test_captions(captions):
    source = HubDatasetSource(captions, name="pets", image="image")
    sample = source.read(1, random.Random(0))
    assert (sample.key, sample.prompt, sample.caption, shade(sample.target)) == (
        "pets:1",
        ("a cat",),
        "a cat",
        20,
    )
    assert (len(source), source.groups, source.length(0)) == (3, [3], 5)
    with pytest.raises(BadSample, match="pets:2 has an empty caption"):
        source.read(2, random.Random(0))


def test_text_alone(captions):
    sample = HubDatasetSource(captions, name="pets").read(0, random.Random(0))
    assert (sample.prompt, sample.target) == (("a dog",), None)


def test_edits(edits):
    source = HubDatasetSource(edits, name="edits", **EDIT_COLUMNS)
    samples = [source.read(0, random.Random(seed)) for seed in range(30)]
    assert {len(sample.prompt) for sample in samples} == {2, 3}
    for sample in samples:
        assert (
            sample.prompt[-1] == "make it snow"
            and shade(sample.prompt[-2]) == 1
            and shade(sample.target) == 2
        )
        assert sample.caption == "a garden in snow"
    assert source.length(0) == len("make it snowa gardena garden in snow") + IMAGE_LENGTH


def test_images_that_are_missing_or_damaged_are_bad_samples():
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = {
        "text": ["a", "b", "c"],
        "image": [None, {"bytes": b"x", "path": None}, {"bytes": None, "path": "/nowhere.png"}],
    }
    source = HubDatasetSource(datasets.Dataset.from_dict(rows, features=features), name="d", image="image")
    for index in range(3):
        with pytest.raises(BadSample, match=f"d:{index} has") as caught:
            source.read(index, random.Random(0))
        assert caught.value.cause == "image"


def test_columns_that_are_not_there_are_named(captions, edits):
    with pytest.raises(
        ValueError, match="no column for caption=caption, image=img. Its columns: text, image"
    ):
        HubDatasetSource(captions, name="d", caption="caption", image="img")
    with pytest.raises(ValueError, match="An edit needs"):
        HubDatasetSource(edits, name="d", caption=None, edit="instruction", image="after")
    with pytest.raises(ValueError, match="column text of the dataset d holds .*not images"):
        HubDatasetSource(captions, name="d", image="text")


def test_a_dataset_without_rows_is_refused(captions):
    with pytest.raises(ValueError, match="No data found: the dataset d holds no rows"):
        HubDatasetSource(captions.select([]), name="d")


def test_a_saved_dataset_is_read_by_a_line_of_text(captions, edits, tmp_path):
    captions.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"test": edits}).save_to_disk(tmp_path / "split")
    plain = build_source(f"datasets:{tmp_path}/plain?image=image&caption=text")
    assert shade(plain.read(0, random.Random(0)).target) == 10
    columns = "&".join(f"{use}={column}" for use, column in EDIT_COLUMNS.items())
    split = build_source(f"datasets:{tmp_path}/split?split=test&{columns}", word_dropout=1)
    assert split.read(0, random.Random(0)).prompt[-1] == "make it snow"
    assert len(split.read(0, random.Random(0)).prompt) == 2


def test_a_folder_of_images_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    make_image(40).save(folder / "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dog"}\n')
    source = build_source(f"datasets:imagefolder?data_dir={folder}&image=image&caption=text")
    sample = source.read(0, random.Random(0))
    assert (sample.caption, shade(sample.target)) == ("a dog", 40)


@pytest.mark.parametrize("name", ["text", "json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_files_are_read_by_their_byte_order_mark(name, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["ein Hund für 3 €", "a cat"]
    lines = texts if name == "text" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "data").write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    source = build_source(f"datasets:{name}?data_files={tmp_path / 'data'}")
    if encoding == "cp1252":
        with pytest.raises(BadSample, match="row: .*(not UTF-8|'utf-8' codec)"):
            source.read(0, random.Random(0))
    else:
        assert source.read(0, random.Random(0)).caption == texts[0]
    if (name, encoding) != ("json", "cp1252"):
        assert source.read(1, random.Random(0)).caption == texts[1]


def test_files_of_several_encodings_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("a dog\n".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"a cat\n")
    with pytest.raises(ValueError, match="in several encodings: utf-16-le, utf-8. Save all as UTF-8"):
        build_source(f"datasets:text?data_files={tmp_path}/*.txt")


def test_unknown_options_of_a_line_are_named():
    with pytest.raises(ValueError, match="unknown options images, txt. Known: split"):
        build_source("datasets:x?images=a&txt=b")


def test_without_datasets_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"kosmos-g-diffusers\[train\]"):
        build_source("datasets:x?image=image")


def test_a_source_can_be_sent_to_workers(captions):
    source = pickle.loads(pickle.dumps(HubDatasetSource(captions, name="d", image="image")))
    assert shade(source.read(1, random.Random(0)).target) == 20
