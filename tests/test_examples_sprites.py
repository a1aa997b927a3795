"""The scripts of examples/sprites: the order of training's phases, and how images drawn along edges are judged."""

import importlib.util
import math
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kosmos_g_diffusers.sprites.world import BACKGROUNDS, COLOURS, Scene, Sprite, paint_sprite

SPRITES = Path(__file__).parents[1] / "examples" / "sprites"
SCRIPT = """
import json, os, sys, time
from pathlib import Path
run, phase = Path(sys.argv[sys.argv.index("--output") + 1]), sys.argv[-1]
say = lambda word: open(run / "order.txt", "a").write(f"{word} {phase}\\n")
say("begins")
(run / phase).mkdir()
(run / phase / "config.json").write_text(json.dumps({"steps": 4}))
(run / phase / "log.jsonl").write_text(json.dumps({"step": 2}) + "\\n")
time.sleep(float(os.environ.get("SECONDS_" + phase, 0)))
say("ends")
sys.exit(int(os.environ.get("CODE_" + phase, 0)))
"""


def load(name):
    """A script of examples/sprites as a module."""
    spec = importlib.util.spec_from_file_location(name, SPRITES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_lanes(tmp_path, monkeypatch):
    """Function that runs all phases with the script; returns the exit code and what the phases said."""
    lanes = load("lanes")
    (tmp_path / "script.py").write_text(SCRIPT)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        code = lanes.run_lanes(tmp_path / "script.py", tmp_path, threads=1)
        return code, (tmp_path / "order.txt").read_text().splitlines()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_phases_run_side_by_side_and_wait_for_what_they_need(run_lanes):
    code, order = run_lanes(SECONDS_diffusion=1.5)
    assert code == 0
    place = {line: number for number, line in enumerate(order)}
    assert len(place) == 14
    assert place["begins pretrain"] < place["ends vae"] or place["begins vae"] < place["ends pretrain"]
    assert place["ends pretrain"] < place["begins pretrain-varied"] < place["ends pretrain-varied"]
    ready = max(place["ends pretrain-varied"], place["ends diffusion"])
    assert ready < place["begins align"] < place["begins instruct"]
    assert place["ends diffusion"] < place["begins controlnet"]


def test_failure_of_a_phase_ends_the_run_with_its_code(run_lanes, capsys):
    code, order = run_lanes(CODE_diffusion=3)
    assert code == 3
    assert "ends pretrain" in order and "begins align" not in order and "begins controlnet" not in order
    assert "diffusion ended with code 3" in capsys.readouterr().err


def test_signal_reaches_the_phases(run_lanes):
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, order = run_lanes(SECONDS_vae=60, SECONDS_pretrain=60)
    assert code not in (0, None)
    assert sorted(order) == ["begins pretrain", "begins vae"]


def test_true_drawings_along_edges_are_right_and_others_are_not():
    """A sprite at the place of its edges has everything right; the picture of the prompt, elsewhere, all but the place."""
    script = load("read_controlnet")
    centres = [(26.0, 38.0), (37.5, 27.0), (32.0, 25.0)]
    tasks, drawings = [], []
    triples = [("circle", "red", "plain"), ("square", "blue", "striped"), ("ring", "pink", "plain")]
    for (x, y), triple in zip(centres, triples, strict=True):
        sprite = Sprite(*triple, "large")
        drawing = Image.new("RGB", (256, 256), BACKGROUNDS["mint"])
        paint_sprite(drawing, sprite, (x, y), 15.0, COLOURS[sprite.colour])
        drawings.append(drawing.reduce(4))
        assert script.find_place(drawings[-1]) == pytest.approx((x, y), abs=0.6)
        tasks.append({"scene": Scene((sprite,), "mint"), "place": (x, y)})
    scores = script.judge(tasks, drawings)
    assert scores.pop("place of others") == 0.0 and set(scores.values()) == {1.0}

    tasks = script.draw_tasks(3, seed=0)
    scores = script.judge(tasks, [task["photo"] for task in tasks])
    assert scores["colour"] == scores["pattern"] == scores["shape"] == 1.0 and scores["place"] < 1.0
    edges = [np.asarray(task["edges"].convert("L")) > 0 for task in tasks]
    for task, lines in zip(tasks, edges, strict=True):
        rows, columns = lines.nonzero()
        middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        assert math.dist(middle, task["place"]) < 5.0


def test_nothing_has_no_place():
    assert load("read_controlnet").find_place(Image.new("RGB", (64, 64), "white")) is None
