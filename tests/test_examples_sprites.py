"""The scripts of examples/sprites: the order of training's phases, and how images drawn along edges are scored."""

import importlib.util
import json
import math
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from support.app import wait_for

from kosmos_g_diffusers.evaluation.benchmarks.sprites import build_tasks
from kosmos_g_diffusers.evaluation.manifest import Manifest
from kosmos_g_diffusers.sprites.world import BACKGROUNDS, COLOURS, Scene, Sprite, make_rng, paint_sprite

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
awaited, end = os.environ.get("AWAITS_" + phase, ""), time.monotonic() + 60
while awaited and awaited not in (run / "order.txt").read_text() and time.monotonic() < end:
    time.sleep(0.02)
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
    code, order = run_lanes(AWAITS_vae="begins pretrain", AWAITS_diffusion="ends pretrain-varied")
    assert code == 0
    place = {line: number for number, line in enumerate(order)}
    assert len(place) == 2 * sum(map(len, load("lanes").LANES))
    assert place["begins pretrain"] < place["ends vae"]
    assert place["ends pretrain"] < place["begins pretrain-varied"] < place["ends pretrain-varied"]
    assert place["ends diffusion"] < place["begins align"] < place["begins instruct"]
    assert place["ends instruct"] < place["begins instruct-asked"]
    assert place["ends diffusion"] < place["begins controlnet"]


def test_failure_of_a_phase_stops_the_other_lane_and_is_the_code_of_the_run(run_lanes, capsys):
    code, order = run_lanes(AWAITS_pretrain="never", AWAITS_vae="begins pretrain", CODE_diffusion=3)
    assert code == 3
    assert sorted(order) == [
        "begins diffusion",
        "begins pretrain",
        "begins vae",
        "ends diffusion",
        "ends vae",
    ]
    assert "diffusion ended with code 3" in capsys.readouterr().err


def test_signal_reaches_the_phases(run_lanes, tmp_path):
    def interrupt():
        wait_for(
            lambda: (
                (tmp_path / "order.txt").is_file() and len((tmp_path / "order.txt").read_text().split()) == 4
            )
        )
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    code, order = run_lanes(AWAITS_vae="never", AWAITS_pretrain="never")
    assert code not in (0, None)
    assert sorted(order) == ["begins pretrain", "begins vae"]


def test_true_drawings_along_edges_are_right_and_others_are_not():
    """A sprite at the place of its edges has everything right; the image of the prompt, elsewhere, all but the place."""
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
    scores = script.score(tasks, drawings)
    assert scores.pop("place of others") == 0.0 and set(scores.values()) == {1.0}

    tasks = script.draw_tasks(3, seed=0)
    scores = script.score(tasks, [task["photo"] for task in tasks])
    assert scores["colour"] == scores["pattern"] == scores["shape"] == 1.0 and scores["place"] < 1.0
    edges = [np.asarray(task["edges"].convert("L")) > 0 for task in tasks]
    for task, lines in zip(tasks, edges, strict=True):
        rows, columns = lines.nonzero()
        middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        assert math.dist(middle, task["place"]) < 5.0


def test_nothing_has_no_place():
    assert load("read_controlnet").find_place(Image.new("RGB", (64, 64), "white")) is None


def test_captions_are_scored_by_what_the_images_show():
    script = load("read_captions")
    scenes = [script.draw_scene_at_random(make_rng("said", number), 1 + number % 2) for number in range(20)]
    captions = [scene.caption for scene in scenes]
    assert set(script.score(scenes, captions).values()) == {1.0}
    sprites = (Sprite("circle", "red", "plain", "large"), Sprite("ring", "blue", "dotted", "small"))
    said = "a large red plain star and a small blue dotted ring on a white background"
    assert script.score([Scene(sprites, "mint")], [said]) == {
        "shape": 0.0, "colour": 1.0, "pattern": 1.0, "size": 1.0, "background": 0.0, "the whole caption": 0.0
    }  # fmt: skip
    assert not any(script.score([Scene(sprites[:1], "mint")], [said]).values())  # more than there is
    assert not any(script.score([Scene(sprites, "mint")], [""]).values())


def test_limits_are_scored_by_number_shapes_and_colours():
    script = load("read_limits")
    prompt, images, wanted = script.three_images(make_rng("limits"))
    assert prompt.count("<i>") == len(images) == len(set(wanted)) == 3
    sprites = tuple(Sprite(shape, colour, "plain", "small") for shape, colour in wanted)
    drawing = Image.new("RGB", (256, 256), BACKGROUNDS["mint"])
    for sprite, centre in zip(sprites, ((14, 14), (50, 14), (32, 48)), strict=True):
        paint_sprite(drawing, sprite, centre, 10.5, COLOURS[sprite.colour])
    assert script.score(drawing, wanted) == (True, True, True, True)  # 256 x 256 pixels, reduced
    assert script.score(drawing, wanted[::-1]) == (True, True, True, True)
    assert script.score(drawing, wanted[:2]) == (False, False, False, False)
    other = [("star" if shape != "star" else "moon", colour) for shape, colour in wanted]
    assert script.score(drawing, other)[1:] == (False, True, False)
    prompt, _, ((shape, colour),) = script.translated("German")(make_rng("limits"))
    shapes, colours, _ = script.LANGUAGES["German"]
    names = dict(zip(script.SHAPES, shapes.split(), strict=True)) | dict(
        zip(COLOURS, colours.split(), strict=True)
    )
    assert prompt == f"{names[shape]}, {names[colour]}"


def test_picture_of_a_run_frames_what_is_right_and_what_is_not(tmp_path):
    script = load("show_run")
    tasks, files = build_tasks(20, kinds=("own-drawings",))
    Manifest("sprites", {}, tasks).write(tmp_path)
    lines = [{"scorer": "reader"}]
    for number, task in enumerate(tasks):
        right = number != 3
        lines.append({"id": task.id, "scores": {"own-drawings.shape and colour": float(right)}})
        path = tmp_path / "images" / f"{task.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "navy").save(path)
    for name, content in files.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "reader.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sheet = script.draw_sheet(tmp_path, "own-drawings", columns=2)
    colours = {colour: count for count, colour in sheet.getcolors(2**20)}
    assert colours[0, 0, 128] >= 20 * 64 * 64
    assert colours[ImageColor.getrgb("seagreen")] == 19 * colours[ImageColor.getrgb("crimson")]
