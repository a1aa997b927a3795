"""Files that version 0.1.0 wrote (tests/fixtures/earlier/make.py made them): every later version reads and resumes them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.training import load_adapter

FIXTURES = Path(__file__).parent / "fixtures" / "earlier"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of the files, as the current folder: they name each other by relative paths."""
    folder = tmp_path / "earlier"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def condition(pipe, prompt):
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0, :3, :4].flatten().tolist()


def as_array(path):
    return np.asarray(PIL.Image.open(path)).astype(float)


@pytest.mark.parametrize("remote_code", [False, True])
def test_model_folder_and_image_words(earlier, remote_code):
    load = DiffusionPipeline if remote_code else KosmosGPipeline
    pipe = load.from_pretrained("model", **({"trust_remote_code": True} if remote_code else {}))
    pipe.load_image_words("words.safetensors")
    assert pipe.image_words == ["<dog>", "<pair>"]
    found = condition(pipe, "<dog> with <pair>")
    assert found == pytest.approx(EXPECTED["condition of <dog> with <pair>"], abs=1e-3)


def test_png_with_every_setting(earlier):
    """Images, image words, a ControlNet, a U-Net and a LoRA; from the run's second image, with the seed counted up."""
    pytest.importorskip("peft")
    # in a process of its own: random weights amplify rounding, and that follows where earlier tests left the memory
    command = [
        sys.executable,
        "-m",
        "kosmos_g_diffusers",
        "generate",
        "--from",
        "drawn_1.png",
        "--output",
        "again.png",
    ]
    subprocess.run(command, check=True)
    assert np.abs(as_array("again.png") - as_array("drawn_1.png")).max() <= 2  # other CPUs round otherwise


def test_training_run_is_resumed(earlier):
    pytest.importorskip("accelerate")
    settings = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    flags = "--model model --data tsv:captions:captions.tsv --words tsv:captions:captions.tsv --words-share 0.3".split()
    flags += [
        f"--{name.replace('_', '-')}={settings[name]}"
        for name in ("batch_size", "lr", "warmup_steps", "steps")
    ]
    flags += ["--save-every=2", "--log-every=1", "--workers=0", "--bucket-window=1", "--output=run"]
    assert main(["train", "instruct", *flags]) == 0
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    for found, expected in zip(log, EXPECTED["log of the run"], strict=True):
        del found["samples_per_second"], expected["samples_per_second"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_adapter_is_loaded(earlier):
    pytest.importorskip("peft")
    pipe = KosmosGPipeline.from_pretrained("model")
    load_adapter(pipe, "adapter")
    with torch.no_grad():
        assert condition(pipe, "a hat") == pytest.approx(EXPECTED["condition with the adapter"], abs=1e-3)


def test_evaluation_run_is_resumed(earlier):
    pytest.importorskip("matplotlib")
    path = Path("evaluation/manifest.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    header = json.loads(lines[0])
    # images of one run are made with one set of versions: these are the installed ones
    import diffusers
    import PIL
    import transformers

    import kosmos_g_diffusers

    modules = (kosmos_g_diffusers, torch, diffusers, transformers, PIL)
    header["conditions"]["versions"] = {module.__name__: str(module.__version__) for module in modules}
    path.write_text("".join([json.dumps(header) + "\n", *lines[1:]]), encoding="utf-8")
    kept = {image: image.read_bytes() for image in Path("evaluation/images").rglob("*.png")}
    assert len(kept) == 3
    flags = "--model model --count 2 --steps 2 --device cpu --batch-size 2 --output evaluation".split()
    assert main(["evaluate", "sprites", *flags]) == 0
    assert all(image.read_bytes() == content for image, content in kept.items())
    found = {
        image.relative_to("evaluation/images").as_posix(): as_array(image).mean((0, 1)).tolist()
        for image in Path("evaluation/images").rglob("*.png")
    }
    expected = EXPECTED["mean colours of the images of the evaluation"]
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(colours, abs=0.5) for name, colours in expected.items())
    assert json.loads(Path("evaluation/report.json").read_text(encoding="utf-8"))["counts"]["images"] == 8
