import io
import json
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from support.evaluating import die_at_call, files_of, run_evaluate, run_in_child

from kosmos_g_diffusers import files as files_module
from kosmos_g_diffusers.evaluation.benchmarks import sprites as sprite_bench
from kosmos_g_diffusers.evaluation.benchmarks.sprites import ReaderScorer, build_tasks, compare_with_truth
from kosmos_g_diffusers.generation.png import read_settings
from kosmos_g_diffusers.sprites.reader import read
from kosmos_g_diffusers.sprites.world import (
    IMAGE_SIZE,
    Scene,
    Sprite,
    draw_scene_at_random,
    is_held_out,
    make_rng,
    other_colours,
    recolour,
    render,
)

COUNT = 40


@pytest.fixture(scope="module")
def bench():
    return build_tasks(COUNT)


def sprites_of(truth):
    size = "large" if len(truth["sprites"]) < 3 else "small"  # there is no room for three large ones
    return tuple(Sprite(*triple, size) for triple in truth["sprites"])


def test_every_kind_has_its_prompts_and_images(bench):
    tasks, files = bench
    kinds = {kind: [task for task in tasks if task.truth["kind"] == kind] for kind in sprite_bench.KINDS}
    assert {kind: len(found) for kind, found in kinds.items()} == dict.fromkeys(sprite_bench.KINDS, COUNT)
    assert kinds["background"][0].prompt.startswith("<i> on a ") and kinds["pair"][0].prompt.startswith(
        "<i> and <i> on a "
    )
    assert kinds["edit"][0].prompt.startswith("<i>, ")
    assert all("<i>" not in task.prompt and task.prompt == task.text for task in kinds["text"])
    assert set(files) == {path for task in tasks for path in task.pictures}


def test_all_that_is_shown_or_asked_for_is_held_out(bench):
    tasks, files = bench
    for task in tasks:
        assert all(is_held_out(sprite) for sprite in sprites_of(task.truth))
    for content in list(files.values())[::9]:
        assert all(map(is_held_out, read(PIL.Image.open(io.BytesIO(content))).sprites))


def test_bench_is_the_same_every_time_and_another_with_another_seed(bench):
    assert build_tasks(COUNT) == bench
    assert build_tasks(COUNT, seed=1)[1] != bench[1]


def test_right_images_score_one_and_shuffled_ones_next_to_chance(bench):
    tasks, _ = bench
    rng = make_rng("test")
    images = [render(Scene(sprites_of(task.truth), task.truth["background"]), rng) for task in tasks]
    totals = {}
    for scores in ReaderScorer().score(tasks, images):
        for metric, value in scores.items():
            totals.setdefault(metric, []).append(value)
    means = {metric: sum(values) / COUNT for metric, values in totals.items()}
    assert {len(values) for values in totals.values()} == {COUNT}
    for metric in ("background.all", "pair.both in order", "text.all", "edit.new colour and old shape"):
        assert means[metric] > 0.95
    for metric in ("three.all", "four.all", *(f"images.{number}" for number in (1, 2, 3, 4))):
        assert means[metric] > 0.95
    assert max(means[f"images.shuffled.{number}"] for number in (1, 2, 3, 4)) < 0.15
    assert means["images.2"] == means["pair.both"] and means["images.4"] == means["four.all"]
    # eight shapes and colours, four patterns
    for metric in ("background.shuffled.shape", "background.shuffled.colour", "edit.shuffled.old shape"):
        assert 0 < means[metric] < 0.3
    assert means["background.shuffled.all"] < 0.15 and means["pair.shuffled.both"] < 0.1
    assert not any(metric.startswith("text.shuffled") for metric in means)


def turn_hue(image, degrees):
    """The whole image in other hues, as no colour of the world may have."""
    hsv = np.asarray(image.convert("HSV")).astype(int)
    hsv[..., 0] = (hsv[..., 0] + round(degrees * 256 / 360)) % 256
    return PIL.Image.fromarray(hsv.astype("uint8"), "HSV").convert("RGB")


def test_reader_tells_the_colour_and_keeps_the_shape_when_the_hue_is_shifted():
    rng = make_rng("hue")
    scenes = [draw_scene_at_random(rng, 1, held_out=True) for _ in range(200)]
    scenes = [scene for scene in scenes if other_colours(scene.sprites[0])]
    images = [render(scene, rng) for scene in scenes]
    recoloured = [Scene((recolour(scene.sprites[0], rng),), scene.background) for scene in scenes]

    def score_all(images):
        """Shares of shapes, colours and patterns that are those of `scenes`."""
        truths = [{"background": scene.background, "sprites": [scene.sprites[0].triple]} for scene in scenes]
        found = [
            compare_with_truth("background", read(image), truth)
            for image, truth in zip(images, truths, strict=True)
        ]
        return [np.mean([one[name] for one in found]) for name in ("shape", "colour", "pattern")]

    # the table of docs/evaluation.md
    assert score_all(images) == [1, 1, 1]
    assert score_all([render(scene, rng) for scene in recoloured]) == [1, 0, 1]
    for degrees, colour, pattern in ((30, 0.48, 0.99), (60, 0.10, 0.84), (180, 0.02, 0.92)):
        shares = score_all([turn_hue(image, degrees) for image in images])
        assert shares == pytest.approx([1, colour, pattern], abs=0.02)


RED_STAR, BLUE_RING = Sprite("star", "red", "plain", "large"), Sprite("ring", "blue", "dotted", "small")


def test_pair_counts_in_either_order_and_says_which():
    truth = {"background": "mint", "sprites": [["star", "red", "striped"], ["ring", "blue", "dotted"]]}
    both = compare_with_truth("pair", Scene((BLUE_RING, RED_STAR), "mint"), truth)
    assert both == {"first": True, "second": True, "both": True, "both in order": False, "background": True}
    one = compare_with_truth("pair", Scene((RED_STAR,), "grey"), truth)
    assert one == {"first": True, "second": False, "both": False, "both in order": False, "background": False}
    assert not compare_with_truth("pair", Scene((RED_STAR, BLUE_RING, RED_STAR), "mint"), truth)["both"]


def test_pair_of_equal_subjects_needs_both():
    truth = {"background": "mint", "sprites": [["star", "red", "plain"], ["star", "red", "dotted"]]}
    assert not compare_with_truth("pair", Scene((RED_STAR,), "mint"), truth)["both"]
    assert compare_with_truth("pair", Scene((RED_STAR, RED_STAR), "mint"), truth)["both"]


def test_single_sprite_must_be_alone():
    truth = {"background": "mint", "sprites": [["star", "red", "plain"]]}
    assert compare_with_truth("background", Scene((RED_STAR,), "mint"), truth)["all"]
    two = compare_with_truth("background", Scene((RED_STAR, BLUE_RING), "mint"), truth)
    assert two == {"shape": False, "colour": False, "pattern": False, "background": True, "all": False}
    assert not compare_with_truth("text", Scene((), "mint"), truth)["shape"]


def test_edit_wants_the_new_colour_and_the_old_shape():
    truth = {"background": "mint", "sprites": [["star", "red", "plain"]]}
    old = compare_with_truth("edit", Scene((Sprite("star", "blue", "plain", "large"),), "mint"), truth)
    assert old["old shape"] and not old["new colour"] and not old["new colour and old shape"]
    assert compare_with_truth("edit", Scene((RED_STAR,), "grey"), truth)["new colour and old shape"]


# Drawings by another renderer, and words as people type them ------------------------------------------------------


@pytest.fixture(scope="module")
def foreign():
    return build_tasks(kinds=tuple(sprite_bench.FOREIGN))


def test_there_are_60_drawings_and_200_prompts_of_ten_sorts_each(foreign):
    tasks, files = foreign
    for kind, count in (("own-drawings", 60), ("typed-words", 200)):
        rows = Counter(task.row for task in tasks if task.truth["kind"] == kind)
        assert len(rows) == 10 and set(rows.values()) == {count // 10}
        assert all(row.startswith(f"{kind}: ") for row in rows)
    assert len(files) == 60 and len({bytes(content) for content in files.values()}) == 60
    assert build_tasks(kinds=tuple(sprite_bench.FOREIGN)) == foreign
    assert build_tasks(seed=1, kinds=tuple(sprite_bench.FOREIGN))[1] != files


def test_drawings_show_what_their_truth_says(foreign):
    """The reader, which knows the world's outlines, sees it in those that are not too small, large or turned for it."""
    tasks, files = foreign
    right = Counter()
    for task in tasks:
        if task.pictures:
            image = PIL.Image.open(io.BytesIO(files[task.pictures[0]])).resize((IMAGE_SIZE, IMAGE_SIZE))
            truth = {**task.truth, "background": read(image).background}
            right[task.row.partition(": ")[2]] += compare_with_truth("own-drawings", read(image), truth)[
                "shape and colour"
            ]
    easy = ("plain", "corner", "soft", "outlined", "large canvas")
    assert {name: right[name] for name in easy} == dict.fromkeys(easy, 6)


def test_named_things_are_right_in_any_order_and_what_is_not_named_does_not_count():
    truth = {"background": None, "sprites": [["star", "red", None, None], ["ring", "blue", None, None]]}
    for sprites in ((RED_STAR, BLUE_RING), (BLUE_RING, RED_STAR)):
        assert set(compare_with_truth("typed-words", Scene(sprites, "grey"), truth).values()) == {True}
    swapped = Scene(
        (Sprite("star", "blue", "plain", "large"), Sprite("ring", "red", "plain", "large")), "grey"
    )
    found = compare_with_truth("typed-words", swapped, truth)
    assert found == {"shape": True, "colour": False, "all named": False}
    for sprites in ((), (RED_STAR,), (RED_STAR, BLUE_RING, RED_STAR)):
        found = compare_with_truth("typed-words", Scene(sprites, "grey"), truth)
        assert set(found.values()) == {False}
    truth = {"background": "mint", "sprites": [["star", "red", "plain", "small"]]}
    found = compare_with_truth("typed-words", Scene((RED_STAR,), "mint"), truth)
    assert found == {
        **dict.fromkeys(("shape", "colour", "pattern", "background"), True),
        "size": False,
        "all named": False,
    }


def test_typed_prompts_name_what_their_truth_says(foreign):
    for task in foreign[0]:
        if task.truth["kind"] != "typed-words":
            continue
        words = task.prompt.lower()
        named = [name for sprite in task.truth["sprites"] for name in sprite if name is not None]
        missing = sum(name not in words for name in [*named, task.truth["background"] or ""])
        assert missing <= task.row.endswith("typo")
        assert all(is_held_out(sprite) for sprite in sprites_of_named(task.truth))


def sprites_of_named(truth):
    return [Sprite(*named) for named in truth["sprites"] if None not in named]


def test_kinds_of_others_run_on_demand_with_a_table_of_their_sorts(tmp_path, caplog):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")
    kinds = ["--kind", "own-drawings", "--kind", "typed-words"]
    arguments = ["sprites", *kinds, "--count", 10, "--steps", 1, "--batch-size", 20, "--device", "cpu"]
    run_evaluate(*arguments, "--output", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["options"] == {"prompts": "own-drawings 10, typed-words 10"}
    assert len(report["by prompt"]) == 20 and "own-drawings.shuffled.shape" in report["metrics"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert text.count("| own-drawings: turned |") == 1 and text.count("| typed-words: one typo |") == 1
    assert "## By prompt: own-drawings" in text and 'shape alone: "star"' in text
    assert (tmp_path / "run" / "sheets" / "own-drawings-large-canvas.html").is_file()
    assert not [record for record in caplog.records if "not trained on" in record.getMessage()]
    kept = files_of(tmp_path / "run", "images", "scores", "report.json", "report.md", "sheets")
    (tmp_path / "run" / "images" / "own-drawings" / "0003.png").unlink()
    run_evaluate(*arguments, "--output", tmp_path / "run")
    assert files_of(tmp_path / "run", "images", "scores", "report.json", "report.md", "sheets") == kept


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="1 prompts of each kind"):
        build_tasks(1)


def test_command_runs_offline_without_a_model_and_is_resumed(tmp_path):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")
    arguments = [
        "sprites",
        "--count",
        3,
        "--steps",
        1,
        "--batch-size",
        6,
        "--device",
        "cpu",
        "--output",
        tmp_path / "run",
    ]
    run_evaluate(*arguments)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    # every image is in one prompt: none is made a word
    assert report["counts"] == {
        "units": 18,
        "prompts": 18,
        "images": 18,
        "pictures": 33,
        "pictures encoded": 33,
    }
    settings = read_settings(tmp_path / "run" / "images" / "pair" / "0001.png")
    # found from the image, so that it can be made again wherever the run is taken
    assert [image.path for image in settings.images] == [f"../../pictures/pair_0001_{n}.png" for n in (0, 1)]
    text = (tmp_path / "run" / "report.md").read_text()
    sheet = (tmp_path / "run" / "sheets" / "pair.html").read_text()
    assert "both in order " in sheet and "shuffled" not in sheet and sheet.count("class='small'") == 9
    assert "| background.shape |" in text and "control: input images shuffled" in text
    before = files_of(tmp_path / "run", "images", "scores", "report.json", "report.md", "sheets")
    (tmp_path / "run" / "images" / "pair" / "0001.png").unlink()
    (tmp_path / "run" / "pictures" / "edit_0000_0.png").write_bytes(b"half")
    run_evaluate(*arguments)
    assert files_of(tmp_path / "run", "images", "scores", "report.json", "report.md", "sheets") == before


def test_input_images_are_whole_when_a_run_is_killed_while_it_writes_them(tmp_path):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")

    def run():
        # the manifest is the first file that gets its name
        die_at_call(files_module.os, "replace", 4)
        run_evaluate("sprites", "--count", 3, "--steps", 1, "--device", "cpu", "--output", tmp_path / "run")

    run_in_child(run)
    paths = list((tmp_path / "run" / "pictures").iterdir())
    whole = [path for path in paths if path.suffix == ".png"]
    assert len(whole) == 2 and [path.suffix for path in paths if path not in whole] == [".part"]
    for path in whole:
        PIL.Image.open(path).load()
