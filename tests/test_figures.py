"""docs/figures.py: what the documents quote of the small model comes from a run, and lands where it is quoted."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def figures(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "figures", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_mark_names_a_run_and_ends(figures):
    n_marks = 0
    for path in figures.documents():
        text = path.read_text(encoding="utf-8")
        marks = list(figures.MARK.finditer(text))
        assert len(marks) == text.count("<!-- figure ") == text.count("<!-- /figure -->"), path
        for mark in marks:
            assert mark["run"] in figures.RUNS, (path, mark[0])
            spec = (mark["format"] or "").partition(" ")[0]
            if "|" not in mark["text"] and spec:
                # what stands there is what the format would write of it
                value = float(mark["text"].rstrip("%").partition(" ")[0]) / (
                    100 if "%" in mark["text"] else 1
                )
                assert mark["text"].startswith(figures.say(value, spec)), (path, mark[0])
        n_marks += len(marks)
    assert n_marks > 5


def test_figures_of_a_run_are_written_where_they_are_quoted(figures, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    page, other = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    other.parent.mkdir()
    page.write_text("right in <!-- figure bench.pair.both .0% -->1%<!-- /figure --> of all\n")
    other.write_text(
        "<!-- figure bench.table -->\nold\n<!-- /figure --> and <!-- figure bench.pair.both -->?<!-- /figure -->\n"
        "<!-- figure captions.shape.one-sprite .1f -->0.5<!-- /figure -->"
    )
    folder = tmp_path / "out" / "bench"
    folder.mkdir(parents=True)
    (folder / figures.DONE).touch()
    report = {"metrics": {"pair.both": {"mean": 0.862, "interval": [0.832, 0.892]}}, "by prompt": {}}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.md").write_text(
        "# sprites\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\ntext\n\n| c | d |\n|---|---|\n"
    )
    changed = figures.write("bench", figures.measure("bench", tmp_path / "out"), tmp_path / "out")
    assert changed == [page, other]
    assert "-->86%<!--" in page.read_text()
    assert "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n" in other.read_text()
    assert "-->0.862 (0.832 to 0.892)<!--" in other.read_text() and "-->0.5<!--" in other.read_text()
    assert figures.write("bench", figures.measure("bench", tmp_path / "out"), tmp_path / "out") == []


def test_a_figure_that_a_run_does_not_have_ends_the_command(figures, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- figure bench.pear.both -->1<!-- /figure -->")
    with pytest.raises(SystemExit, match=re.escape("bench has no figure 'pear.both'. It has pair.both")):
        figures.write("bench", {"pair.both": (0.5, None)}, tmp_path)


def test_the_list_says_what_is_run_and_runs_nothing(figures, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures.py", "--list"])
    monkeypatch.setattr(figures.subprocess, "run", None)
    figures.main()
    out = capsys.readouterr().out
    assert all(f"{name}: python " in out for name in figures.RUNS) and "README.md" in out
