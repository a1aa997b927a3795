"""The script of examples/road: its small language model is read as Kosmos-2, and its data as the lines say."""

import importlib
import random
from pathlib import Path

import pytest
import torch

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTokenizer
from kosmos_g_diffusers.conversion import initialize
from kosmos_g_diffusers.data import build_source


@pytest.fixture
def road(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # as with `python -m examples.road.road`
    return importlib.import_module("examples.road.road")


def test_language_model_saved_as_kosmos_2_comes_back_through_init(road, tmp_path):
    untrained = road.build_untrained(tmp_path / "untrained")
    mllm = road.save_as_kosmos_2(untrained, tmp_path / "mllm")
    fresh = initialize(mllm, road.BASE, tmp_path / "fresh", aligner_layers=1)
    before, after = (
        KosmosGTextEncoder.from_pretrained(folder, subfolder="text_encoder").state_dict()
        for folder in (untrained, fresh)
    )
    for name, tensor in before.items():
        if not name.startswith("aligner."):
            assert torch.equal(after[name], tensor), name
    ours, theirs = (
        KosmosGTokenizer.from_pretrained(folder, subfolder="tokenizer") for folder in (untrained, fresh)
    )
    text = "a small red star on a mint background"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_data_of_others_is_imported_and_read_as_its_lines_say(road, tmp_path, monkeypatch):
    monkeypatch.setattr(road, "SAMPLES", 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines, theirs = road.write_data(tmp_path / "data")
    assert road.write_data(tmp_path / "data") == (lines, theirs)  # a second time makes nothing
    (captions,) = map(build_source, lines["align"])
    assert len(captions) == 6 and captions.read(0, random.Random(0)).caption
    imported = road.import_data(theirs, tmp_path / "imported")
    for line, stored in zip(theirs.values(), imported, strict=True):
        before, after = build_source(line), build_source(stored)
        assert len(before) == len(after) == 6
        for number in range(6):
            one, other = (source.read(number, random.Random(number)) for source in (before, after))
            assert sum(not isinstance(part, str) for part in one.prompt) > 0
            assert list(map(_plain, one.prompt)) == list(map(_plain, other.prompt))
            assert _plain(one.target) == _plain(other.target)


def _plain(part):
    return part if isinstance(part, str) else (part.size, part.tobytes())


def test_table_has_ratios(road, capsys):
    row = {"stage": "align", "rehearsed_seconds": [1.0, 2.0, 4.0], "seconds": 1.0}
    row |= {"rehearsed_cpu_seconds": [1.0, 1.0, 1.0], "cpu_seconds": 1.0}
    row |= {"rehearsed_peak": [2**30] * 3, "peak": 2**31}
    road.print_table([row])
    expected = "| align | 2 (1 to 4) | 1 | 2.00 | 1 (1 to 1) | 1 | 1.00 | 1 (1 to 1) | 2 | 0.50 |"
    assert expected in capsys.readouterr().out


def test_curve_trains_scores_and_resumes_its_runs(road, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    curve = importlib.import_module("examples.road.curve")
    assert len(curve.RUNS) == 8
    untrained = road.build_untrained(tmp_path / "untrained")
    fresh = initialize(
        road.save_as_kosmos_2(untrained, tmp_path / "mllm"), road.BASE, tmp_path / "fresh", aligner_layers=1
    )
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "checkpoint-00000001").symlink_to(fresh)
    runs = ["adapters-60000", "unaligned-120000"]
    command = ["--road", str(tmp_path), "--output", str(tmp_path / "curve"), "--tiny", "--only", *runs]
    curve.main(command)
    table = capsys.readouterr().out.partition("| run |")[2]
    assert "| adapters | 60,000 | " in table and "| unaligned | 120,000 | " in table
    monkeypatch.setattr(curve, "train_run", None)  # what is done is not done again
    curve.main(command)
    assert capsys.readouterr().out.endswith(table)
