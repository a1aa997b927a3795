"""The one training loop: accumulate, check, clip, step, log, save, resume. All three stages go through it.

It trains any module whose call takes a batch and returns a dict of losses (see stages.py) on any dataset that gives the
batch of a number (see data/mixture.py). accelerate brings precision, processes, DDP, FSDP and DeepSpeed.
"""

import math
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.skips import GatheredSkips
from .checkpoints import Saver, begin_run, checkpoint_folder, list_checkpoints, trained_parameters
from .config import TrainConfig
from .lock import hold_run
from .log import Log, check_tracker
from .optimizers import build_optimizer
from .stages import AlignStage
from .stopping import StoppedWaiting, StopSignal

SHARED_MEMORY = "/dev/shm"
MOST_PASSED_OVER = 50  # steps in a row: by then float16's scale is 2**-50 of what it was
OVERFLOW = "their gradients overflowed float16, and nothing was learnt from them."
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class TrainingStopped(RuntimeError):
    """A loss or gradient that is not finite, or steps that float16 passes over one after the other.

    The message names the step, the samples and the last good checkpoint.
    """


def train(
    config: TrainConfig,
    stage: nn.Module,
    dataset: torch.utils.data.Dataset[Any],
    *,
    save_model: Callable[[Path, dict[str, torch.Tensor]], None] | None = None,
    draw_samples: Callable[[Any, Path], None] | None = None,
    progress_bar: bool = True,
    begun: bool = False,
) -> Path:
    """Train a stage, or resume the run in `config.output`.

    SIGTERM and Ctrl-C do what they do elsewhere, end the program, but save a checkpoint first; after anything worse the
    run resumes from the last one. On a CPU a run that was resumed ends with the same bits.

    Args:
        config: TrainConfig.
        stage: module, `stage(batch)` -> dict of scalar losses that are added; weights with requires_grad train.
            `save_pretrained(folder, state_dict)` writes it; `move_frozen(device, dtype)` moves what it merely holds.
        dataset: `dataset[n]` is the batch of this process for forward pass n, without end: a MixtureDataset.
        save_model: called with (folder, state_dict) instead of `stage.save_pretrained`.
        draw_samples: called with (stage, path of a PNG) every `config.sample_every` steps on the main process. The stage
            has the averaged weights then, if there is an average; whatever happens in it, training continues as without.
        progress_bar: show one on the main process.
        begun: `checkpoints.begin_run` was called for this run, and need not be again.

    Returns:
        Path of the last checkpoint.

    Raises:
        ValueError: the run in the folder was begun with other settings, with other data or on another number of processes, or
            another process trains there; settings that do not work together.
        ImportError: the tracker is not installed.
        TrainingStopped: a loss or gradient that is not finite, or 50 steps in a row that float16 passes over.
        TooManyBadSamples: more unreadable samples than `config.max_bad_samples`.
        OSError: a checkpoint cannot be written; the last good one stays.
        SystemExit, KeyboardInterrupt: after SIGTERM (with the code 143) and Ctrl-C, when a checkpoint is saved.
    """
    check_tracker(config.tracker)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker or None,
        project_dir=config.output,
        step_scheduler_with_optimizer=False,
    )
    _check_sharding(config, accelerator)
    if not begun:
        begin_run(config, accelerator)
    # this process has it already
    with hold_run(config.output) if accelerator.is_main_process else nullcontext() as lock:
        save_model = save_model or stage.save_pretrained
        return _train(config, stage, dataset, accelerator, save_model, draw_samples, progress_bar, lock)


def _train(config, stage, dataset, accelerator, save_model, draw_samples, progress_bar, lock):
    run = Path(config.output)
    set_seed(config.seed, device_specific=True)
    stage.move_frozen(accelerator.device, config.dtype)
    if config.gradient_checkpointing:
        stage.gradient_checkpointing_enable()
    stage.train()
    optimizer = build_optimizer(config, trained_parameters(stage))
    decay = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    counts = {"num_warmup_steps": config.warmup_steps, "num_training_steps": config.steps}
    schedule = get_scheduler(decay, optimizer, **counts)
    wrapped, optimizer = accelerator.prepare(stage, optimizer)
    # the schedule goes by optimizer steps: accelerate's wrapper would count processes as well
    accelerator.register_for_checkpointing(schedule)
    ema = None
    if config.ema_decay:
        weights = trained_parameters(wrapped)
        ema = EMAModel(weights, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        accelerator.register_for_checkpointing(ema)
    describe_sources = getattr(dataset, "describe_sources", lambda: None)
    saver = Saver(config, accelerator, wrapped, stage, ema, save_model, describe_sources())
    skips = GatheredSkips(config.max_bad_samples, accelerator)
    step = saver.resume(skips.counter)
    log = Log(config, step, accelerator)
    loader = DataLoader(
        _SharedBatches(dataset),
        batch_size=None,
        sampler=range(step * config.accumulation, config.steps * config.accumulation),
        num_workers=config.workers,
        worker_init_fn=_leave_signals_to_main,
        # else it draws from the global random state
        generator=torch.Generator().manual_seed(config.seed),
        pin_memory=accelerator.device.type == "cuda",
    )
    device, hide = accelerator.device, not (progress_bar and accelerator.is_main_process)
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=hide, dynamic_ncols=True)
    with (
        bar,
        closing(_start(_read(loader))) as batches,
        StopSignal(run if accelerator.num_processes > 1 else None) as stop,
    ):
        in_a_row = 0  # steps that were passed over
        while step < config.steps:
            with suppress(StoppedWaiting), stop.waiting(config.workers > 0):
                fetched = [next(batches) for _ in range(config.accumulation)]
            _check_owner(lock, run)
            # all have their data or were told to stop: nobody waits for the gradients of one who has left
            if stop.agreed(accelerator):
                if not checkpoint_folder(run, step).exists():
                    _count(skips, accelerator)
                    saver.save(step, skips.counter)
                break
            passes, keys = [], []
            for batch in fetched:
                keys += batch["keys"]
                skips.note(batch)
                tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
                passes.append({name: value.to(device, non_blocking=True) for name, value in tensors.items()})
            agree_on_batches(passes, stage, accelerator, config.bucket_window == 1)
            sums = {}
            for number, tensors in enumerate(passes):
                last = number + 1 == config.accumulation
                accelerator.sync_gradients = last
                with nullcontext() if last else accelerator.no_sync(wrapped):
                    with accelerator.autocast():
                        losses = wrapped(tensors)
                    accelerator.backward(sum(losses.values()) / config.accumulation)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulation
            grad_norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm or math.inf)
            if hasattr(grad_norm, "full_tensor"):  # of shards, in FSDP 2
                grad_norm = grad_norm.full_tensor()
            _check_finite(sum(sums.values()), "loss", step + 1, keys, saver)
            # fp16's scaler passes over steps with such gradients; DeepSpeed clips by itself and may not say the norm
            if grad_norm is not None and config.mixed_precision != "fp16":
                _check_finite(torch.as_tensor(grad_norm), "gradient norm", step + 1, keys, saver)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if optimizer.step_was_skipped:
                in_a_row += 1
                saver.passed_over += 1
                _check_passed_over(in_a_row, step, saver)
            else:
                in_a_row = 0
                schedule.step()
                if ema is not None:
                    ema.step(trained_parameters(wrapped))
            bar.update()
            saving = step % config.save_every == 0 or step == config.steps
            if step % config.log_every == 0 or saving:
                _count(skips, accelerator)
            if step % config.log_every == 0 or step == config.steps:
                numbers = {"lr": float(schedule.get_last_lr()[0]), "grad_norm": grad_norm}
                counts = {"left_out": skips.counter.counts, "passed_over": saver.passed_over}
                bar.set_postfix(log.write(step, sums, **numbers, **counts))
            if saving:
                saver.save(step, skips.counter)
            if draw_samples and config.sample_every and step % config.sample_every == 0:
                with _leaving_no_trace(stage, accelerator), saver.averaged_weights():
                    if accelerator.is_main_process:
                        path = run / "samples" / f"step-{step:08d}.png"
                        path.parent.mkdir(exist_ok=True)
                        draw_samples(stage, path)
                        log.show(step, path)
        stop.agreed(accelerator)  # of a signal in the last step
    if skips.counter.counts:
        accelerator.print(skips.counter.summary())
    if saver.passed_over:
        _say(f"{saver.passed_over:,} of {step:,} steps were passed over: {OVERFLOW}", accelerator)
    for tracker in accelerator.trackers:  # end_training would also leave the process group
        tracker.finish()
    checkpoint = list_checkpoints(run)[-1]
    if stop.signal:
        accelerator.print(
            f"Stopped by {signal.Signals(stop.signal).name} at step {step:,} of {config.steps:,}, saved in {checkpoint}. "
            "The same command resumes from there.",
            file=sys.stderr,
        )
        stop.take_effect()
    return checkpoint


def agree_on_batches(
    batches: Sequence[dict[str, Any]], stage: nn.Module, accelerator: Accelerator, whole_step: bool = False
) -> None:
    """Adjust a step's batches, in place, by what the others have, of this process and of all.

    So together they learn what one learns from all their samples. Gradients are averaged over processes and over the
    passes of a step, which is right for losses that are means over as many numbers everywhere; these two are not.

    - Language modelling: labels are counted over the whole step, so that each weighs the same wherever it is read.
    - Alignment: the loss counts padded columns, so all processes pad to the longest prompt of any of them. It costs
      nothing where they wait for each other anyway.

    Args:
        batches: the dicts of this process's forward passes, on the accelerator's device.
        stage: the stage, which knows the id of padding.
        accelerator: accelerate.Accelerator.
        whole_step: in alignment, pad all passes of a step alike, so that it is what one larger batch would be. Where samples are
            sorted by length no larger batch would hold the same ones, and padding them alike costs what sorting saves.
    """
    labelled = [batch for batch in batches if "labels" in batch]  # the same passes in all processes
    if labelled:
        counts = [batch["labels"].ne(-100).sum() for batch in labelled]
        total = accelerator.reduce(torch.stack(counts).sum(), "sum").clamp(min=1)
        for batch in labelled:
            batch["n_labels"] = total / (accelerator.num_processes * len(labelled))
    elif isinstance(stage, AlignStage):
        lengths = torch.tensor(
            [[batch["input_ids"].shape[1] for batch in batches]], device=accelerator.device
        )
        longest = accelerator.gather(lengths).amax(0).tolist()
        if whole_step:
            longest = [max(longest)] * len(longest)
        for batch, length in zip(batches, longest, strict=True):
            columns = (0, length - batch["input_ids"].shape[1])
            pad = stage.text_encoder.config.text_config.pad_token_id
            batch["input_ids"] = F.pad(batch["input_ids"], columns, value=pad)
            for name in ("attention_mask", "image_token_mask"):
                if name in batch:
                    batch[name] = F.pad(batch[name], columns, value=False)


@contextmanager
def _leaving_no_trace(stage, accelerator):
    """Context for other work with the stage's weights: all random states and the training mode come back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if accelerator.device.type in ("cpu", "mps") else [accelerator.device]
    with torch.random.fork_rng(devices, device_type="cuda" if not devices else accelerator.device.type):
        stage.eval()
        try:
            yield
        finally:
            stage.train()
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _check_sharding(config, accelerator):
    """FSDP and DeepSpeed hold no process's weights whole: what needs them whole is refused."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # it asks, as no DataLoader of its own is prepared; passes are counted and divided by the loop
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        settings["gradient_accumulation_steps"] = 1
    if (
        accelerator.distributed_type == DistributedType.FSDP
        and accelerator.state.fsdp_plugin.fsdp_version == 1
    ):
        raise ValueError(
            "FSDP 1 was asked for, which training does not support: it keeps no names of the weights that train. Use FSDP 2: "
            "fsdp_version: 2 in accelerate's configuration, --fsdp_version 2 of accelerate launch, or FSDP_VERSION=2."
        )
    for name in ("ema_decay", "sample_every"):
        if accelerator.distributed_type in SHARDING and getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)}, which needs the weights whole, and "
                f"{accelerator.distributed_type.value} shards them. Set it to 0, or run without sharding."
            )


def _check_passed_over(in_a_row, step, saver):
    """Raise TrainingStopped on all processes, which pass over the same steps."""
    if in_a_row == MOST_PASSED_OVER:
        raise TrainingStopped(
            f"{in_a_row} steps in a row were passed over, up to step {step:,}: {OVERFLOW} {saver.last_good()} Begin a new run with "
            "--mixed-precision bf16 or no, or with a smaller --lr."
        )


def _check_owner(lock, run):
    """Raise TrainingStopped on the main process if another one trains in its run's folder."""
    if lock is not None and not lock.is_ours:
        raise TrainingStopped(
            f"Another process has taken over the run in {run} (--take-over). Nothing more is written by this one."
        )


def _count(skips, accelerator):
    """Count what the data had to replace, on all processes, and say what is to be warned of."""
    for warning in skips.count():
        _say(warning, accelerator)


def _say(text, accelerator):
    """A line on stderr that leaves the progress bar whole."""
    if accelerator.is_main_process:
        tqdm.write(text, file=sys.stderr)


def _check_finite(value, name, step, keys, saver):
    """Raise TrainingStopped on all processes if the number is not finite on one of them."""
    value = saver.accelerator.reduce(value.detach().float(), "sum")
    if value.isfinite().all():
        return
    keys = gather_object(keys)
    raise TrainingStopped(
        f"The {name} of step {step:,} is {value.item()}, made of the samples {', '.join(keys)}. {saver.last_good()} "
        "Look at these samples, or begin a new run with a smaller lr or without half precision."
    )


def _start(batches):
    """The batches of `_read`, whose workers are there: a fork after the thread of the signals would inherit what it holds."""
    next(batches)
    return batches


def _read(loader):
    """None when the workers are there, then batches of a loader. Closing it ends its workers: they ignore signals, and would keep a
    program that fails from ending."""
    batches = iter(loader)
    try:
        yield None
        yield from batches
    except ValueError as error:
        message = str(error)
        if message.startswith("Caught ValueError in DataLoader worker"):  # a traceback of the worker follows
            message = message.rpartition("\nValueError: ")[2].strip()
        raise ValueError(message) from error
    except RuntimeError as error:
        if "Bus error" in str(error):  # on systems that give memory out before it is there
            raise ValueError(f"A worker was ended by the system: {_describe_shared_memory()}") from error
        raise
    finally:
        # it does so by itself once nothing holds it, but the traceback of an error does
        getattr(batches, "_shutdown_workers", lambda: None)()
        for worker in getattr(batches, "_workers", ()):
            if worker.is_alive():  # it hangs, and ignores the signal that asked it to end
                worker.kill()


class _SharedBatches(torch.utils.data.Dataset):
    """A dataset whose workers put batches into shared memory themselves.

    Where their queue does it, an error is printed, the batch is lost, and the run waits for it for ever.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, number):
        batch = self.dataset[number]
        if torch.utils.data.get_worker_info() is None:
            return batch
        try:
            return {
                name: value.share_memory_() if torch.is_tensor(value) else value
                for name, value in batch.items()
            }
        except RuntimeError as error:
            if "shared memory" not in str(error) and "No space" not in str(error):
                raise
            size = sum(value.nbytes for value in batch.values() if torch.is_tensor(value))
            raise ValueError(
                f"A batch of {size / 2**20:.1f} MiB found no place: {_describe_shared_memory()}"
            ) from error


def _describe_shared_memory():
    room = ""
    with suppress(OSError):  # of systems that have it elsewhere
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
        room = f" ({total / 2**20:.0f} MiB, {free / 2**20:.1f} free)"
    return (
        f"workers pass batches through shared memory{room}, two for each worker. Give it more: docker run --shm-size 1g or "
        "--ipc=host. Or pass fewer --workers; 0 needs none."
    )


def _leave_signals_to_main(worker):
    """A signal to the whole process group must not kill the workers before the main process has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
