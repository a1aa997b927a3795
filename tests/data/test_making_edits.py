"""InstructPix2Pix becomes shards of edits: the original folder, data sets, and what either may hold."""

import json
import random

import datasets
import numpy as np
import PIL.Image
import pytest

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.commands import data as data_command
from kosmos_g_diffusers.data import ShardSource
from kosmos_g_diffusers.data.making import EditSettings, instructpix2pix
from kosmos_g_diffusers.data.making.instructpix2pix import EditFolder


def make_image(shade, size=(20, 16)):
    return PIL.Image.new("RGB", size, (shade, shade, shade))


def shade(image):
    return round(int(np.asarray(image)[0, 0, 0]), -1)


def save_edit(folder, number, seeds, **prompt):
    """An edit as the original code writes it: images of 10 * number before and 10 * number + 100 after."""
    place = folder / f"{number:07d}"
    place.mkdir(parents=True)
    prompt = {
        "input": f"garden {number}",
        "edit": f"edit {number}",
        "output": f"snow {number}",
        "url": "x",
    } | prompt
    (place / "prompt.json").write_text(json.dumps(prompt))
    for seed in seeds:
        make_image(10 * number).save(place / f"{seed}_0.jpg")
        make_image(10 * number + 100).save(place / f"{seed}_1.jpg")
    (place / "metadata.jsonl").touch()
    return [place.name, list(seeds)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "clip-filtered"
    seeds = [save_edit(folder, number, [str(900 + n) for n in range(1 + number % 3)]) for number in range(6)]
    (folder / "seeds.json").write_text(json.dumps(seeds))
    return folder


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, data_command))))


def make(output, workers=0, **settings):
    process = {name: settings.pop(name) for name in ("process_index", "num_processes") if name in settings}
    settings = {name: str(value) if name == "folder" else value for name, value in settings.items()}
    return instructpix2pix(output, EditSettings(**settings), workers=workers, sheet_samples=3, **process)


def read(output):
    """Samples by their instruction, with the words."""
    source = ShardSource(output, word_dropout=0)
    samples = [source.read(index, random.Random(0)) for index in range(len(source))]
    return {sample.prompt[-1]: sample for sample in samples}


@pytest.mark.parametrize("listed", [True, False])
def test_training_reads_the_original_folder_as_edits(folder, tmp_path, listed):
    if not listed:
        (folder / "seeds.json").unlink()

    manifest = make(tmp_path / "out", folder=folder, workers=1)

    assert (manifest["samples"], manifest["skipped"]) == (6, {})
    samples = read(tmp_path / "out")
    assert sorted(samples) == [f"edit {number}" for number in range(6)]
    for number in range(6):
        sample = samples[f"edit {number}"]
        assert sample.prompt[0] == f"garden {number}"
        assert sample.caption == f"snow {number}"
        assert shade(sample.prompt[1]) == 10 * number
        assert shade(sample.target) == 10 * number + 100


def test_every_pair_of_an_edit_is_kept(folder, tmp_path):
    place = folder / "0000002"
    for number, seed in enumerate((900, 901, 902)):
        make_image(50 * number).save(place / f"{seed}_0.jpg")
    make(tmp_path / "out", folder=folder)
    source = ShardSource(tmp_path / "out", word_dropout=0)

    drawn = [source.read(index, random.Random(seed)) for seed in range(30) for index in range(6)]

    assert {shade(sample.prompt[1]) for sample in drawn if sample.prompt[-1] == "edit 2"} == {0, 50, 100}


def test_images_are_shrunk_to_the_shorter_side(folder, tmp_path):
    make_image(10, (300, 200)).save(folder / "0000001" / "900_0.jpg")

    make(tmp_path / "out", folder=folder, size=100)

    pair = read(tmp_path / "out")["edit 1"]
    assert {pair.prompt[1].size, pair.target.size} <= {(150, 100), (20, 16)}
    assert any(
        ShardSource(tmp_path / "out", word_dropout=0).read(1, random.Random(seed)).prompt[1].size
        == (150, 100)
        for seed in range(20)
    )


def test_bad_edits_are_counted_and_a_bad_pair_is_left_out(folder, tmp_path):
    (folder / "0000000" / "900_1.jpg").write_bytes(b"broken")  # its only pair
    (folder / "0000001" / "900_1.jpg").unlink()  # of two
    (folder / "0000002" / "prompt.json").write_text("{")
    (folder / "0000003" / "prompt.json").write_text('{"input": "x", "edit": " "}')
    (folder / "0000004" / "prompt.json").write_text('["edit"]')

    manifest = make(tmp_path / "out", folder=folder)

    assert manifest["samples"] == 2
    assert manifest["skipped"] == {"row": 3, "image": 1}
    assert "0000000/900_1.jpg has an image that cannot be read" in manifest["summary"]
    assert set(read(tmp_path / "out")) == {"edit 1", "edit 5"}
    assert "0000001/900_1.jpg cannot be read" in (tmp_path / "out" / "contact-sheet.html").read_text()


def test_edit_without_input_or_output_is_an_edit(folder, tmp_path):
    (folder / "0000001" / "prompt.json").write_text('{"edit": "edit\\t1\\n", "output": 5}')

    make(tmp_path / "out", folder=folder)

    sample = read(tmp_path / "out")["edit 1"]
    assert (len(sample.prompt), sample.caption) == (2, None)


@pytest.mark.parametrize(
    "seeds",
    [
        '[["../clip-filtered/0000001", ["900"]]]',
        '[["..", []]]',
        '[["", []]]',
        '[["a", ["../b"]]]',
        '[["a"]]',
        '{"a": []}',
        "[5]",
    ],
)
def test_seeds_that_lead_elsewhere_or_are_none_are_refused(folder, tmp_path, seeds):
    (folder / "seeds.json").write_text(seeds)

    with pytest.raises(ValueError, match=r"seeds.json is not a list of seeds: .* Expected \[\[NAME"):
        make(tmp_path / "out", folder=folder)


def test_missing_or_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There is no folder .* Pass the folder that holds seeds.json"):
        make(tmp_path / "out", folder=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no edits in .* Expected NAME/prompt.json"):
        make(tmp_path / "out", folder=tmp_path / "empty")


def test_stopped_run_goes_on_and_processes_share(folder, tmp_path, monkeypatch):
    read_edit = EditFolder.read

    def stop(self, item):
        if item.name == "0000004":
            raise KeyboardInterrupt
        return read_edit(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(EditFolder, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out", folder=folder)
    for index in range(2):
        make(tmp_path / "out", folder=folder, process_index=index, num_processes=2)

    assert len(ShardSource(tmp_path / "out")) == 6
    assert len(read(tmp_path / "out")) == 6


def rows():
    return {
        "original_prompt": [f"garden {number}" for number in range(4)],
        "original_image": [make_image(10 * number) for number in range(4)],
        "edit_prompt": [f"edit {number}" for number in range(4)],
        "edited_prompt": [f"snow {number}" for number in range(4)],
        "edited_image": [make_image(10 * number + 100) for number in range(4)],
    }


def test_training_reads_a_data_set_of_the_released_columns_as_edits(tmp_path):
    features = {name: datasets.Image() if "image" in name else datasets.Value("string") for name in rows()}
    values = rows()
    values["edit_prompt"][3] = ""
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).save_to_disk(
        str(tmp_path / "saved")
    )

    manifest = make(tmp_path / "out", dataset=str(tmp_path / "saved"), workers=1)

    assert (manifest["samples"], manifest["skipped"]) == (3, {"caption": 1})
    samples = read(tmp_path / "out")
    assert samples["edit 2"].prompt[0] == "garden 2"
    assert samples["edit 2"].caption == "snow 2"
    assert (shade(samples["edit 2"].prompt[1]), shade(samples["edit 2"].target)) == (20, 120)


def test_columns_of_a_data_set_can_be_named(tmp_path, capsys):
    values = {
        "before": rows()["original_image"],
        "what": rows()["edit_prompt"],
        "after": rows()["edited_image"],
    }
    features = {name: datasets.Value("string") if name == "what" else datasets.Image() for name in values}
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).save_to_disk(
        str(tmp_path / "saved")
    )
    flags = [
        "data",
        "instructpix2pix",
        "--dataset",
        str(tmp_path / "saved"),
        "--output",
        str(tmp_path / "out"),
    ]
    flags += ["--workers", "0"]

    assert cli.main([*flags, "--column", "edit=what"]) == 2
    assert "has no column for" in capsys.readouterr().err
    assert cli.main([*flags, "--column", "edit"]) == 2
    assert "Expected USE=NAME" in capsys.readouterr().err
    named = ["edit=what", "source=before", "image=after", "input=", "caption="]
    assert cli.main([*flags, *(part for name in named for part in ("--column", name))]) == 0

    assert "4 samples in 1 shards" in capsys.readouterr().out
    assert {len(sample.prompt) for sample in read(tmp_path / "out").values()} == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Of folder and dataset, neither was given"),
        ({"folder": "a", "dataset": "b"}, "Of folder and dataset, both was given"),
        ({"folder": "a", "size": 0}, "size is 0; expected a number from"),
        ({"dataset": "a", "columns": (("edit", "x"),)}, "No column was given for source, image"),
    ],
)
def test_settings_that_cannot_be_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        EditSettings(**settings)
