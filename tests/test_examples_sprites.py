"""The order in which examples/sprites/train.py runs its phases, with a script in the place of training."""

import importlib.util
import os
import signal
import threading
from pathlib import Path

import pytest

LANES = Path(__file__).parents[1] / "examples" / "sprites" / "lanes.py"
SCRIPT = """
import json, os, sys, time
from pathlib import Path
run, phase = Path(sys.argv[sys.argv.index("--output") + 1]), sys.argv[-1]
say = lambda word: open(run / "order.txt", "a").write(f"{word} {phase}\\n")
say("begins")
(run / phase).mkdir()
(run / phase / "config.json").write_text(json.dumps({"steps": 4}))
(run / phase / "log.jsonl").write_text(json.dumps({"step": 2}) + "\\n")
time.sleep(float(os.environ.get("SECONDS_" + phase, 0)))
say("ends")
sys.exit(int(os.environ.get("CODE_" + phase, 0)))
"""


@pytest.fixture
def run_lanes(tmp_path, monkeypatch):
    """Function that runs all phases with the script; returns the exit code and what the phases said."""
    spec = importlib.util.spec_from_file_location("lanes", LANES)
    lanes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lanes)
    (tmp_path / "script.py").write_text(SCRIPT)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        code = lanes.run_lanes(tmp_path / "script.py", tmp_path, threads=1)
        return code, (tmp_path / "order.txt").read_text().splitlines()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_phases_run_side_by_side_and_wait_for_what_they_need(run_lanes):
    code, order = run_lanes(SECONDS_diffusion=1.5)
    assert code == 0
    place = {line: number for number, line in enumerate(order)}
    assert len(place) == 12
    assert place["begins pretrain"] < place["ends vae"] or place["begins vae"] < place["ends pretrain"]
    assert place["ends pretrain"] < place["ends diffusion"] < place["begins align"] < place["begins instruct"]
    assert place["ends diffusion"] < place["begins controlnet"]


def test_failure_of_a_phase_ends_the_run_with_its_code(run_lanes, capsys):
    code, order = run_lanes(CODE_diffusion=3)
    assert code == 3
    assert "ends pretrain" in order and "begins align" not in order and "begins controlnet" not in order
    assert "diffusion ended with code 3" in capsys.readouterr().err


def test_signal_reaches_the_phases(run_lanes):
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, order = run_lanes(SECONDS_vae=60, SECONDS_pretrain=60)
    assert code not in (0, None)
    assert sorted(order) == ["begins pretrain", "begins vae"]
