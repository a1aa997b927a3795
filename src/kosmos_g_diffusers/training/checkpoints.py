"""Checkpoints of a run: folders that appear atomically; a run resumes from the newest.

Each holds accelerate's training state next to what `from_pretrained` reads.

RUN/config.json                       settings, resolved
RUN/.lock                             who trains here, see lock.py
RUN/log.jsonl                         a line every `log_every` steps
RUN/checkpoint-00001000/              what `from_pretrained` reads
    training_state/                   trained weights, optimizer, schedule, random states, position in the data
RUN/samples/step-00001000.png
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import describe_write_error, follow_umask, read_json, remove_partial_files
from .config import TrainConfig
from .lock import NAME as LOCK
from .lock import RunLock, hold_run
from .stopping import STOP_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from diffusers.training_utils import EMAModel

    from ..data import SkipCounter
    from .stages import Stage

NAME = re.compile(r"checkpoint-(\d{8})")
HIDDEN = ".checkpoint-*"  # what is being written or removed
STATE = "training_state"
PROGRESS = "progress.json"
SETTINGS = "config.json"
TRAINED = "trained.safetensors"
# what a full disk raises: Python's own writes, safetensors', torch.save's
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, the oldest first."""
    run = Path(run)
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def checkpoint_folder(run: str | Path, step: int) -> Path:
    return Path(run) / f"checkpoint-{step:08d}"


def partial_folder(run: str | Path, step: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return Path(run) / f".checkpoint-{step:08d}.partial"


def begin_run(config: "TrainConfig", state: "Accelerator | PartialState") -> RunLock | None:
    """Make the run's folder, lock it, write its settings, and clear away what a run that was killed left half done.

    Args:
        config: TrainConfig.
        state: accelerate's Accelerator or PartialState. All processes call this; the main one writes.

    Returns:
        The lock, to be released when the run ends; None on other processes than the main one.

    Raises:
        ValueError: `config.output` holds a run that was begun with other settings, or something else, or another process trains
            there.
    """
    run = Path(config.output)
    if not config.output:
        raise ValueError("No output was given. Pass --output FOLDER, where the run keeps its checkpoints.")
    if (run / SETTINGS).exists():
        config.check_resumes(TrainConfig.load(run / SETTINGS), run)
    elif run.exists() and (not run.is_dir() or any(not _is_left(path) for path in run.iterdir())):
        raise ValueError(
            f"{run} exists and is not a run: it has no {SETTINGS}. Pass a new folder, or one of an earlier run to resume it."
        )
    state.wait_for_everyone()  # all have looked at the folder before it changes
    lock, refusal = None, [None]
    if state.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock = hold_run(run, config.take_over)
        except ValueError as error:
            refusal = [str(error)]
    broadcast_object_list(refusal)  # else the others would wait for a run that does not begin
    if refusal[0]:
        raise ValueError(refusal[0])
    if state.is_main_process:
        for path in run.glob(HIDDEN):
            shutil.rmtree(path)
        remove_partial_files(run)
        (run / STOP_FILE).unlink(missing_ok=True)  # of an earlier part of the run
        config.save(run / SETTINGS)
    state.wait_for_everyone()
    return lock


def publish(partial: Path, folder: Path) -> None:
    """Give a finished checkpoint its name, when all of it is on the disk; one of the same name is replaced."""
    follow_umask(partial)
    for path in sorted(partial.rglob("*"), reverse=True):
        _sync(path)
    _sync(partial)
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    _sync(folder.parent)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 removes none."""
    for path in list_checkpoints(run)[:-keep] if keep else ():
        _remove(path)


def write_progress(folder: str | Path, progress: Mapping[str, Any]) -> None:
    (Path(folder) / STATE / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")


def read_progress(folder: str | Path) -> dict[str, Any]:
    return read_json(Path(folder) / STATE / PROGRESS, "Remove this checkpoint: the one before is used then.")


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a module that train, in its order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class Saver:
    """Writes and reads the checkpoints of one run.

    Args:
        config: TrainConfig.
        accelerator: accelerate.Accelerator, which has prepared the stage and the optimizer.
        wrapped: the stage as it came back from there.
        stage: the stage itself.
        ema: diffusers' EMAModel over the trained weights, or None.
        save_model: called with (folder, state_dict) on the main process.
        sources: of `MixtureDataset.describe_sources`; None is of other data, whose changes nobody sees.

    `passed_over` counts the run's steps whose gradients overflowed float16.
    """

    config: "TrainConfig"
    run: Path
    accelerator: "Accelerator"
    wrapped: nn.Module
    stage: "Stage"
    ema: "EMAModel | None"
    save_model: Callable[[Path, dict[str, torch.Tensor]], None]
    sources: list[dict[str, Any]] | None
    passed_over: int

    def __init__(
        self,
        config: "TrainConfig",
        accelerator: "Accelerator",
        wrapped: nn.Module,
        stage: "Stage",
        ema: "EMAModel | None",
        save_model: Callable[[Path, dict[str, torch.Tensor]], None],
        sources: list[dict[str, Any]] | None = None,
    ):
        self.sources, self.passed_over = sources, 0
        self.config, self.run, self.accelerator = config, Path(config.output), accelerator
        self.wrapped, self.stage, self.ema, self.save_model = wrapped, stage, ema, save_model
        self._keep_trained_weights_only()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the stage has the averaged weights, if there is an average; its own come back unchanged."""
        if self.ema is None:
            yield
            return
        parameters = trained_parameters(self.wrapped)
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save(self, step: int, skips: "SkipCounter") -> None:
        """Write the checkpoint of a step atomically, and remove older ones.

        Raises:
            OSError: it cannot be written, with the last good checkpoint.
        """
        accelerator, partial = self.accelerator, partial_folder(self.run, step)
        try:
            if accelerator.is_main_process:
                (partial / STATE).mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial / STATE))
            with self.averaged_weights():
                # of all processes, where weights are sharded
                state = accelerator.get_state_dict(self.wrapped)
                if accelerator.is_main_process:
                    self.save_model(partial, state)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                progress = {"step": step, "skips": skips.state_dict(), "processes": accelerator.num_processes}
                progress |= {"sources": self.sources, "passed_over": self.passed_over}
                write_progress(partial, progress)
                publish(partial, checkpoint_folder(self.run, step))
                prune(self.run, self.config.keep_checkpoints)
        except WRITE_ERRORS as error:
            reason = describe_write_error(error, self.run)  # as long as what was written fills the disk
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"Checkpoint {step:,} could not be written to {self.run}: {reason}. {self.last_good()} If the disk is full, "
                "make room and run the same command again."
            ) from error
        accelerator.wait_for_everyone()

    def resume(self, skips: "SkipCounter") -> int:
        """Load the newest checkpoint, if there is one.

        Returns:
            The step it was saved after; 0 if there is none.

        Raises:
            ValueError: it was written by another number of processes, or the data has changed since.
        """
        found = list_checkpoints(self.run)
        if not found:
            return 0
        progress = read_progress(found[-1])
        if progress["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"The run in {self.run} was begun on {progress['processes']} processes; this one has "
                f"{self.accelerator.num_processes}. The order of samples and the random states depend on their number. Continue with "
                f"as many, or begin a new run from its last checkpoint: pass {found[-1]} as --model, with another --output."
            )
        self._check_sources(progress.get("sources"), found[-1])
        self.accelerator.load_state(str(found[-1] / STATE))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # it is read to the CPU
        skips.load_state_dict(progress["skips"])
        self.passed_over = progress.get("passed_over", 0)
        return progress["step"]

    def _check_sources(self, earlier, checkpoint):
        """ValueError if the sources have other numbers of samples than when a checkpoint was written, which orders them anew."""
        if earlier is None or self.sources is None:
            if self.config.data_moved:
                raise ValueError(
                    f"{checkpoint} does not say how many samples its data had, so that data elsewhere cannot be told to be the same. "
                    "Put the data where it was, and leave out --data-moved."
                )
            return
        changed = []
        for old, new in zip_longest(earlier, self.sources):
            if old is None or new is None:
                changed.append(f"{(old or new)['name']} is {'new' if old is None else 'gone'}")
            elif old["samples"] != new["samples"]:
                changed.append(f"{new['name']} had {old['samples']:,} samples and has {new['samples']:,}")
            elif old["files"] != new["files"]:
                changed.append(f"{new['name']} has its {new['samples']:,} samples in other files")
        if changed:
            raise ValueError(
                f"The data has changed since {checkpoint} was written: {'; '.join(changed)}. The order of samples depends on these "
                "numbers, so the run cannot continue where it was. Put the data back as it was, or begin a new run from that "
                "checkpoint: pass it as --model, with another --output."
            )

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint."""
        found = list_checkpoints(self.run)
        return f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."

    def _keep_trained_weights_only(self):
        """Have accelerate save and load the weights that train, not the frozen rest, which is there already.

        FSDP and DeepSpeed save theirs in formats of their own.
        """
        accelerator = self.accelerator
        trained = {name for name, parameter in self.stage.named_parameters() if parameter.requires_grad}

        def save(models, weights, folder):
            if weights and accelerator.is_main_process:
                state = {name.removeprefix("module."): tensor for name, tensor in weights[0].items()}
                save_file({name: state[name].contiguous() for name in trained}, Path(folder) / TRAINED)
            weights.clear()

        def load(models, folder):
            if models:
                state = load_file(Path(folder) / TRAINED)
                assert set(state) == trained, "the stage trains other weights than the checkpoint holds"
                accelerator.unwrap_model(models[0]).load_state_dict(state, strict=False)
            models.clear()

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def _is_left(path):
    """Whether a file is of a run that was killed at its very beginning."""
    return path.suffix == ".part" or path.name == LOCK


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
