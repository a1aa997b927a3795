import runpy
import sys
from pathlib import Path

import PIL.Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_demo_writes_images_and_says_that_the_model_is_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "out"), "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    out = capsys.readouterr().out
    names = ["demo.png", "demo_0.png", "demo_1.png", "demo_2.png", "demo_3.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(str(tmp_path / "out" / name) in out for name in names)
    assert "random weights" in out
    assert PIL.Image.open(tmp_path / "out" / "demo_0.png").size == (64, 64)


def test_photos_are_small_and_their_provenance_is_told():
    text = (EXAMPLES / "images" / "PROVENANCE.txt").read_text()
    for photo in (EXAMPLES / "images").glob("*.jpg"):
        assert photo.name in text
        assert photo.stat().st_size < 150_000
        assert PIL.Image.open(photo).mode == "RGB"
