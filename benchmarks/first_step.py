"""CPU seconds from a command to its first sign of work, each in a process of its own (Linux: they are read from /proc):

    python benchmarks/first_step.py

`kosmos-g generate` draws one step with the small model that ships and ends, and is compared with a process that imports torch
and reads that model's weights; next to it stand the imports that it cannot do without. `kosmos-g app` is timed until its first
answer, and compared with a server of gradio alone.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial

from parts.arguments import parse
from parts.measure import ratio, report, spread

PATIENCE = 300  # seconds until a server answers
WEIGHTS = """
import torch
from pathlib import Path
from safetensors.torch import load_file
from kosmos_g_diffusers import SPRITES
weights = [load_file(path) for path in Path(SPRITES).glob("*/*.safetensors") if path.parent.name != "controlnet"]
assert sum(tensor.sum().isfinite() for file in weights for tensor in file.values())
"""
CLASSES = """
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.kosmos2 import modeling_kosmos2
from diffusers import StableDiffusionPipeline
"""
EMPTY = """
import gradio
with gradio.Blocks(analytics_enabled=False) as page:
    gradio.Button("Run")
page.launch(server_port={port}, quiet=True)
"""
GENERATE = (
    "generate",
    "a small pink plain ring on a white background",
    "--steps",
    "1",
    "--seed",
    "1",
    "--force",
)
READING, DRAWING = "import torch and read the weights", "kosmos-g generate, one step"
PAGE, APP = "a server of gradio with a button", "kosmos-g app"


def cpu_seconds(process):
    """Of a process that runs, its threads included."""
    with open(f"/proc/{process.pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def until_it_ends(folder, *arguments):
    """(CPU seconds, seconds) of a process."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=nowhere, stderr=nowhere)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with code {process.returncode}.")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def until_it_answers(folder, make_arguments):
    """(CPU seconds, seconds) of a server until it has given its first page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *make_arguments(port)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and time.perf_counter() - start < PATIENCE:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
                    page.read()
                return cpu_seconds(process), time.perf_counter() - start
            except OSError:  # it does not listen yet
                time.sleep(0.02)
        sys.exit(f"The server did not answer: {' '.join(make_arguments(port))}")
    finally:
        process.kill()
        process.wait()


def main():
    parser = argparse.ArgumentParser(
        description="CPU seconds of kosmos-g until its first step and first answer."
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind (default: 5)")
    arguments = parse(parser)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        end = partial(until_it_ends, folder)
        answer = partial(until_it_answers, folder)
        kosmos_g = ("-m", "kosmos_g_diffusers")
        kinds = {
            "import torch": partial(end, "-c", "import torch"),
            READING: partial(end, "-c", WEIGHTS),
            "import torch, the classes of diffusers and transformers": partial(end, "-c", CLASSES),
            DRAWING: partial(end, *kosmos_g, *GENERATE),
            PAGE: partial(answer, lambda port: ("-c", EMPTY.format(port=port))),
            APP: partial(answer, lambda port: (*kosmos_g, "app", "--port", str(port))),
        }
        found = {name: [] for name in kinds}
        for _ in range(1 if arguments.tiny else arguments.rounds):
            for name, measure in kinds.items():
                found[name].append(measure())
    cpu, wall = ({name: [pair[place] for pair in pairs] for name, pairs in found.items()} for place in (0, 1))
    rows = []
    for name in kinds:
        base = PAGE if name in (PAGE, APP) else READING
        middle, low, high = ratio(cpu[name], cpu[base])
        rows.append([name, spread(cpu[name]), spread(wall[name]), f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    columns = ["process", "CPU seconds", "seconds", "CPU, of reading the weights or of a button"]
    report(
        "Until the first step, and the first answer",
        columns,
        rows,
        {"cpu": cpu, "wall": wall},
        arguments.json,
    )


if __name__ == "__main__":
    main()
