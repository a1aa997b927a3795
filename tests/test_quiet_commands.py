"""What commands and examples say on stderr when all is well: each is started once, in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.training_runs import save_data, save_model

from kosmos_g_diffusers.environment import VERBOSITY

TESTS = Path(__file__).parent
REFERENCE = TESTS / "fixtures" / "reference"
EXAMPLES = TESTS.parent / "examples"
NAMES = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("common", "app_client", "demo")
)
STAR = EXAMPLES / "images" / "star.png"
KOSMOS_G = ("-m", "kosmos_g_diffusers")
BAR = r"( *|image \d+ of \d+, seed \d+: *|batches of \w+: *)\d+%\|.*"
# every line that may stand on stderr: notes in our own words, and bars of what takes time by its nature
ALLOWED = (r"Note: .*", BAR)


@pytest.fixture
def start(tmp_path):
    """Function that runs Python with arguments in an empty folder; returns the lines of stderr that are not allowed."""

    def start(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != VERBOSITY}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        command = [sys.executable, *map(str, arguments)]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        lines = [line for line in re.split("[\r\n]|\x1b\\[A", ended.stderr) if line.strip()]
        assert ended.returncode == 0, "\n".join(lines)
        return [line for line in lines if not any(re.fullmatch(known, line) for known in ALLOWED)]

    return start


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags that name a tiny model and a few samples to train it on."""
    folder = tmp_path_factory.mktemp("world")
    return "--model", save_model(folder / "model"), "--data", f"shards:{save_data(folder / 'data')}"


def train(stage, world):
    return (
        "train",
        stage,
        *world,
        *"--output run --steps 1 --batch-size 2 --warmup-steps 1 --workers 0".split(),
    )


def evaluate(output):
    return "evaluate", "sprites", "--count", "2", "--steps", "1", "--output", output


# Commands ----------------------------------------------------------------------------------------------------------


def test_generate(start):
    assert start(*KOSMOS_G, "generate", "a large red plain star on a white background", "--steps", "1") == []


def test_caption(start):
    assert start(*KOSMOS_G, "caption", STAR) == []


@pytest.mark.skipif(importlib.util.find_spec("controlnet_aux") is None, reason="it needs the extra `control`")
def test_control(start):
    assert start(*KOSMOS_G, "control", "canny", STAR, "--output", "edges.png") == []


def test_evaluate(start):
    assert start(*KOSMOS_G, *evaluate("run")) == []


def test_train(start, world):
    assert start(*KOSMOS_G, *train("align", world)) == []


CONVERT = """
import sys
from kosmos_g_diffusers import KosmosGTextEncoderConfig, convert_checkpoint
checkpoint, tokenizer, base, config = sys.argv[1:]
config = KosmosGTextEncoderConfig.from_pretrained(config)
convert_checkpoint(checkpoint, "out", tokenizer=tokenizer, base=base, config=config)
"""


def test_convert(start, golden_encoder, sentencepiece_file, tmp_path):
    # what the command calls; it takes checkpoints of the released size alone
    golden_encoder.config.save_pretrained(tmp_path / "config")
    checkpoint, base = REFERENCE / "tiny_reference_checkpoint.pt", REFERENCE / "tiny_stable_diffusion"
    assert start("-c", CONVERT, checkpoint, sentencepiece_file, base, tmp_path / "config") == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_other_stages(start, world, stage):
    assert start(*KOSMOS_G, *train(stage, world)) == []


@pytest.mark.slow
def test_compare_and_what_reads_shards(start, world):
    for run in ("one", "two"):
        start(*KOSMOS_G, *evaluate(run))
    assert start(*KOSMOS_G, "compare", "one", "two") == []
    assert start(*KOSMOS_G, "data", "sheet", world[-1].removeprefix("shards:")) == []


# Examples, and folders without the package -------------------------------------------------------------------------


def test_demo(start):
    assert start(EXAMPLES / "demo.py", "--steps", "1") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example(start, name):
    assert start(EXAMPLES / f"{name}.py", "--steps", "2") == []


REMOTE = """
import kosmos_g_diffusers, sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(pipe).__module__.startswith("diffusers_modules")
"""
OF_THE_LIBRARIES = r"Loading (pipeline components\.\.\.|weights): .*"


@pytest.mark.slow
def test_folder_with_code_says_nothing_but_bars_of_the_libraries(start, world):
    lines = start("-c", REMOTE, world[1])
    assert [line for line in lines if not re.fullmatch(OF_THE_LIBRARIES, line)] == []
