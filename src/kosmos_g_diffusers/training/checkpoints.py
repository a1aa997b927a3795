"""Checkpoints of a run: folders that appear whole or not at all, the newest of which a run goes on from.

RUN/config.json                       settings, resolved
RUN/log.jsonl                         a line every `log_every` steps
RUN/checkpoint-00001000/              what `from_pretrained` reads
    training_state/                   trained weights, optimizer, schedule, random states, position in the data
RUN/samples/step-00001000.png
"""

import json
import os
import re
import shutil
from pathlib import Path

from .config import TrainConfig

NAME = re.compile(r"checkpoint-(\d{8})")
HIDDEN = ".checkpoint-*"  # what is being written or removed
STATE = "training_state"
PROGRESS = "progress.json"
SETTINGS = "config.json"


def list_checkpoints(run):
    """Complete checkpoints of a run folder, the oldest first."""
    run = Path(run)
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def checkpoint_folder(run, step):
    return Path(run) / f"checkpoint-{step:08d}"


def partial_folder(run, step):
    """Where a checkpoint is written before it gets its name."""
    return Path(run) / f".checkpoint-{step:08d}.partial"


def check_settings(config):
    """Raise ValueError if `config.output` holds a run that was begun with other settings, or something else."""
    run = Path(config.output)
    if not config.output:
        raise ValueError("No output was given. Pass --output FOLDER, where the run keeps its checkpoints.")
    if (run / SETTINGS).exists():
        config.check_resumes(TrainConfig.load(run / SETTINGS), run)
    elif run.exists() and (not run.is_dir() or any(path.suffix != ".part" for path in run.iterdir())):
        raise ValueError(
            f"{run} exists and is no run: it has no {SETTINGS}. Pass a new folder, or one of an earlier run to go on."
        )


def begin_run(config):
    """Make the run's folder, write its settings, and clear away what a run that was killed left half done."""
    run = Path(config.output)
    run.mkdir(parents=True, exist_ok=True)
    for path in run.glob(HIDDEN):
        shutil.rmtree(path)
    config.save(run / SETTINGS)


def publish(partial, folder):
    """Give a finished checkpoint its name, when all of it is on the disk; one of the same name is replaced."""
    for path in sorted(partial.rglob("*"), reverse=True):
        _sync(path)
    _sync(partial)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    _sync(folder.parent)


def prune(run, keep):
    """Remove all but the newest `keep` checkpoints; 0 removes none."""
    for path in list_checkpoints(run)[:-keep] if keep else ():
        _remove(path)


def write_progress(folder, progress):
    (Path(folder) / STATE / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")


def read_progress(folder):
    return json.loads((Path(folder) / STATE / PROGRESS).read_text(encoding="utf-8"))


def _remove(folder):
    """Take a checkpoint's name away before its files: one that has its name is complete."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _sync(path):
    """Wait until a file or folder is on the disk, so that a power cut cannot leave a name without its contents."""
    if os.name == "nt":  # Windows opens no folders, and files only for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
