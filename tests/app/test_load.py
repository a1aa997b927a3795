"""Many clients at once for two minutes: everyone gets their own images, and the server's memory does not grow."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.app import wait_for

from kosmos_g_diffusers.generation.png import read_settings

gradio_client = pytest.importorskip("gradio_client", reason="pip install 'kosmos-g-diffusers[app]'")

CLIENTS, SECONDS, WARM_UP = 20, 120, 40
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
        stderr=subprocess.DEVNULL,
        # a background job of a shell ignores Ctrl-C, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.url = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers, seconds=300)
    yield process
    process.send_signal(signal.SIGINT)  # Ctrl-C
    assert process.wait(60) == 0


def visit(url, number, until, made, refused, wrong, folder):
    """One client that draws again and again and looks at what it gets."""
    client = gradio_client.Client(url, verbose=False, analytics_enabled=False, download_files=folder)
    cat = gradio_client.handle_file(str(CAT))
    count = 0
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


@pytest.mark.slow
def test_twenty_clients_for_two_minutes(server, tmp_path):
    made, refused, wrong, sizes = [], [], [], []
    started = time.monotonic()
    arguments = (started + SECONDS, made, refused, wrong, str(tmp_path / "downloads"))
    threads = [
        threading.Thread(target=visit, args=(server.url, number, *arguments)) for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        sizes.append((time.monotonic() - started, memory(server)))
    warm = [size for seconds, size in sizes if WARM_UP - 10 < seconds < WARM_UP]
    last = [size for seconds, size in sizes if SECONDS - 10 < seconds < SECONDS]
    warm, last = max(warm), max(last)
    print(f"\n{len(made)} images, {len(refused)} times 'queue is full', memory {warm:.0f} -> {last:.0f} MB")
    assert not wrong
    assert len(made) == len(set(made)) > CLIENTS
    assert last < 1.05 * warm
