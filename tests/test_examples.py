import re
import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMOS = ("app_client.py", "common.py", "demo.py")  # what the others share, and what other tests run
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.name not in DEMOS)
NEED_PEFT = ("few_steps", "lora")


@pytest.fixture
def run_example(monkeypatch):
    """Function that runs an example in this process, with the given arguments."""
    monkeypatch.syspath_prepend(EXAMPLES)  # as `python examples/x.py` does

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        finally:
            sys.modules.pop("common", None)

    return run


def test_the_examples_are_those_that_were_promised():
    names = "text_to_image interleaved_prompt image_words controlnet multi_controlnet lora inpaint image_to_image "
    assert NAMES == sorted((names + "animate few_steps batch").split())


@pytest.mark.parametrize("name", NAMES)
def test_example_runs_as_its_first_command_says(name, run_example, tmp_path, capsys):
    if name in NEED_PEFT:
        pytest.importorskip("peft")
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    commands = re.findall(r"^    (python .*)$", text, re.MULTILINE)
    assert commands == [f"python examples/{name}.py --tiny", f"python examples/{name}.py --model ./kosmos-g"]
    assert len(text.splitlines()) < 80
    run_example(name, "--tiny", "--output", str(tmp_path / "out"))
    path = tmp_path / "out" / f"{name}.{'gif' if name == 'animate' else 'png'}"
    out = capsys.readouterr().out
    assert str(path) in out and "random weights" in out
    with PIL.Image.open(path) as image:
        assert image.width % 64 == 0 and image.height % 64 == 0
        assert getattr(image, "n_frames", 1) == (16 if name == "animate" else 1)
        assert any(low != high for low, high in image.convert("RGB").getextrema())


def tiles(path, count):
    """The square pictures of a row that an example has written."""
    image = PIL.Image.open(path)
    return [image.crop((64 * index, 0, 64 * (index + 1), 64)).tobytes() for index in range(count)]


def test_three_ways_to_write_a_prompt_give_one_picture(run_example, tmp_path):
    run_example("interleaved_prompt", "--tiny", "--steps", "2", "--output", str(tmp_path))
    assert len(set(tiles(tmp_path / "interleaved_prompt.png", 3))) == 1


def test_lora_of_the_example_changes_the_picture(run_example, tmp_path):
    pytest.importorskip("peft")
    run_example("lora", "--tiny", "--steps", "2", "--output", str(tmp_path))
    assert len(set(tiles(tmp_path / "lora.png", 2))) == 2


@pytest.mark.parametrize("name", ["controlnet", "multi_controlnet"])
def test_without_controlnet_aux_other_edges_stand_in_and_that_is_said(
    name, run_example, tmp_path, monkeypatch, capsys
):
    def is_missing(*args, **kwargs):
        raise ImportError("controlnet_aux is not installed.")

    monkeypatch.setattr("kosmos_g_diffusers.control.control_image", is_missing)
    run_example(name, "--tiny", "--steps", "2", "--output", str(tmp_path))
    assert "controlnet_aux is not installed. Here plain differences" in capsys.readouterr().out
    edges = PIL.Image.open(tmp_path / f"{name}.png").crop((0, 0, 64, 64))
    assert edges.convert("L").getextrema()[1] > 100


def test_examples_ask_which_model_they_should_take(run_example, capsys):
    with pytest.raises(SystemExit):
        run_example("text_to_image")
    assert "--tiny --model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["text_to_image", "inpaint", "animate"])
def test_example_takes_a_model_from_a_folder(name, run_example, tmp_path, monkeypatch, capsys, pipe):
    from diffusers import MotionAdapter

    pipe.save_pretrained(tmp_path / "kosmos-g")
    sizes = {"motion_layers_per_block": 1, "motion_num_attention_heads": 4, "motion_norm_num_groups": 8}
    adapter = MotionAdapter(block_out_channels=(16, 32), **sizes)
    monkeypatch.setattr(MotionAdapter, "from_pretrained", lambda repo, **kwargs: adapter)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    arguments = ("--model", str(tmp_path / "kosmos-g"), "--steps", "2", "--output", str(tmp_path / "out"))
    run_example(name, *arguments)
    assert [path.stem for path in (tmp_path / "out").iterdir()] == [name]
    assert "random weights" not in capsys.readouterr().out


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
