"""Many clients at once, with attackers among them: everyone gets their own images, and the server's memory does not grow."""

import contextlib
import io
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import PIL.Image
import pytest
from support.app import wait_for

from kosmos_g_diffusers.generation.png import read_settings

httpx = pytest.importorskip("httpx", reason="pip install 'kosmos-g-diffusers[app]'")
gradio_client = pytest.importorskip("gradio_client", reason="pip install 'kosmos-g-diffusers[app]'")

CLIENTS, SECONDS, WARM_UP = 20, 120, 40
MOST_MORE = 1024  # MB of memory above what it is after the first run
PATIENCE = 300  # seconds until all have logged in
AUTH = ("anna", "a password of the tests")
API = "/gradio_api"
CAT = Path(__file__).parents[2] / "examples" / "images" / "cat.jpg"


def memory(process):
    """MB that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@pytest.fixture
def server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the command itself, in a process whose memory is nobody else's
    command = [sys.executable, "-m", "kosmos_g_diffusers", "app", "--port", str(port)]
    command += ["--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=open(tmp_path / "log", "wb"),  # noqa: SIM115  the process has it
        env={**os.environ, "KOSMOS_G_AUTH": ":".join(AUTH)},
        # a background job of a shell ignores Ctrl-C, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.url, process.log, process.folder = f"http://127.0.0.1:{port}", tmp_path / "log", tmp_path / "out"

    def answers():
        assert process.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers, seconds=300)
    yield process
    process.send_signal(signal.SIGINT)  # Ctrl-C
    assert process.wait(60) == 0


def visit(url, number, seconds, ready, made, refused, wrong, folder):
    """One client that draws again and again and looks at what it gets. `ready` is waited for when it has logged in."""
    options = {"verbose": False, "analytics_enabled": False, "download_files": folder, "auth": AUTH}
    client = gradio_client.Client(url, **options)
    cat = gradio_client.handle_file(str(CAT))
    count = 0
    ready.wait(PATIENCE)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        count += 1
        prompt, seed = f"<i> for client {number}, run {count}", 1000 * number + count
        try:
            images, settings, _ = client.predict(
                prompt=prompt, pictures=[cat], steps=3, surprise=False, seed=seed, api_name="/generate"
            )
        except gradio_client.exceptions.AppError as error:
            (refused if "queue is full" in str(error) else wrong).append(str(error))
            time.sleep(0.5)
            continue
        except Exception as error:  # noqa: BLE001  every other end of a request is what the test looks for
            wrong.append(repr(error))
            continue
        inside = read_settings(images[0]["image"])
        if (inside.prompt, inside.seed) != (prompt, seed) or settings[0]["seed"] != seed or len(images) != 1:
            wrong.append(f"{(prompt, seed)} got {(inside.prompt, inside.seed)}")
        made.append(seed)


def attack(url, seconds, ready, tell):
    """A session of an attacker: `tell` is called with an httpx.Client that is logged in, again and again."""
    with httpx.Client(base_url=url, timeout=60) as http:
        http.post("/login", data=dict(zip(("username", "password"), AUTH, strict=True)))
        ready.wait(PATIENCE)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError, OSError):  # whatever the server does with them
                tell(http)


def large():
    """A PNG of 40 million pixels in a few kilobytes."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (6320, 6320)).save(file, "PNG")
    return file.getvalue()


def make_upload_bomb(content):
    def bomb(http):
        """Uploads that break off, and large pictures that the page is asked to show and to paint on."""
        host, port = http.base_url.host, http.base_url.port
        cookies = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
        with socket.create_connection((host, port), timeout=30) as connection:
            head = f"POST {API}/upload HTTP/1.1\r\nHost: {host}:{port}\r\nCookie: {cookies}\r\nContent-Length: 9999999\r\n"
            head += "Content-Type: multipart/form-data; boundary=xx\r\n\r\n--xx\r\nContent-Disposition: form-data; "
            connection.sendall(f'{head}name="files"; filename="half.png"\r\n\r\n'.encode() + b"x" * 500_000)
        answer = http.post(f"{API}/upload", files=[("files", ("large.png", content))])
        if answer.status_code != 200:
            return
        file = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
        for entry in http.get("/config").json()["dependencies"]:
            if entry["targets"][0][1] == "load" and len(entry["inputs"]) == 4:  # the line below the prompt
                data = [None, "<i>", [file], "sprites"]
                body = {"data": data, "fn_index": entry["id"], "session_hash": secrets.token_hex(8)}
                http.post(f"{API}/run/predict", json=body)

    return bomb


def fill_queue(http):
    """Long runs that nobody listens for, of a session and of many."""
    parameters = http.get(f"{API}/info").json()["named_endpoints"]["/generate"]["parameters"]
    given = {"prompt": "a hat", "num_images": 8, "steps": 250}
    values = [given.get(entry["parameter_name"], entry["parameter_default"]) for entry in parameters]
    for number in range(30):
        body = {"data": values, "session_hash": "one" if number % 2 else secrets.token_hex(8)}
        http.post(f"{API}/call/generate", json=body)


def make_guesser(statuses):
    def guess(http):
        form = {"username": AUTH[0], "password": secrets.token_hex(4)}
        statuses.append(http.post("/login", data=form).status_code)
        time.sleep(0.02)

    return guess


@pytest.mark.parametrize(
    ("clients", "seconds"), [(3, 8), pytest.param(CLIENTS, SECONDS, marks=pytest.mark.slow)]
)
def test_honest_clients_get_their_pictures_whatever_attackers_send(server, tmp_path, clients, seconds):
    made, refused, wrong, sizes, guesses = [], [], [], [], []
    folder = str(tmp_path / "downloads")
    first = (0.1, threading.Barrier(1), made, wrong, wrong, folder)
    visit(server.url, 999, *first)  # the model is there
    assert made and not wrong
    warm = memory(server)
    attackers = (make_upload_bomb(large()), fill_queue, make_guesser(guesses))
    ready = threading.Barrier(clients + len(attackers) + 1)
    by_client = [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=visit, args=(server.url, number, seconds, ready, own, refused, wrong, folder))
        for number, own in enumerate(by_client)
    ]
    for tell in attackers:
        threads.append(threading.Thread(target=attack, args=(server.url, seconds, ready, tell)))
    for thread in threads:
        thread.start()
    ready.wait(PATIENCE)
    started = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        sizes.append((time.monotonic() - started, memory(server)))
    made = [seed for own in by_client for seed in own]
    most = max(size for _, size in sizes)
    limited = guesses.count(429)
    print(
        f"\n{len(made)} images (each client {min(map(len, by_client))} to {max(map(len, by_client))}), {len(refused)} times "
        f"'queue is full', memory {warm:.0f} MB, at most {most:.0f} MB; {len(guesses)} guesses, {limited} of them 429"
    )
    assert not wrong
    assert all(by_client) and len(made) == len(set(made))
    assert most - warm < MOST_MORE
    assert guesses.count(200) == 0 and guesses.count(400) <= 30
    assert b"Traceback" not in server.log.read_bytes()
    assert not list((server.folder / "uploads").rglob("half.png"))
    if seconds == SECONDS:
        # between two large pictures: what is kept does not grow
        first = min(size for at, size in sizes if WARM_UP - 10 < at < WARM_UP)
        last = min(size for at, size in sizes if seconds - 10 < at < seconds)
        assert last < 1.05 * first
