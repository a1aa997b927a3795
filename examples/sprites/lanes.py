"""Phases that do not need each other, side by side: small models gain little from a second thread, but all from a second
process."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tqdm.auto import tqdm

LANES = (
    ("vae", "diffusion", "diffusion-wide", "diffusion-long", "controlnet"),
    (
        *("pretrain", "pretrain-varied", "align", "instruct", "instruct-asked"),
        *("pretrain-wide", "align-wide", "instruct-wide", "instruct-wide-asked"),
    ),
)
NEEDS = {  # phases of the other lane
    "align": "diffusion",
    "align-wide": "diffusion-wide",
    "instruct-wide-asked": "diffusion-long",
}


def run_lanes(script, run, threads):
    """Run every phase of LANES in a process of its own, two at a time; bars show how far they are.

    What a phase prints goes to <run>/<phase>.log. SIGTERM and Ctrl-C reach the phases, which save and stop; so does the
    failure of a phase of the other lane.

    Returns:
        The exit code of the first phase that failed or was stopped; 0 if all are done.
    """
    done = {phase: threading.Event() for lane in LANES for phase in lane}
    children, codes, stopped = [], [], threading.Event()

    def follow(lane):
        for phase in lane:
            if phase in NEEDS:
                while not done[NEEDS[phase]].wait(1) and not stopped.is_set():
                    pass
            if stopped.is_set():
                return
            with open(run / f"{phase}.log", "a", encoding="utf-8") as log:
                command = [
                    sys.executable,
                    script,
                    "--output",
                    run,
                    "--threads",
                    str(threads),
                    "--only",
                    phase,
                ]
                child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                children.append(child)
                if stopped.is_set():  # by a signal that came before it was among the children
                    child.terminate()
                code = child.wait()
            if code:
                codes.append(code)
                stop()  # the other lane too
                print(f"{phase} ended with code {code}; {log.name} says why.", file=sys.stderr)
                return
            done[phase].set()

    def stop(*_):
        if stopped.is_set():
            return  # a phase is told once, and may be saving
        stopped.set()
        for child in children:
            if child.poll() is None:
                child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    threads_of_lanes = [threading.Thread(target=follow, args=(lane,)) for lane in LANES]
    for thread in threads_of_lanes:
        thread.start()
    bars = {}
    while any(thread.is_alive() for thread in threads_of_lanes):
        for thread in threads_of_lanes:
            thread.join(1)
        _show(run, done, bars)
    for bar in bars.values():
        bar.close()
    return codes[0] if codes else 143 if stopped.is_set() else 0


def _show(run, done, bars):
    """Bring a bar for each phase that has begun up to its log."""
    for phase in done:
        log, config = (Path(run) / phase / name for name in ("log.jsonl", "config.json"))
        if not log.is_file() or not config.is_file():
            continue
        whole, _, _ = log.read_text(encoding="utf-8").rpartition("\n")  # the last line may be half written
        lines = whole.splitlines()
        steps = json.loads(config.read_text(encoding="utf-8"))["steps"]
        if phase not in bars:
            bars[phase] = tqdm(desc=phase, total=steps, unit="step", position=len(bars))
        if lines:
            bars[phase].n = json.loads(lines[-1])["step"]
        bars[phase].refresh()
