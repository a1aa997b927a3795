"""Hugging Face datasets as sources of captions, texts and edits."""

import base64
import json
import pickle
import random
import sys

import pytest
from support.stored_data import encode, make_image, shade, shown

from kosmos_g_diffusers.data import BadSample, HubDatasetSource, build_source
from kosmos_g_diffusers.data.sample import IMAGE_LENGTH, FilteredSample

datasets = pytest.importorskip("datasets")


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
        if name == "json":  # sorting by length must not end the run
            with pytest.raises(BadSample, match="'utf-8' codec"):
                source.length(0)
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
    with pytest.raises(ValueError, match="unknown options imags, txt. Known: split"):
        build_source("datasets:x?imags=a&txt=b")


def test_without_datasets_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"kosmos-g-diffusers\[train\]"):
        build_source("datasets:x?image=image")


def test_a_source_can_be_sent_to_workers(captions):
    source = pickle.loads(pickle.dumps(HubDatasetSource(captions, name="d", image="image")))
    assert shade(source.read(1, random.Random(0)).target) == 20


# Columns as they come --------------------------------------------------------------------------------------------------


def test_an_edit_set_without_captions_is_given_in_a_line(edits, tmp_path):
    edits.select_columns(["before", "after", "instruction"]).save_to_disk(tmp_path / "data")
    line = f"datasets:{tmp_path}/data?image=after&edit=instruction&source=before"
    for given in (line, f"{line}&caption="):
        sample = build_source(given).read(0, random.Random(0))
        assert (sample.prompt[-1], sample.caption, shade(sample.target)) == ("make it snow", None, 2)
    with pytest.raises(ValueError, match="no column for caption=result"):
        build_source(f"{line}&caption=result")
    edits.rename_column("what", "text").save_to_disk(
        tmp_path / "text"
    )  # as before, a column of that name is the caption
    source = build_source(f"datasets:{tmp_path}/text?image=after&edit=instruction&source=before")
    assert source.read(0, random.Random(0)).caption == "a garden"
    source = build_source(f"datasets:{tmp_path}/text?image=after&edit=instruction&source=before&caption=")
    assert source.read(0, random.Random(0)).caption is None


def test_of_a_list_of_texts_one_is_drawn():
    rows = {"text": [["a dog", "a hound", " "], [], None, ["a cat"]]}
    source = HubDatasetSource(datasets.Dataset.from_dict(rows), name="d")
    drawn = [source.read(0, random.Random(seed)).caption for seed in range(40)]
    assert set(drawn) == {"a dog", "a hound"} and 10 < drawn.count("a dog") < 30
    assert [source.length(index) for index in range(4)] == [5, 0, 0, 5]
    for index in (1, 2):
        with pytest.raises(BadSample, match=f"d:{index} has a caption of type NoneType"):
            source.read(index, random.Random(0))


def test_instructions_may_be_lists_as_well():
    rows = {"task": [["make it snow", "let it snow"]], "a": [encode(1)], "b": [encode(2)]}
    source = HubDatasetSource(datasets.Dataset.from_dict(rows), name="d", edit="task", source="a", image="b")
    assert {source.read(0, random.Random(seed)).prompt[-1] for seed in range(20)} == set(rows["task"][0])


STORED = {
    "bytes": encode,
    "struct": lambda number: {"bytes": encode(number), "path": None},
    "struct of paths": lambda number: {"bytes": None, "path": f"images/{number}.png"},
    "base64": lambda number: base64.b64encode(encode(number)).decode(),
    "data URL": lambda number: "data:image/png;base64," + base64.b64encode(encode(number)).decode(),
    "relative path": lambda number: f"images/{number}.png",
}


@pytest.mark.parametrize("kind", [*STORED, "absolute path"])
@pytest.mark.parametrize("form", ["parquet", "json"])
def test_images_are_read_however_they_are_stored(kind, form, tmp_path, monkeypatch):
    """As Spark, pandas and DuckDB write them: without what `datasets` says of its own columns."""
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number in (10, 20):
        make_image(number).save(folder / "images" / f"{number}.png")
    store = STORED.get(kind, lambda number: str(folder / "images" / f"{number}.png"))
    rows = [{"text": f"shade {number}", "photo": store(number)} for number in (10, 20)]
    if form == "parquet":
        pandas.DataFrame(rows).to_parquet(folder / "a.parquet")
    elif kind in ("bytes", "struct"):
        pytest.skip("JSON has no bytes")
    else:
        (folder / "a.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = build_source(f"datasets:{form}?data_files={folder}/a.{form}&image=photo")
    for index, number in enumerate((10, 20)):
        sample = source.read(index, random.Random(0))
        assert (sample.caption, shade(sample.target)) == (f"shade {number}", number)


def test_columns_within_others_are_named_with_dots(tmp_path):
    rows = {"meta": [{"caption": "a dog", "more": {"photo": encode(30)}}], "a.b": ["plain"]}
    dataset = datasets.Dataset.from_dict(rows)
    sample = HubDatasetSource(dataset, name="d", caption="meta.caption", image="meta.more.photo").read(
        0, random.Random(0)
    )
    assert (sample.caption, shade(sample.target)) == ("a dog", 30)
    assert HubDatasetSource(dataset, name="d", caption="a.b").read(0, random.Random(0)).caption == "plain"
    with pytest.raises(ValueError, match="no column for caption=meta.text, image=meta.more.photo.x"):
        HubDatasetSource(dataset, name="d", caption="meta.text", image="meta.more.photo.x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://example.org/a.png", "URL of an image, https://example.org/a.png: it is not fetched"),
        ("images/gone.png", "not base64|cannot be read"),
        ("//server/share/a.png", "not base64|cannot be read"),
        (base64.b64encode(b"no image").decode(), "cannot be read"),
        ("ä" * 10, "not base64"),
        ("a\0b", "not base64"),
        ("x" * 5000, "base64|cannot be read"),
        (None, "has no image"),
    ],
)
def test_what_is_not_an_image_costs_its_row(value, message, tmp_path):
    make_image(1).save(tmp_path / "first.png")
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "photo": ["first.png", value]})
    source = HubDatasetSource(dataset, name="d", image="photo", root=tmp_path)
    assert shade(source.read(0, random.Random(0)).target) == 1
    with pytest.raises(BadSample, match=message) as caught:
        source.read(1, random.Random(0))
    assert caught.value.cause == "image"


def test_columns_of_words_and_numbers_are_not_taken_for_images(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["a dog"], "number": [3], "words": [["a"]]})
    for column, message in (
        ("number", "holds Value.*int64.*, not images"),
        ("text", "holds text such as 'a dog', not images"),
    ):
        with pytest.raises(ValueError, match=message):
            HubDatasetSource(dataset, name="d", image=column, root=tmp_path)
    with pytest.raises(ValueError, match=r"holds (List|Sequence|\[).*, not images"):
        HubDatasetSource(dataset, name="d", image="words")


def test_prompts_have_their_images_where_the_words_mark_them(tmp_path, monkeypatch):
    """JSON lines as OmniGen's X2I and X2I2 have them; without marks, as in MetaQuery_Instruct, the images come first."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(4):
        make_image(10 * number).save(tmp_path / f"{number}.png")
    mark = "<img><|image_{}|></img>"
    rows = [
        {
            "instruction": f"The man of {mark.format(2)} in the coat of {mark.format(1)}.",
            "input_images": ["1.png", "2.png"],
        },
        {"instruction": "a cat on a sofa", "input_images": ["1.png", "2.png"]},
        {"instruction": f"A hat of {mark.format(3)}", "input_images": ["1.png", "2.png"]},
    ]
    lines = [json.dumps({"task_type": "x", **row, "output_image": "3.png"}) + "\n" for row in rows]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    line = f"datasets:json?data_files={tmp_path}/x.jsonl&image=output_image&prompt=instruction&images=input_images"

    source = build_source(line)
    assert shown(source.read(0, random.Random(0))) == ["The man of ", 20, " in the coat of ", 10, "."]
    assert shown(source.read(1, random.Random(0))) == [10, 20, "a cat on a sofa"]
    assert (
        shade(source.read(0, random.Random(0)).target) == 30
        and source.read(0, random.Random(0)).caption is None
    )
    with pytest.raises(BadSample, match="has the mark .*image_3.*, and 2 images"):
        source.read(2, random.Random(0))
    assert shown(build_source(f"{line}&marks=none").read(0, random.Random(0)))[:2] == [10, 20]
    # read as captions, they would train the marks
    captions = build_source(
        f"datasets:json?data_files={tmp_path}/x.jsonl&caption=instruction&image=output_image"
    )
    with pytest.raises(
        BadSample, match="has the mark <img><|image_2|></img> of an image in its text: it is a prompt"
    ):
        captions.read(0, random.Random(0))


def test_images_of_a_prompt_may_be_several_columns_and_rows_have_scores():
    rows = {
        "words": ["a", "b"],
        "one": [encode(1), encode(2)],
        "two": [encode(3), encode(4)],
        "quality": [0.9, 0.2],
    }
    dataset = datasets.Dataset.from_dict(rows)
    options = {"prompt": "words", "images": "two,one", "score": "quality", "min_score": "0.5"}
    source = HubDatasetSource(dataset, name="d", **options)
    assert [shade(part) for part in source.read(0, random.Random(0)).prompt[:2]] == [3, 1]
    with pytest.raises(FilteredSample, match="d:1 has the score 0.2, under 0.5"):
        source.read(1, random.Random(0))
    for wrong, message in (
        ({"min_score": "high"}, "min_score=high. Expected a number"),
        ({"score": None}, "Pass both, or none"),
        ({"images": None}, "A prompt needs the words .prompt. and its images"),
        ({"marks": "mine"}, "marks=mine. Expected one of omnigen, none"),
    ):
        with pytest.raises(ValueError, match=message):
            HubDatasetSource(dataset, name="d", **{**options, **wrong})


# What is not there -----------------------------------------------------------------------------------------------------


def test_missing_splits_hubs_and_tokens_are_explained(captions, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.DatasetDict({"test": captions, "dev": captions}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="has no split 'train', only test, dev: pass split="):
        build_source(f"datasets:{tmp_path}/data")
    (tmp_path / "a.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match="The dataset text cannot be read: Unknown split .test"):
        build_source(f"datasets:text?data_files={tmp_path}/a.txt&split=test")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(
            OSError, match="dataset a/b cannot be fetched: Couldn't reach .* pass a folder that holds it"
        ):
            build_source("datasets:a/b?image=image")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match="The dataset json cannot be read: "):
        build_source(f"datasets:json?data_files={tmp_path}/broken.json")
    with pytest.raises(ValueError, match="Set HF_TOKEN instead") as caught:
        build_source("datasets:a/b?token=hf_secret&image=image")
    assert "secret" not in str(caught.value)
