"""Folders of images with text files, and shards whose members have other names: the uses of a line."""

import json
import pickle
import random

import pytest
from support.stored_data import encode, read, shade, shown, write_files, write_tar

from kosmos_g_diffusers.data import BadSample, build_source
from kosmos_g_diffusers.data.sample import IMAGE_LENGTH

# Folders -------------------------------------------------------------------------------------------------------------


def test_images_have_their_captions_next_to_them(tmp_path):
    files = {
        "10_dog/a.png": encode(10),
        "10_dog/a.txt": "\ufeffa dog\n",
        "b.PNG": encode(20),
        "b.caption": "a cat",
    }
    folder = write_files(
        tmp_path, {**files, ".cache/c.png": encode(30), ".d.png": encode(40), "notes.txt": "x"}
    )
    source = build_source(f"folder:{folder}")
    assert (len(source), source.groups, source.length(0)) == (2, [2], 9)
    assert source.read(0, random.Random(0)).key == f"{folder.name}/10_dog/a.png"
    samples = [source.read(index, random.Random(0)) for index in (0, 1)]
    assert [(sample.caption, shade(sample.target)) for sample in samples] == [("a dog", 10), ("a cat", 20)]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1, random.Random(0)).caption == "a cat"


def test_endings_of_a_line_name_the_files_of_edits_and_prompts(tmp_path):
    files = {
        "1_after.png": encode(10),
        "1_before.png": encode(20),
        "1.txt": "make it snow",
        "1.in": "a garden",
    }
    edits = (
        f"folder:{write_files(tmp_path / 'a', files)}?image=_after.png&source=_before.png&edit=.txt&input=.in"
    )
    assert shown(read(edits, 0, word_dropout=0)) == ["a garden", 20, "make it snow"]
    assert (
        shown(read(edits, 0, word_dropout=1)) == [20, "make it snow"] and shade(read(edits, 0).target) == 10
    )
    assert build_source(edits).length(0) == len("make it snowa garden") + IMAGE_LENGTH
    words = "<img><|image_2|></img> on <img><|image_1|></img>"
    files = {"x.out.png": encode(1), "x.0.png": encode(2), "x.1.png": encode(3), "x.txt": words}
    prompts = f"folder:{write_files(tmp_path / 'b', files)}?image=.out.png&images=.0.png,.1.png&prompt=.txt"
    assert shown(read(prompts, 0)) == [3, " on ", 2] and len(build_source(prompts)) == 1


def test_files_that_are_missing_or_damaged_cost_their_sample(tmp_path):
    folder = write_files(
        tmp_path,
        {"a.png": encode(1), "b.png": b"no image", "b.txt": "b", "c.png": encode(3), "c.txt": b"caf\xe9"},
    )
    for index, (cause, message) in enumerate(
        [("caption", "a.png has no a.txt"), ("image", "cannot be read"), ("row", "not UTF-8")]
    ):
        with pytest.raises(BadSample, match=message) as caught:
            read(f"folder:{folder}", index)
        assert caught.value.cause == cause
    with pytest.raises(BadSample, match="a.png has no a_before.png"):
        write_files(folder, {"a.txt": "x"})
        read(f"folder:{folder}?image=.png&source=_before.png&edit=.txt", 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("folder:{}/nowhere", "there is no folder"),
        ("folder:{}", "no file below .* ends in .jpg, .jpeg"),
        (
            "folder:{}?image=.png&edit=.txt",
            "was given image=.png, edit=.txt. An edit needs the images before .source. and after",
        ),
        (
            "folder:{}?image=.png&prompt=.txt",
            "was given image=.png, prompt=.txt. A prompt needs the words .prompt. and its images",
        ),
        ("folder:{}?image=.png", "names no text"),
    ],
)
def test_folders_that_cannot_be_read_are_explained(line, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_source(line.format(tmp_path))


# Shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edits(tmp_path):
    """A shard as others write them: members of names of their own, and JSON with the texts within."""
    fields = {"edit": {"list": ["make it snow", "let it snow"]}, "Words": "a garden"}
    members = {
        "7.original_image.JPG": encode(20),
        "7.edited_image.jpg": encode(10),
        "7.edit_prompt.txt": b"make it snow",
        "7.json": json.dumps(fields).encode(),
    }
    write_tar(tmp_path / "a.tar", members)
    return f"shards:{tmp_path}/a.tar?source=original_image.JPG&image=edited_image.jpg"


def test_members_of_other_names_are_named_in_the_line(edits, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    sample = read(f"{edits}&edit=edit_prompt.txt", 0, **options)
    assert (shown(sample), shade(sample.target), sample.caption) == ([20, "make it snow"], 10, None)
    nested = f"{edits}&edit=json.edit.list&input=json.Words&caption=json.Words"
    drawn = {shown(read(nested, 0, seed, word_dropout=0, **options))[-1] for seed in range(20)}
    assert drawn == {"make it snow", "let it snow"}
    assert shown(read(nested, 0, word_dropout=0, **options))[:2] == ["a garden", 20]
    assert build_source(f"{edits}&edit=edit_prompt.txt", **options).length(0) == 12 + IMAGE_LENGTH
    for edit, message in (
        ("json.text", "has no field text in its .json"),
        ("other.txt", "has no .other.txt, only edit"),
    ):
        with pytest.raises(BadSample, match=message):
            read(f"{edits}&edit={edit}", 0, **options)


def test_query_of_a_url_stays_its_own(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "kosmos_g_diffusers.data.sources.ShardSource",
        lambda where, **options: seen.update(where=where, **options),
    )
    build_source("shards:https://host/{0..9}.tar?signature=a%2Fb&image=jpg&caption=json.text")
    assert seen["where"] == "https://host/{0..9}.tar?signature=a%2Fb"
    assert seen["uses"].names == {"image": "jpg", "caption": "json.text"}
    build_source("shards:https://host/{0..9}.tar?signature=a%2Fb")
    assert seen["where"] == "https://host/{0..9}.tar?signature=a%2Fb" and seen["uses"] is None


def test_the_same_captions_are_the_same_samples_in_every_form(tmp_path):
    """Images of a folder, members of other names, rows of a table: what is read does not depend on how it is stored."""
    datasets = pytest.importorskip("datasets")
    rows = {f"{number:03}": (encode(10 * number), f"dog {number}") for number in range(5)}
    write_files(tmp_path / "folder", {f"{key}.png": image for key, (image, _) in rows.items()})
    write_files(tmp_path / "folder", {f"{key}.txt": text for key, (_, text) in rows.items()})
    members = [
        member
        for key, (image, text) in rows.items()
        for member in ((f"{key}.photo.png", image), (f"{key}.json", json.dumps({"about": text}).encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    images, texts = zip(*rows.values(), strict=True)
    datasets.Dataset.from_dict({"text": texts, "photo": images}).save_to_disk(tmp_path / "table")
    lines = [
        f"folder:{tmp_path}/folder",
        f"shards:{tmp_path}/a.tar?image=photo.png&caption=json.about",
        f"datasets:{tmp_path}/table?image=photo",
    ]
    for index in range(5):
        samples = [read(line, index, cache_dir=tmp_path / "cache") for line in lines]
        assert len({sample.prompt for sample in samples}) == 1
        assert [shade(sample.target) for sample in samples] == [10 * index] * 3
