"""The app as `kosmos-g app` starts it without flags: the small model that ships, its loading, the page that suits it, its end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from support.app import (
    chromium,
    control_image_of,
    drop,
    run,
    saved,
    serving,
    table,
    unfold,
    visiting,
    wait_for,
)
from tqdm import TMonitor

from kosmos_g_diffusers.app.examples import sprite_examples
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.control.controls import control_image
from kosmos_g_diffusers.generation import generate as generation
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.settings import ControlInput, GenerationSettings, InputImage
from kosmos_g_diffusers.sprites.reader import read
from kosmos_g_diffusers.sprites.world import COLOURS, HELD_OUT_TRIPLES, SHAPES, Scene, make_rng, render

gradio = pytest.importorskip("gradio", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")

from kosmos_g_diffusers.serving.passwords import Accounts  # noqa: E402
from kosmos_g_diffusers.serving.web import WebServer  # noqa: E402

PHOTOS = Path(__file__).parents[2] / "examples" / "images"
CAT, STAR = PHOTOS / "cat.jpg", PHOTOS / "star.png"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("sprites"), toy=False) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(app, browser):
    with visiting(browser, app) as opened:
        yield opened


def numbers(page):
    return [page.input_value(f"#{name} input") for name in ("steps", "guidance", "scheduler")]


def test_page_says_that_the_model_knows_sprites_alone_and_starts_with_what_suits_it(page):
    assert "This small model knows nothing but sprites" in page.inner_text("#model-state")
    assert page.input_value("#model input") == "sprites"
    assert numbers(page) == ["12", "5", "dpm"]
    page.click("#preset-paper")
    wait_for(lambda: numbers(page) == ["100", "7.5", "dpm"])
    page.click("#preset-fast")
    wait_for(lambda: numbers(page) == ["12", "5", "dpm"])


def test_photo_is_told_to_mean_nothing_and_a_sprite_is_not(page):
    drop(page, "#pictures", CAT)
    page.wait_for_selector("#prompt-line .kg-note:has-text('a photo means nothing to it')")
    page.fill("#prompt textarea", "<i>")
    page.fill("#steps input", "1")
    run(page)  # told, not refused
    page.goto(page.url)
    page.wait_for_selector("text=Ready.")
    drop(page, "#pictures", STAR)
    page.wait_for_selector("#prompt-line:has-text('0 <i>, 1 image')")
    assert page.locator(".kg-note").count() == 0


def test_every_example_loads_with_one_click_and_is_drawn(page, tmp_path):
    examples = sprite_examples()
    buttons = page.locator(".kg-example:visible")
    assert buttons.all_inner_texts() == [example.prompt for example in examples]
    for index, example in enumerate(examples):
        count = f"{example.prompt.count('<i>')} <i>, {len(example.images)} image"
        buttons.nth(index).click()
        page.wait_for_function(
            "text => document.querySelector('#prompt textarea').value == text", arg=example.prompt
        )
        page.wait_for_selector(f"#prompt-line:has-text('{count}')")
        assert page.locator("#prompt-line img").count() == len(example.images)
        assert page.locator("#prompt-line .kg-note").count() == 0
        for name, _ in example.images:
            page.wait_for_selector(f"#pictures .kg-tile img[alt='{name}']")
    run(page)
    shown = table(page)
    assert (shown["prompt"], shown["steps"], shown["width"]) == (examples[-1].prompt, "12", "64")
    (tmp_path / "mine.png").write_bytes(saved(page))
    assert read_settings(tmp_path / "mine.png").model is None


def test_examples_are_of_sprites_that_were_held_out():
    shown = set()
    for example in sprite_examples():
        words = example.prompt.replace(",", "").split()
        named = [(shape, *words[place - 2 : place]) for place, shape in enumerate(words) if shape in SHAPES]
        seen = [read(image).sprites[0].triple for _, image in example.images]
        assert [f"{colour}-{pattern}-{shape}.png" for shape, colour, pattern in seen] == [
            name for name, _ in example.images
        ]
        if words[-1] in COLOURS:  # what the sprite is to become
            named.append((seen[0][0], words[-1], seen[0][2]))
        assert {*named, *seen} <= {*HELD_OUT_TRIPLES}
        shown |= {*named, *seen}
    assert len(shown) == 5


def test_canny_alone_is_offered_and_decides_where_a_sprite_is(page):
    pytest.importorskip("cv2", reason="canny needs the extra control")
    unfold(page, "#controls >> text=Controls")
    page.wait_for_selector("#controls >> text=ControlNet for canny alone")  # the panel takes its time to open
    page.click("#control_1_kind input")
    kinds = page.locator("[role=option]").all_inner_texts()
    assert [kind.replace("✓", "").strip().partition(":")[0] for kind in kinds] == ["none", "canny"]
    page.click("[role=option]:has-text('canny:')")
    page.set_input_files("#control_1_picture input[type=file]", STAR)
    page.wait_for_selector("#control_1_picture img")
    assert control_image_of(page).tobytes() == control_image("canny", STAR).tobytes()
    page.fill("#prompt textarea", "a large yellow striped star on a lavender background")
    run(page)
    assert table(page)["controls"] == "canny, strength 1, from 0 to 1"


def write_depth(path):
    """A PNG that was made under a control of depth, with a ControlNet of its own."""
    image = InputImage.from_file(STAR)
    control = ControlInput("depth", image, controlnet="x")
    settings = GenerationSettings("<i>", images=(image,), controls=(control,))
    write_png(render(Scene((), "mint"), make_rng(0)), path, settings)


def test_restored_control_that_is_not_offered_is_told(page, tmp_path):
    write_depth(tmp_path / "depth.png")
    drop(page, "#restore", tmp_path / "depth.png")
    page.wait_for_selector("#restore-message:has-text('Controls that are not offered here: depth.')")
    assert "a ControlNet of its own" in page.inner_text("#restore-message")
    unfold(page, "#controls >> text=Controls")
    assert page.input_value("#control_1_kind input") == "none"


def test_page_is_there_while_the_model_loads_and_says_how_that_ends(tmp_path, browser, monkeypatch):
    gate, load = threading.Event(), generation.load_model

    def slow(*args):
        gate.wait(60)
        return load(*args)

    monkeypatch.setattr("kosmos_g_diffusers.generation.generate.load_model", slow)
    with serving(tmp_path, toy=False, wait=False, controls=False) as app:
        opened = browser.new_page()
        try:
            opened.goto(app.url)
            opened.wait_for_selector(
                "#model-state:has-text('The model is loading. You can write your prompt')"
            )
            opened.click(".kg-example >> nth=0")
            opened.wait_for_selector("#prompt-line:has-text('1 <i>, 1 image')")
            opened.fill("#steps input", "1")
            opened.click("#run")  # waits for its turn behind the loading
            opened.wait_for_selector("#progress:has-text('In the queue: place 1')")
            gate.set()
            opened.wait_for_selector("#model-state:has-text('Ready.')")
            opened.wait_for_selector("#progress:has-text('Done')")
            assert opened.locator("#controls").count() == 0  # without --control
            write_depth(tmp_path / "depth.png")
            drop(opened, "#restore", tmp_path / "depth.png")
            opened.wait_for_selector("#restore-message:has-text('not offered here: depth')")
        finally:
            gate.set()
            opened.close()


def test_model_that_cannot_be_loaded_is_told_on_the_page(tmp_path, browser, monkeypatch):
    def broken(*args):
        raise OSError("no weights in /srv/models/secret")

    monkeypatch.setattr("kosmos_g_diffusers.generation.generate.load_model", broken)
    with serving(tmp_path, toy=False, wait=False) as app:
        opened = browser.new_page()
        opened.goto(app.url)
        opened.wait_for_selector("#model-state:has-text('The model could not be loaded.')")
        assert "secret" not in opened.content()
        opened.close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Arguments for the command, whose changes of folder and environment end with the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_ANALYTICS_MAX_EVENTS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield ["app", "--port", str(port), "--output", "made"]
    signal.signal(signal.SIGINT, before)


def test_command_opens_the_page_and_ctrl_c_ends_it(place, tmp_path, monkeypatch, capsys):
    block, answers, before = gradio.Blocks.block_thread, [], set(threading.enumerate())

    def look_then_interrupt(blocks):
        answers.append(urllib.request.urlopen(blocks.local_url).status)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        block(blocks)

    monkeypatch.setattr(gradio.Blocks, "block_thread", look_then_interrupt)
    assert main(place) == 0
    assert answers == [200] and (tmp_path / "made" / "images").is_dir()
    printed = capsys.readouterr()
    assert f"Open http://127.0.0.1:{place[2]}/ in a browser. Ctrl-C ends the app." in printed.out
    assert "Traceback" not in printed.err and "share=True" not in printed.out
    # the server's threads and the workers; tqdm's belongs to the process
    wait_for(lambda: all(isinstance(thread, TMonitor) for thread in {*threading.enumerate()} - before))


def test_command_starts_behind_a_proxy_that_does_not_know_this_machine(place, monkeypatch, capsys):
    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda blocks: blocks.close(verbose=False))
    assert main(place) == 0
    assert f"Open http://127.0.0.1:{place[2]}/" in capsys.readouterr().out


def test_proxy_of_a_kind_that_gradio_does_not_know_is_no_obstacle():
    run = subprocess.run(
        [sys.executable, "-m", "kosmos_g_diffusers", "app", "--allowed-host", "not a name"],
        env={**os.environ, "ALL_PROXY": "socks5://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and "'not a name' is not a name" in run.stderr, run.stderr


def test_server_that_needs_long_for_its_first_answer_is_waited_for():
    asked = []

    async def slow(scope, receive, send):
        if scope["type"] == "http":
            asked.append(scope["path"])
            await asyncio.sleep(3.2)  # gradio gives up after 3
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = WebServer(slow, "127.0.0.1", port)
    server.start()
    assert asked == ["/"]
    server.close()


def test_server_that_never_answers_is_told(monkeypatch):
    monkeypatch.setattr("kosmos_g_diffusers.serving.web.STARTING", 0.5)

    async def broken(scope, receive, send):
        raise RuntimeError

    server = WebServer(broken, "127.0.0.1", 0)
    with pytest.raises(OSError, match=r"did not answer within 0 seconds|did not answer"):
        server.start()


@pytest.fixture
def started(monkeypatch):
    """What the command hands to `serve`, without serving."""
    given = []

    def serve(service, *arguments, **options):
        given.append((service, *arguments, options))

    monkeypatch.setattr("kosmos_g_diffusers.app.page.serve", serve)
    return given


def test_password_comes_from_a_file_or_the_environment_and_a_flag_warns(
    place, tmp_path, started, monkeypatch, capsys
):
    line = subprocess.run(
        [sys.executable, "-m", "kosmos_g_diffusers", "app", "--hash-password"],
        input="anna:secret\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "users").write_text(line)
    assert main([*place, "--auth-file", str(tmp_path / "users"), "--host", "0.0.0.0"]) == 0
    assert Accounts(started[-1][5]).check("anna", "secret") and not Accounts(started[-1][5]).check(
        "anna", "x"
    )
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOSMOS_G_AUTH", " bob:a:b")  # a name is typed without the space
    assert main(place) == 0
    assert started[-1][5] == {"bob": "a:b"} and "KOSMOS_G_AUTH" not in os.environ
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path)
    assert main([*place, "--auth", "anna:secret"]) == 0
    assert started[-1][5] == {"anna": "secret"} and "list of processes" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([*place, "--auth", "a:b", "--auth-file", str(tmp_path / "users")]) == 2
    (tmp_path / "users").write_text("anna:$apr1$x$y")
    assert main([*place, "--auth-file", str(tmp_path / "users")]) == 2
    assert "htpasswd's MD5" in capsys.readouterr().err


def test_limit_of_the_disk_counts_images_only_where_it_is_given(
    place, tmp_path, started, capsys, monkeypatch
):
    assert main(place) == 0
    store = started[-1][0].store
    assert (store.limit, store.prunes_images) == (2 * 2**30, False)
    monkeypatch.chdir(tmp_path)
    assert (
        main([*place, "--disk-limit", "0.5", "--allowed-host", "a.example", "--allowed-host", "*.b.example"])
        == 0
    )
    store = started[-1][0].store
    assert (store.limit, store.prunes_images) == (500_000_000, True)
    assert started[-1][6] == {"allowed_hosts": ["a.example", "*.b.example"], "mcp": False}
    monkeypatch.chdir(tmp_path)
    for flags in (["--disk-limit", "0"], ["--disk-limit", "nan"], ["--allowed-host", "http://x"]):
        assert main([*place, *flags]) == 2
        assert flags[0] in capsys.readouterr().err


FIRST_ANSWER = """
import os, signal, sys, threading, time, urllib.error, urllib.request
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.serving.models import Models

answered, made, load = threading.Event(), [], Models.load

def wait_and_load(models, name=None):
    made.append(models)
    answered.wait(60)
    load(models, name)

def visit():
    while not made:  # the service starts when the page listens
        time.sleep(0.02)
    page = urllib.request.urlopen("http://127.0.0.1:" + sys.argv[3]).read().decode()
    print("Kosmos-G" in page, made[0].state, sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
    answered.set()
    while made[0].state == "loading":
        time.sleep(0.02)
    print(made[0].state, flush=True)
    os.kill(os.getpid(), signal.SIGINT)

Models.load = wait_and_load
threading.Thread(target=visit, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


def test_first_answer_comes_before_the_model_and_its_libraries_are_loaded(place, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_ANSWER, *place], cwd=tmp_path, capture_output=True, text=True
    )
    assert "True loading []\nready\n" in ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "")


def test_port_that_is_taken_is_told(place, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(place[2])))
        taken.listen()
        assert main(place) == 2
    assert f"cannot listen at 127.0.0.1:{place[2]}" in capsys.readouterr().err
