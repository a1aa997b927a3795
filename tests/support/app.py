"""The app as the tests run it: in this process, on a free port, with a folder of its own. Unless a test wants the small
model that ships, a toy is in its place, which has random ControlNets of every kind."""

import base64
import io
import os
import shutil
import socket
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import PIL.Image
import pytest

from kosmos_g_diffusers.control.controls import CONTROLS
from kosmos_g_diffusers.serving.models import Models
from kosmos_g_diffusers.serving.service import Service
from kosmos_g_diffusers.serving.store import Store
from kosmos_g_diffusers.testing import build_random_controlnet, build_tiny_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 60  # seconds; a busy machine is slow, and every wait ends as soon as what it waits for is there


@contextmanager
def serving(
    folder,
    capacity=16,
    model_folders=(),
    lora_folder=None,
    unet_folder=None,
    auth=None,
    toy=True,
    wait=True,
    controls=True,
    mcp=False,
    **store,
):
    """A running app: `url`, `service`, `folder` (its output folder).

    Args:
        toy: take the toy for the small model that ships.
        wait: until the model is loaded.
        store: options of Store.
    """
    pytest.importorskip("gradio", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")
    environment = {name: os.environ.get(name) for name in os.environ}
    before = os.getcwd()
    os.chdir(folder)  # as commands/app.py does
    from kosmos_g_diffusers.app.page import serve

    patches = ExitStack()
    if toy:
        put_toy(patches)
    service = Service(Models(model_folders, lora_folder, unet_folder), Store(".", **store), capacity)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = serve(service, controls=controls, port=port, auth=auth, block=False, mcp=mcp)
    try:
        if wait:
            wait_for(lambda: service.models.state == "ready")
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", service=service, folder=folder, blocks=blocks)
    finally:
        service.close()
        blocks.close(verbose=False)
        patches.close()
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def put_toy(patches):
    """Have an ExitStack put the toy in the place of the small model; returns its folder."""
    pipe = build_tiny_pipeline()
    folder = patches.enter_context(tempfile.TemporaryDirectory())
    pipe.save_pretrained(folder)

    def load(source, dtype):
        return build_random_controlnet(pipe.unet, sum(map(ord, source)))

    for name, value in {
        "sprites.pretrained.SPRITES": folder,
        "sprites.pretrained.sprites_controlnet": lambda name: name,
        "serving.models.SPRITES": folder,
        "control.controls.load_controlnet": load,
        "generation.generate.load_controlnet": load,
    }.items():
        patches.enter_context(mock.patch(f"kosmos_g_diffusers.{name}", value))
    patches.enter_context(mock.patch.object(Models, "controls", lambda models, name: tuple(CONTROLS)))
    return folder


def wait_for(condition, seconds=PATIENCE):
    """Return what `condition` gives once that is true; fail when it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("it took too long")


@contextmanager
def slow_steps(service, seconds):
    """Let each denoising step of the loaded model take some time; yields a list with an entry for each step."""
    unet, steps = service.models.pipe.unet, []
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


# The page in a browser ---------------------------------------------------------------------------------------------


@contextmanager
def chromium():
    """A browser of Playwright; skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@contextmanager
def visiting(browser, app):
    """The page of a new user, ready to be used."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened.set_default_timeout(1000 * PATIENCE * slowness())
    opened.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    errors = []

    def note(told):
        if told.type == "error":
            errors.append(f"{told.text} {told.location.get('url')}")

    opened.on("console", note)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(app.url)
    opened.wait_for_selector("text=Ready.")
    yield opened
    opened.close()
    wait_for(lambda: app.service.worker._running is None)  # a page that is closed ends its run
    assert not errors, errors


def unfold(page, title):
    """Open a folded part of the page, whose components gradio makes only then: what is typed meanwhile is lost."""
    page.click(title)
    page.evaluate(
        """() => new Promise(done => {
            const later = callback => requestIdleCallback(callback, {timeout: 5000})
            later(() => later(done))
        })"""
    )


def drop(page, selector, *paths, onto="button:has(input[type=file])"):
    """Drop files as a hand does: with a DataTransfer, on the drop zone."""
    files = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in map(Path, paths)]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer()
            for (const [name, text] of files) {
                const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0))
                transfer.items.add(new File([bytes], name, {type: name.endsWith("png") ? "image/png" : "image/jpeg"}))
            }
            return transfer
        }""",
        files,
    )
    page.dispatch_event(f"{selector} {onto}", "drop", {"dataTransfer": transfer})


def run(page):
    page.click("#run")
    page.wait_for_selector("#progress:has-text('Done')")
    page.wait_for_selector("#details table")


def table(page):
    """The settings that the page shows."""
    rows = page.locator("#details tr").all()
    return dict(row.inner_text().split("\t") for row in rows)


def saved(page, index=0):
    """An image of the gallery, as the browser gets it."""
    source = page.locator("#images img").nth(index).get_attribute("src")
    return page.request.get(source).body()


def control_image_of(page):
    page.click("#control_1_look")
    page.wait_for_selector("#control_1_image img")
    body = page.request.get(page.locator("#control_1_image img").first.get_attribute("src")).body()
    return PIL.Image.open(io.BytesIO(body))
