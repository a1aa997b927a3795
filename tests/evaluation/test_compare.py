"""Runs whose images are given, so that what a comparison says is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.evaluating import draw_image, run_compare

from kosmos_g_diffusers.evaluation.compare import compare
from kosmos_g_diffusers.evaluation.images import image_path
from kosmos_g_diffusers.evaluation.manifest import Manifest, Task
from kosmos_g_diffusers.evaluation.report import bootstrap, format_score, mean_by, table, write_report
from kosmos_g_diffusers.evaluation.scoring import read_scores
from kosmos_g_diffusers.files import hash_file

pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")

UNITS = ("apple", "pear", "plum")


def make_run(folder, data, value, **changes):
    """A finished run whose scores are value(unit number, index)."""
    tasks = tuple(
        Task(
            f"{unit}/{index}", unit, "<i>", "<i> & <b>", "words", (f"{unit}.png",), ((f"{unit}.png",),), index
        )
        for unit in UNITS
        for index in range(2)
    )
    data.mkdir(exist_ok=True)
    for number, unit in enumerate(UNITS):
        draw_image(number).save(data / f"{unit}.png")
    manifest = Manifest(
        benchmark="fruit",
        options={},
        model={"path": None, "name": str(folder.name)},
        settings={"steps": 2, "height": None},
        conditions={"device": "cpu", "batch_size": 2, "versions": {}},
        data=str(data),
        pictures={f"{unit}.png": hash_file(data / f"{unit}.png") for unit in UNITS},
        tasks=tasks,
    )
    manifest = replace(manifest, **changes)
    folder.mkdir()
    manifest.write(folder)
    lines = [{"scorer": "ripeness"}]
    for number, task in enumerate(manifest.tasks):
        image_path(folder, task).parent.mkdir(parents=True, exist_ok=True)
        draw_image(100 + number).save(image_path(folder, task))
        scores = {"ripeness": value(UNITS.index(task.unit), number % 2)}
        lines.append({"id": task.id, "sha256": hash_file(image_path(folder, task)), "scores": scores})
    (folder / "scores").mkdir()
    (folder / "scores" / "ripeness.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    data = tmp_path / "data"
    first = make_run(tmp_path / "first", data, lambda unit, index: unit + index)
    return first, make_run(
        tmp_path / "second", data, lambda unit, index: unit + index + (0.5 if unit else -0.25)
    )


def test_differences_are_paired_by_unit(runs, tmp_path):
    row = compare(*runs, tmp_path / "out")["metrics"]["ripeness"]
    assert row["by unit"] == {"apple": -0.25, "pear": 0.5, "plum": 0.5}
    assert (row["a"], row["b"], row["difference"]) == (1.5, 1.75, 0.25)
    assert row["units where b is higher"] == 2 and row["units"] == 3
    # the runs spread over 0 to 3, their differences over -0.25 to 0.5: the interval is of the differences
    assert -0.25 <= row["interval"][0] < 0.25 < row["interval"][1] <= 0.5


def test_comparison_is_written_with_images_side_by_side(runs, tmp_path, capsys):
    run_compare(*runs, "--output", tmp_path / "out")
    assert "| ripeness | 1.500 | 1.750 | +0.250" in capsys.readouterr().out
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| name | first | second |" in text and "| steps | 2 | the same |" in text
    sheet = (tmp_path / "out" / "sheets" / "pear.html").read_text()
    for run in ("first", "second"):
        assert f"../../{run}/images/pear/1.png" in sheet
    # one row of each run under the prompt, below its image
    assert sheet.count("<h3>") == 1 and sheet.count("data:image/") == 1
    order = [sheet.index(text) for text in ("data:image/", "<h3>", "<b>A</b>", "first/images", "<b>B</b>")]
    assert order == sorted(order)
    assert "&lt;i&gt; &amp; &lt;b&gt;" in sheet and "<b> " not in sheet
    assert (tmp_path / "out" / "plots" / "ripeness.png").is_file()
    compare(*runs, tmp_path / "out")  # its own results are written anew
    for image in (tmp_path / "data").iterdir():
        image.unlink()
    compare(*runs, tmp_path / "out")  # runs may have been taken elsewhere, without their data
    assert "data:image/" not in (tmp_path / "out" / "sheets" / "pear.html").read_text()


def test_runs_of_different_images_are_refused(runs, tmp_path):
    first, second = runs
    other = Manifest.read(first)
    changed = replace(other.tasks[2], prompt="<i> in snow")
    odd = make_run(
        tmp_path / "odd", tmp_path / "data", lambda *_: 0, tasks=(*other.tasks[:2], changed, *other.tasks[3:])
    )
    with pytest.raises(ValueError, match="1 images of the runs.*pear/0"):
        compare(first, odd, tmp_path / "out")
    vegetables = make_run(tmp_path / "vegetables", tmp_path / "data", lambda *_: 0, benchmark="vegetables")
    with pytest.raises(ValueError, match="'fruit' and 'vegetables'"):
        compare(first, vegetables, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfinished_runs_and_other_folders_are_refused(runs, tmp_path):
    first, second = runs
    with pytest.raises(ValueError, match="not a results folder"):
        compare(first, tmp_path, tmp_path / "out")
    image_path(second, Manifest.read(second).tasks[0]).unlink()
    with pytest.raises(ValueError, match="1 images of .*second.* are not made yet, such as apple/0"):
        compare(first, second, tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds no comparison"):
        compare(first, second, tmp_path / "data")


def test_scores_of_images_that_changed_do_not_count(runs, tmp_path):
    first, second = runs
    draw_image(7).save(image_path(second, Manifest.read(second).tasks[0]))
    assert read_scores(second, Manifest.read(second)) == (
        {task.id: {} for task in Manifest.read(second).tasks},
        [],
    )
    with pytest.raises(ValueError, match="no complete scores"):
        compare(first, second, tmp_path / "out")


def test_manifest_is_read_as_it_was_written(runs):
    manifest = Manifest.read(runs[0])
    manifest.write(runs[0])
    assert Manifest.read(runs[0]) == manifest


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", ".hidden", ""])
def test_image_names_lead_nowhere_else(name):
    with pytest.raises(ValueError, match="cannot name an image"):
        Task(name, "unit", "row", "prompt", None, (), (), 0)


@pytest.mark.parametrize("line", ["{}", "[]", "not json", '{"format": "kosmos_g_evaluation_9"}'])
def test_manifest_of_another_form_is_refused(line, tmp_path):
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="cannot be used"):
        Manifest.read(tmp_path)


def test_bootstrap_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(0.5, 0.1, 200)
    low, high = bootstrap(values)
    reach = 1.96 * values.std() / 200**0.5
    assert low == pytest.approx(values.mean() - reach, abs=0.002)
    assert high == pytest.approx(values.mean() + reach, abs=0.002)
    assert bootstrap(values) == (low, high)
    assert bootstrap([0.5]) is None
    assert bootstrap([0.5, 0.5]) == (0.5, 0.5)


def test_means_weigh_units_alike(runs):
    manifest = Manifest.read(runs[0])
    manifest = replace(manifest, tasks=manifest.tasks[:3])  # two images of one unit, one of another
    scores = {"apple/0": {"m": 0.0}, "apple/1": {"m": 0.0}, "pear/0": {"m": 1.0}}
    report = write_report(runs[0], manifest, scores, [])
    assert report["metrics"]["m"]["mean"] == 0.5
    assert mean_by(manifest.tasks, scores, lambda task: task.row) == {"<i>": {"m": 0.333333}}


def test_tables_are_markdown():
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n|---|---|\n| x\\|y | 1 |"
    assert table(["", "b"], [["<i>, red", "1"]]).endswith("| `<i>, red` | 1 |")
    assert format_score({"mean": 0.69412, "interval": (0.67, 0.715)}) == "0.694 (0.670 to 0.715)"
    assert format_score({"mean": 1.0, "interval": None}) == "1.000"
