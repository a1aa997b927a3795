"""The app as the tests run it: in this process, on a free port, with a folder of its own, and a toy in place of the small
model that ships, which has random ControlNets of every kind."""

import os
import shutil
import socket
import tempfile
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest

from kosmos_g_diffusers.control import build_random_controlnet
from kosmos_g_diffusers.studio.models import Models
from kosmos_g_diffusers.studio.store import Store
from kosmos_g_diffusers.studio.studio import Studio
from kosmos_g_diffusers.tiny import build_tiny_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 60  # seconds; a busy machine is slow, and every wait ends as soon as what it waits for is there


@contextmanager
def serving(folder, capacity=16, model_folders=(), lora_folder=None, unet_folder=None, auth=None):
    """A running app: `url`, `studio`, `folder` (its output folder)."""
    pytest.importorskip("gradio", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")
    environment = {name: os.environ.get(name) for name in os.environ}
    before = os.getcwd()
    os.chdir(folder)  # as commands/app.py does
    from kosmos_g_diffusers.app import serve

    pipe = build_tiny_pipeline()
    pipe.save_pretrained(toy := tempfile.mkdtemp())
    patches = mock.patch.multiple(
        "kosmos_g_diffusers.generation",
        SPRITES=toy,
        load_sprites_controlnet=lambda name, dtype: build_random_controlnet(pipe.unet, sum(map(ord, name))),
    )
    patches.start()
    studio = Studio(Models(model_folders, lora_folder, unet_folder), Store("."), capacity)
    studio.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = serve(studio, controls=True, port=port, auth=auth, block=False)
    try:
        wait_for(lambda: studio.models.state == "ready")
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", studio=studio, folder=folder, blocks=blocks)
    finally:
        studio.close()
        blocks.close(verbose=False)
        patches.stop()
        shutil.rmtree(toy)
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def wait_for(condition, seconds=PATIENCE):
    """Return what `condition` gives once that is true; fail when it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("it took too long")


@contextmanager
def slow_steps(studio, seconds):
    """Let each denoising step of the loaded model take some time; yields a list with an entry for each step."""
    unet, steps = studio.models.pipe.unet, []
    forward = unet.forward

    def slow(*args, **kwargs):
        steps.append(time.monotonic())
        time.sleep(seconds)
        return forward(*args, **kwargs)

    unet.forward = slow
    try:
        yield steps
    finally:
        del unet.forward


def slowness():
    """How much longer this machine takes than it would with nothing else to do: 1 when it is idle."""
    wall, cpu = time.monotonic(), time.thread_time()
    while time.thread_time() - cpu < 0.3:
        sum(range(1000))
    return max(1.0, (time.monotonic() - wall) / 0.3)
