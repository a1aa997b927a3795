"""Which device and dtype each command takes. The devices' availability is a fake; no model runs."""

from types import SimpleNamespace

import PIL.Image
import pytest
import torch

from kosmos_g_diffusers import captioning, cli, environment
from kosmos_g_diffusers.control import controls
from kosmos_g_diffusers.data import making
from kosmos_g_diffusers.evaluation import run as evaluation_run
from kosmos_g_diffusers.generation import generate
from kosmos_g_diffusers.serving import models

DEVICES = {"cpu": None, "cpu:0": None, "cuda": "cuda", "cuda:1": "cuda", "mps": "mps"}


class Chosen(BaseException):
    """Ends a command where its choice is known; no error, which would become a line."""


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """The name of a device on a machine that has it."""
    put_accelerator(monkeypatch, DEVICES[request.param])
    return request.param


def put_accelerator(monkeypatch, kind):
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: found)


def choice(monkeypatch, module, name, read, *arguments):
    """(device, dtype) that `kosmos-g` has chosen when it calls `name` of a module."""
    chosen = []

    def stop(*args, **kwargs):
        chosen.append(tuple(str(value).removeprefix("torch.") for value in read(*args, **kwargs)))
        raise Chosen

    monkeypatch.setattr(module, name, stop)
    with pytest.raises(Chosen):
        cli.main([*arguments])
    return chosen[0]


def of_settings(settings, *args, **kwargs):
    return settings.device, settings.dtype


def half_of(device, half="float16"):
    return "float32" if device.startswith("cpu") else half


def test_generate(device, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    chosen = choice(
        monkeypatch, generate, "load_pipeline", of_settings, "generate", "a hat", "--device", device
    )
    assert chosen == (device, half_of(device))


def test_caption(device, monkeypatch):
    def read(model, dtype, device):
        return device, dtype

    chosen = choice(
        monkeypatch, captioning, "load_answerer", read, "caption", "photo.png", "--device", device
    )
    assert chosen == (device, half_of(device))


def test_evaluate(device, monkeypatch, tmp_path):
    def read(*args, settings, device, **kwargs):
        return device, settings["dtype"]

    flags = ("evaluate", "sprites", "--count", "2", "--output", str(tmp_path / "run"), "--device", device)
    assert choice(monkeypatch, evaluation_run, "evaluate", read, *flags) == (device, half_of(device))


def test_app(device, monkeypatch, tmp_path):
    pytest.importorskip("gradio")

    make = models.Models

    def read(*args, **keywords):
        made = make(*args, **keywords)
        return made.device, made.dtype

    flags = ("app", "--output", str(tmp_path), "--device", device)
    assert choice(monkeypatch, models, "Models", read, *flags) == (device, half_of(device))


def test_data(device, monkeypatch, tmp_path):
    def read(*args, device, dtype, **kwargs):
        return device, dtype

    flags = (
        "data",
        "compose",
        "--images",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
        "--device",
        device,
    )
    assert choice(monkeypatch, making, "compose", read, *flags) == (device, half_of(device, "bfloat16"))


def test_control(device, monkeypatch, tmp_path):
    def read(*args, device, **kwargs):
        return device, "none"

    flags = ("control", "canny", "photo.png", "--output", str(tmp_path / "edges.png"), "--device", device)
    assert choice(monkeypatch, controls, "control_image", read, *flags) == (device, "none")


def test_model_of_lmms_eval(device, monkeypatch):
    lmms = pytest.importorskip("kosmos_g_diffusers.evaluation.lmms")
    chosen = []
    monkeypatch.setattr(lmms, "load_answerer", lambda model, dtype, place: chosen.append((str(place), dtype)))
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=1, process_index=0)
    monkeypatch.setattr(lmms, "Accelerator", lambda cpu: accelerator)
    lmms.KosmosGForLmms(device=device)
    assert chosen == [(device, getattr(torch, half_of(device)))]


@pytest.mark.parametrize("kind", [None, "cuda", "mps"])
def test_without_a_device_the_accelerator_is_taken(kind, monkeypatch, tmp_path):
    put_accelerator(monkeypatch, kind)
    monkeypatch.chdir(tmp_path)
    expected = (kind or "cpu", half_of(kind or "cpu"))
    assert choice(monkeypatch, generate, "load_pipeline", of_settings, "generate", "a hat") == expected
    assert (environment.default_device(), environment.default_dtype(environment.default_device())) == expected


@pytest.mark.parametrize(
    ("name", "message"), [("cuda", "'cuda' is not there; 'cpu' is"), ("gpu", "'gpu' is not a device")]
)
def test_device_that_is_not_there_is_named(name, message, monkeypatch):
    put_accelerator(monkeypatch, None)
    with pytest.raises(ValueError, match=message):
        environment.check_device(name)


def test_cpu_with_a_number_draws_the_same_image(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images = []
    for device in ("cpu", "cpu:0"):
        assert (
            cli.main(
                [
                    "generate",
                    "a large red plain star on a mint background",
                    *"--seed 3 --steps 2".split(),
                    "--device",
                    device,
                    "--output",
                    f"{device[-1]}.png",
                ]
            )
            == 0
        )
        images.append(PIL.Image.open(f"{device[-1]}.png").tobytes())
    assert images[0] == images[1]
