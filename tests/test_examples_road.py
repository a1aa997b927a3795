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


def test_data_is_read_as_its_lines_say(road, tmp_path, monkeypatch):
    monkeypatch.setattr(road, "SAMPLES", 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = road.write_data(tmp_path)
    assert road.write_data(tmp_path) == lines  # a second time makes nothing
    captions, edits = (build_source(line) for line in lines["instruct"])
    assert len(captions) == len(edits) == 6
    sample = edits.read(0, random.Random(0))
    assert sample.target is not None and any(not isinstance(part, str) for part in sample.prompt)
    assert captions.read(0, random.Random(0)).caption


def test_table_has_ratios(road, capsys):
    row = {"stage": "align", "rehearsed_seconds": [1.0, 2.0, 4.0], "seconds": 1.0}
    row |= {"rehearsed_peaks": [2**30] * 3, "peak": 2**31}
    road.print_table([row])
    assert "| align | 2 (1 to 4) | 1 | 2.00 | 1 (1 to 1) | 2 | 0.50 |" in capsys.readouterr().out
