"""Maps and regions in the sprite bench: true images of the world, with maps that are right and wrong by construction."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from support.evaluating import run_evaluate

from kosmos_g_diffusers.evaluation.benchmarks.sprites import ReaderScorer, build_tasks
from kosmos_g_diffusers.evaluation.images import read_maps
from kosmos_g_diffusers.evaluation.manifest import Manifest
from kosmos_g_diffusers.evaluation.where import PLACED, assign, compare_maps, compare_places
from kosmos_g_diffusers.generation.png import read_settings
from kosmos_g_diffusers.sprites.reader import find_sprites, read
from kosmos_g_diffusers.sprites.world import Scene, Sprite, make_rng, render

STAR, RING = Sprite("star", "red", "plain", "large"), Sprite("ring", "blue", "plain", "large")


@pytest.fixture(scope="module")
def pair():
    """An image of a star on the left and a ring on the right."""
    return render(Scene((STAR, RING), "white"), make_rng("where", 1))


def test_found_sprites_are_those_that_are_read_each_with_its_own_pixels(pair):
    found = find_sprites(pair)
    assert tuple(sprite for sprite, _ in found) == read(pair).sprites
    (_, left), (_, right) = found
    drawn = np.abs(np.asarray(pair).astype(int) - 250).max(-1) > 60
    assert (left[:, :32] > 0.3).sum() > 200 and not left[:, 34:].any() and not (left * right).any()
    overlap = ((left + right) > 0.3) & drawn
    assert overlap.sum() / (((left + right) > 0.3) | drawn).sum() > 0.9


def test_maps_of_the_right_images_score_and_swapped_ones_do_not(pair):
    covers = [cover > 0.3 for _, cover in find_sprites(pair)]
    true = torch.from_numpy(np.stack([*covers, ~(covers[0] | covers[1]), np.zeros((64, 64))])).float()
    right = compare_maps(true, covers)
    assert right["map IoU"] > 0.95 and right["map found"] == right["map names"] == 1
    wrong = compare_maps(true[[1, 0, 2, 3]], covers)
    assert wrong["map IoU"] < 0.1 and wrong["map found"] == wrong["map names"] == 0


def test_centre_counts_as_inside_its_region(pair):
    truth = {"sprites": [list(RING.triple), list(STAR.triple)], "regions": [[0.5, 0, 1, 1], [0, 0, 0.5, 1]]}
    assert compare_places(pair, truth) == {"inside": 1, "shape and colour": 1}
    swapped = {**truth, "regions": truth["regions"][::-1]}
    assert compare_places(pair, swapped) == {"inside": 0, "shape and colour": 1}
    other = {**truth, "sprites": [["moon", "green", "plain"], list(STAR.triple)]}
    assert compare_places(pair, other) == {"inside": 1, "shape and colour": 0.5}
    nothing = PIL.Image.new("RGB", (64, 64), (250, 250, 250))
    assert compare_places(nothing, truth) == {"inside": 0, "shape and colour": 0}


def test_sprites_are_assigned_by_what_is_the_same():
    wanted = [("star", "red"), ("ring", "blue")]
    assert assign([("ring", "blue"), ("star", "red")], wanted) == [1, 0]
    assert assign([("ring", "red"), ("ring", "blue")], wanted) == [0, 1]
    assert assign([("moon", "green")], wanted) == [None, None]
    assert assign([("moon", "green")], wanted[:1]) == [0]
    assert assign([("star", "red")], wanted) == [0, None]


def test_placed_prompts_have_a_region_for_each_image_and_a_control():
    tasks, files = build_tasks(20, kinds=(PLACED,))
    assert {len(task.pictures) for task in tasks} == {1, 2}
    for task in tasks:
        assert len(task.truth["regions"]) == len(task.pictures) == len(task.truth["shuffled"]["regions"])
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in task.truth["regions"])
        for path, (shape, colour, _) in zip(task.pictures, task.truth["sprites"], strict=True):
            assert read(PIL.Image.open(io.BytesIO(files[path]))).sprites[0].triple[:2] == (shape, colour)
    moved = [task for task in tasks if task.truth["regions"] != task.truth["shuffled"]["regions"]]
    assert len(moved) > 15
    image = render(Scene((STAR,), "white"), make_rng("where", 2))
    (scores,) = ReaderScorer().score(tasks[:1], [image])
    assert {"placed.inside", "placed.shuffled.inside", "placed.shape and colour"} <= set(scores)


def test_run_keeps_maps_and_settings_and_scores_them(tmp_path, capsys):
    flags = ["--count", "2", "--steps", "3", "--batch-size", "2", "--maps", "--binding", "1"]
    run_evaluate("sprites", *flags, "--kind", "pair", "--kind", "placed", "--output", str(tmp_path / "run"))
    manifest = Manifest.read(tmp_path / "run")
    assert manifest.options["maps"] == "kept" and manifest.settings["binding"] == 1
    for task in manifest.tasks:
        maps = read_maps(tmp_path / "run", task)
        assert maps.shape == (len(task.pictures) + 2, 8, 8) and torch.allclose(maps.sum(0), torch.ones(8, 8))
        settings = read_settings(tmp_path / "run" / "images" / f"{task.id}.png")
        assert settings.binding == 1
        assert list(map(list, settings.regions)) == task.truth.get("regions", [])
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert {"reader", "maps"} == {one["scorer"] for one in report["scorers"]}
    assert "placed.inside" in report["metrics"]
    (tmp_path / "run" / "maps" / f"{manifest.tasks[0].id}.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read. Delete the image"):
        read_maps(tmp_path / "run", manifest.tasks[0])
