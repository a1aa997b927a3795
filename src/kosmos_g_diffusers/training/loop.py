"""The one training loop: accumulate, check, clip, step, log, save, resume. All three stages go through it.

It trains any module whose call takes a batch and returns a dict of losses (see stages.py) on any dataset that gives the
batch of a number (see data/mixture.py). accelerate brings precision, processes, DDP, FSDP and DeepSpeed.
"""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import checkpoints
from .data import SkipCounter

TRAINED = "trained.safetensors"


class TrainingStopped(RuntimeError):
    """A loss or gradient that is not finite; the message names the step, the samples and the last good checkpoint."""


def train(config, stage, dataset, *, save_model=None, draw_samples=None, progress_bar=True):
    """Train a stage, or go on with the run in `config.output`.

    SIGTERM and Ctrl-C save a checkpoint before the function returns; after anything worse the run goes on from the last
    one. On a CPU a run that was resumed ends with the same bits.

    Args:
        config: TrainConfig.
        stage: module, `stage(batch)` -> dict of scalar losses that are added; weights with requires_grad train.
            `save_pretrained(folder, state_dict)` writes it; `move_frozen(device, dtype)` moves what it merely holds.
        dataset: `dataset[n]` is the batch of this process for forward pass n, without end: a MixtureDataset.
        save_model: called with (folder, state_dict) instead of `stage.save_pretrained`.
        draw_samples: called with (stage, state_dict or None, path of a PNG) every `config.sample_every` steps.
        progress_bar: show one on the main process.

    Returns:
        Path of the last checkpoint.

    Raises:
        ValueError: the run in the folder was begun with other settings.
        TrainingStopped: a loss or gradient that is not finite.
        TooManyBadSamples: more unreadable samples than `config.max_bad_samples`.
        OSError: a checkpoint cannot be written; the last good one stays.
    """
    run = Path(config.output)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker or None,
        project_dir=str(run),
        step_scheduler_with_optimizer=False,
    )
    _begin(config, run, accelerator)
    set_seed(config.seed, device_specific=True)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.mixed_precision, torch.float32)
    stage.move_frozen(accelerator.device, half)
    if config.gradient_checkpointing:
        stage.gradient_checkpointing_enable()
    stage.train()
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = get_scheduler(
        "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
    )
    if (
        accelerator.distributed_type == DistributedType.DEEPSPEED
    ):  # it asks, as no DataLoader of its own is prepared
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            config.batch_size
        )
    wrapped, optimizer = accelerator.prepare(stage, optimizer)
    # the schedule goes by optimizer steps: accelerate's wrapper would count processes as well
    accelerator.register_for_checkpointing(schedule)
    ema = None
    if config.ema_decay:
        ema = EMAModel(
            [parameter for parameter in wrapped.parameters() if parameter.requires_grad],
            decay=config.ema_decay,
            use_ema_warmup=True,
            power=0.75,
        )
        accelerator.register_for_checkpointing(ema)
    _keep_trained_weights_only(accelerator, stage)
    saver = _Saver(config, run, accelerator, wrapped, stage, ema, save_model or stage.save_pretrained)
    skips = SkipCounter(config.max_bad_samples)
    step = saver.resume(skips)
    if config.tracker:
        accelerator.init_trackers("kosmos-g", init_kwargs={"wandb": {"dir": str(run)}})
    log = _Log(run / "log.jsonl", step, accelerator)

    passes = range(step * config.accumulation, config.steps * config.accumulation)
    batches = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=passes,
            num_workers=config.workers,
            worker_init_fn=_leave_signals_to_main,
            generator=torch.Generator().manual_seed(
                config.seed
            ),  # else it draws from the global random state
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    bar = tqdm(
        total=config.steps,
        initial=step,
        unit="step",
        disable=not (progress_bar and accelerator.is_main_process),
        dynamic_ncols=True,
    )
    with bar, _StopSignal() as stop:
        while step < config.steps:
            sums = {}
            for micro in range(config.accumulation):
                batch = next(batches)
                skips.add(*_gather_skips(batch, accelerator))
                tensors = {
                    name: value.to(accelerator.device, non_blocking=True)
                    for name, value in batch.items()
                    if torch.is_tensor(value)
                }
                accelerator.gradient_state._set_sync_gradients(micro + 1 == config.accumulation)
                with accelerator.no_sync(wrapped) if micro + 1 < config.accumulation else nullcontext():
                    with accelerator.autocast():
                        losses = wrapped(tensors)
                    loss = sum(losses.values())
                    accelerator.backward(loss / config.accumulation)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulation
                saver.check_finite(loss, "loss", step + 1, batch["keys"])
            grad_norm = accelerator.clip_grad_norm_(
                wrapped.parameters(), config.max_grad_norm or float("inf")
            )
            if (
                grad_norm is not None and config.mixed_precision != "fp16"
            ):  # fp16's scaler skips such steps by itself
                saver.check_finite(torch.as_tensor(grad_norm), "gradient norm", step + 1, batch["keys"])
            optimizer.step()
            optimizer.zero_grad()
            if not optimizer.step_was_skipped:
                schedule.step()
            if ema is not None:
                ema.step([parameter for parameter in wrapped.parameters() if parameter.requires_grad])
            step += 1
            bar.update()
            samples = config.batch_size * config.accumulation * accelerator.num_processes
            if step % config.log_every == 0 or step == config.steps:
                means = _mean_over_processes(sums, accelerator)
                rate = bar.format_dict["rate"] or 0.0
                log.write(step, means, lr=schedule.get_last_lr()[0], grad_norm=float(grad_norm or 0))
                bar.set_postfix(
                    {name: f"{value:.4f}" for name, value in means.items()}
                    | {"samples/s": f"{rate * samples:.1f}"}
                )
            stopping = stop.agreed(accelerator)
            if step % config.save_every == 0 or step == config.steps or stopping:
                saver.save(step, skips)
            if draw_samples and config.sample_every and step % config.sample_every == 0:
                path = run / "samples" / f"step-{step:08d}.png"
                path.parent.mkdir(exist_ok=True)
                draw_samples(stage, saver.state_dict() if ema else None, path)
                stage.train()
            if stopping:
                bar.write(
                    f"Stopped at step {step:,} of {config.steps:,} and saved; the same command goes on from there."
                )
                break
    if accelerator.is_main_process and skips.counts:
        bar.write(skips.summary())
    if config.tracker:
        accelerator.end_training()
    return checkpoints.list_checkpoints(run)[-1]


class _Saver:
    """Writes and reads checkpoints of one run."""

    def __init__(self, config, run, accelerator, wrapped, stage, ema, save_model):
        self.config, self.run, self.accelerator = config, run, accelerator
        self.wrapped, self.stage, self.ema, self.save_model = wrapped, stage, ema, save_model

    def state_dict(self):
        """The stage's weights on the CPU of the main process; averaged ones where there is an average."""
        if self.ema is None:
            return self.accelerator.get_state_dict(self.wrapped)
        parameters = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        state = self.accelerator.get_state_dict(self.wrapped)
        state = {
            name: tensor.detach().cpu().clone() for name, tensor in state.items()
        }  # before they are put back
        self.ema.restore(parameters)
        return state

    def save(self, step, skips):
        accelerator, partial = self.accelerator, checkpoints.partial_folder(self.run, step)
        state = self.state_dict()
        try:
            if accelerator.is_main_process:
                (partial / checkpoints.STATE).mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial / checkpoints.STATE))
            if accelerator.is_main_process:
                self.save_model(partial, state)
                progress = {"step": step, "skips": skips.state_dict(), "processes": accelerator.num_processes}
                checkpoints.write_progress(partial, progress)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"Checkpoint {step:,} could not be written to {self.run}: {error}. {self.last_good()} Make room and run "
                "the same command again."
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoints.publish(partial, checkpoints.checkpoint_folder(self.run, step))
            checkpoints.prune(self.run, self.config.keep_checkpoints)
        accelerator.wait_for_everyone()

    def resume(self, skips):
        """Load the newest checkpoint, if there is one; returns the step it was saved after."""
        found = checkpoints.list_checkpoints(self.run)
        if not found:
            return 0
        progress = checkpoints.read_progress(found[-1])
        if progress["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"The run in {self.run} was begun on {progress['processes']} processes; this one has "
                f"{self.accelerator.num_processes}. Go on with as many, or give a new run another --output."
            )
        self.accelerator.load_state(str(found[-1] / checkpoints.STATE))
        skips.load_state_dict(progress["skips"])
        return progress["step"]

    def check_finite(self, value, name, step, keys):
        value = self.accelerator.reduce(value.detach().float(), "sum")
        if value.isfinite().all():
            return
        keys = gather_object(keys)
        raise TrainingStopped(
            f"The {name} of step {step:,} is {value.item()}, made of the samples {', '.join(keys)}. {self.last_good()} "
            "Look at these samples, or go on with a smaller lr or without half precision."
        )

    def last_good(self):
        found = checkpoints.list_checkpoints(self.run)
        return f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."


class _Log:
    """log.jsonl of the main process, without the lines of steps that a resumed run makes again; and trackers."""

    def __init__(self, path, step, accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, step, losses, **values):
        values = {**losses, **values}
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


class _StopSignal:
    """SIGTERM and Ctrl-C, remembered until the step is done; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.received = False
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self._receive)
            except ValueError:  # signals reach the main thread of a program only
                break
        return self

    def _receive(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator):
        """Whether any process was told to stop: all have to save together."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)


def _begin(config, run, accelerator):
    """Make the run's folder and write its settings, or check them against those it was begun with."""
    settings = run / "config.json"
    if settings.exists():
        config.check_resumes(type(config).load(settings), run)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_partial(run)
        config.save(settings)
    accelerator.wait_for_everyone()


def _keep_trained_weights_only(accelerator, stage):
    """Save and load the weights that train, not the frozen rest, which is there already. FSDP and DeepSpeed save theirs."""
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}

    def save(models, weights, folder):
        if weights and accelerator.is_main_process:
            state = {name.removeprefix("module."): tensor for name, tensor in weights[0].items()}
            save_file({name: state[name].contiguous() for name in trained}, Path(folder) / TRAINED)
        weights.clear()

    def load(models, folder):
        if models:
            state = load_file(Path(folder) / TRAINED)
            missing = accelerator.unwrap_model(models[0]).load_state_dict(state, strict=False)
            assert not missing.unexpected_keys and not trained & set(missing.missing_keys)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _leave_signals_to_main(worker):
    """A signal to the whole process group must not kill the workers before the main process has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _gather_skips(batch, accelerator):
    """(samples used, cause -> number replaced, messages) of a batch over all processes."""
    if accelerator.num_processes == 1:
        return len(batch["keys"]), batch["skipped"], batch["skipped_messages"]
    skipped = {}
    for part in gather_object([batch["skipped"]]):
        for cause, number in part.items():
            skipped[cause] = skipped.get(cause, 0) + number
    messages = gather_object(batch["skipped_messages"])
    return len(batch["keys"]) * accelerator.num_processes, skipped, messages


def _mean_over_processes(sums, accelerator):
    names = sorted(sums)
    means = accelerator.reduce(torch.stack([sums[name] for name in names]), "mean")
    return dict(zip(names, means.tolist(), strict=True))
