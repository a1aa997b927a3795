# ruff: noqa: F811  fixtures are imported, and used by the names of arguments
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.training_runs import (  # noqa: F401  a fixture
    FORK,
    StuckSource,
    ToySource,
    ToyStage,
    dataset,
    fresh_accelerator,
    random_numbers,
    read_log,
    settings,
    weights,
)

from kosmos_g_diffusers.data import TooManyBadSamples
from kosmos_g_diffusers.data.sample import FilteredSample
from kosmos_g_diffusers.training import checkpoints
from kosmos_g_diffusers.training.log import Log
from kosmos_g_diffusers.training.loop import TrainingStopped, train


class Stopped(Exception):
    pass


class DyingDataset(torch.utils.data.Dataset):
    """A dataset that raises Stopped instead of the given batch."""

    def __init__(self, batches, dies_at):
        self.batches, self.dies_at = batches, dies_at
        self.describe_sources = batches.describe_sources

    def __getitem__(self, number):
        if number == self.dies_at:
            raise Stopped
        return self.batches[number]


def run(config, stage=None, **kwargs):
    return train(config, stage or ToyStage(), dataset(config), progress_bar=False, **kwargs)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is computed ------------------------------------------------------------------------------------------------


def plain_training(config, stage):
    """The run of a config in a few lines of torch, without accelerate; returns the weights, norms and learning rates."""
    torch.manual_seed(config.seed)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, config.lr, (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.weight_decay
    )
    data, average = dataset(config), [parameter.detach().clone() for parameter in trained]
    norms, rates = [], []
    for step in range(config.steps):
        for micro in range(config.accumulation):
            losses = stage(data[step * config.accumulation + micro])
            (sum(losses.values()) / config.accumulation).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm()
        norms.append(norm.item())
        for parameter in trained:
            parameter.grad *= min(1, config.max_grad_norm / (norm.item() + 1e-6))
        if step < config.warmup_steps:
            rate = config.lr * step / config.warmup_steps
        else:
            rate = config.lr * (config.steps - step) / (config.steps - config.warmup_steps)
        rates.append(rate)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        decay = 0 if step == 0 else min(config.ema_decay, 1 - (1 + step) ** -0.75)
        for kept, parameter in zip(average, trained, strict=True):
            kept.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    names = [name for name, parameter in stage.named_parameters() if parameter.requires_grad]
    state = {name: parameter.detach() for name, parameter in zip(names, trained, strict=True)}
    return state, dict(zip(names, average, strict=True)), norms, rates


@pytest.mark.parametrize("accumulation", [1, 3])
def test_run_is_plain_training(tmp_path, accumulation):
    """Warm-up and decay, clipping, accumulation, AdamW and the average, against the same by hand."""
    config = settings(
        tmp_path / "run", max_grad_norm=0.5, accumulation=accumulation, weight_decay=0.1, ema_decay=0.7
    )
    checkpoint = run(config, ToyStage(scale=3.0))
    stage = ToyStage(scale=3.0)
    state, average, norms, rates = plain_training(config, stage)
    assert max(norms) > 2 * config.max_grad_norm, "nothing was clipped"
    trained = load_file(checkpoint / "training_state" / "trained.safetensors")
    saved = load_file(checkpoint / "toy.safetensors")
    for name, expected in state.items():
        torch.testing.assert_close(trained[name], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(saved[name], average[name], atol=1e-6, rtol=1e-5)
        assert (saved[name] - trained[name]).abs().max() > 1e-4, "the average is not an average"
    assert torch.equal(saved["frozen.weight"], ToyStage().frozen.weight)
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert np.allclose([line["grad_norm"] for line in lines], norms, rtol=1e-4)
    # a line has the rate of the next step
    assert np.allclose([line["lr"] for line in lines], [*rates[1:], 0])


def test_accumulation_equals_a_larger_batch(tmp_path):
    one = run(settings(tmp_path / "one", batch_size=8), ToyStage(dropout=0))
    two = run(settings(tmp_path / "two", batch_size=4, accumulation=2), ToyStage(dropout=0))
    for name, expected in load_file(one / "toy.safetensors").items():
        torch.testing.assert_close(load_file(two / "toy.safetensors")[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_other_schedules(tmp_path, name):
    run(settings(tmp_path, lr_schedule=name, warmup_steps=2))
    rates = [line["lr"] / 0.01 for line in read_log(tmp_path)]
    shares = np.arange(7) / 6
    expected = np.ones(7) if name == "constant" else (1 + np.cos(np.pi * shares)) / 2
    assert np.allclose(rates, [0.5, *expected])


def test_eight_bit_moments_learn_nearly_the_same_and_are_resumed(tmp_path):
    pytest.importorskip("torchao.optim")

    def wide_stage():
        stage = ToyStage(dropout=0)
        stage.wide = torch.nn.Linear(64, 64, bias=False)  # smaller ones keep float32
        torch.nn.init.constant_(stage.wide.weight, 0.01)
        stage.register_forward_hook(lambda *args: args[2] | {"wide": stage.wide.weight.square().sum()})
        return stage

    def wide(checkpoint):
        return load_file(checkpoint / "training_state/trained.safetensors")["wide.weight"]

    changes = {"steps": 4, "save_every": 2}
    exact = wide(run(settings(tmp_path / "exact", **changes), wide_stage()))
    config = settings(tmp_path / "eight", optimizer="adamw8bit", **changes)
    checkpoint = run(config, wide_stage())
    given = wide(checkpoint)
    assert not torch.equal(given, exact) and (given - exact).abs().max() < 2e-3 < (given - 0.01).abs().max()
    shutil.rmtree(checkpoint)
    assert torch.equal(wide(run(config, wide_stage())), given)
    with pytest.raises(ValueError, match="optimizer .was 'adamw8bit', now 'adamw'"):
        run(config.replace(optimizer="adamw"), wide_stage())


def test_half_precision_keeps_float32_weights(tmp_path):
    exact = run(settings(tmp_path / "exact", steps=4))
    AcceleratorState._reset_state()
    half = run(settings(tmp_path / "half", steps=4, mixed_precision="bf16"))
    one, other = load_file(exact / "toy.safetensors"), load_file(half / "toy.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in other.values())
    assert not torch.equal(one["head.weight"], other["head.weight"])
    torch.testing.assert_close(one["head.weight"], other["head.weight"], atol=0.01, rtol=0)
    losses = [[line["square"] for line in read_log(tmp_path / name)] for name in ("exact", "half")]
    assert np.allclose(*losses, rtol=0.03) and losses[0] != losses[1]


def test_workers_change_nothing(tmp_path):
    none = run(settings(tmp_path / "none"))
    assert same(weights(none), weights(run(settings(tmp_path / "two", workers=2))))


# Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation": 2, "ema_decay": 0.9},
        {"mixed_precision": "bf16", "workers": 1},
    ],
    ids=["plain", "accumulated, averaged", "bf16, worker"],
)
def test_resumed_run_ends_with_the_same_bits(tmp_path, changes):
    whole = run(settings(tmp_path / "whole", **changes))
    config = settings(tmp_path / "parts", **changes)
    for step in (5, 5, 7):
        data = DyingDataset(dataset(config), step * config.accumulation - 1)
        with pytest.raises(Stopped):
            train(config, ToyStage(), data, progress_bar=False)
        assert not multiprocessing.active_children()  # which ignore signals: a program would not end
        random_numbers()
        torch.manual_seed(123)
        random.seed(4)
    assert checkpoints.list_checkpoints(config.output)[-1].name == "checkpoint-00000006"
    resumed = run(config)
    assert resumed.name == whole.name == "checkpoint-00000008"
    assert same(weights(whole), weights(resumed))
    logs = [read_log(Path(path).parent) for path in (whole, resumed)]
    for line in (*logs[0], *logs[1]):
        del line["samples_per_second"]
    assert logs[0] == logs[1]


def test_finished_run_is_left_as_it_is(tmp_path):
    config = settings(tmp_path)
    first = run(config)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*.*")}
    assert run(config) == first
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*.*")}


def kill_at_random(output, kills, seed, **changes):
    """Run in children that are killed after random times, up to the end; returns the number of kills."""
    rng, config, done = random.Random(seed), settings(output, **changes), 0
    last = checkpoints.checkpoint_folder(output, config.steps)
    while done < kills and not last.exists():
        child = FORK.Process(target=_child, args=(config,))
        child.start()
        time.sleep(rng.uniform(0.01, 0.25))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        done += child.exitcode == -signal.SIGKILL
    run(config)
    return done


def _child(config, pause=0.005, **kwargs):
    AcceleratorState._reset_state()
    stage = kwargs.pop("stage", None) or ToyStage()
    try:
        train(config, stage, dataset(config, source=ToySource(pause=pause)), progress_bar=False, **kwargs)
    except KeyboardInterrupt:  # multiprocessing would print it
        raise SystemExit(130) from None


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    """Half of the time goes into saving, so that some hit it."""
    changes = {"steps": 400, "save_every": 2, "ema_decay": 0.9}
    whole = run(settings(tmp_path / "whole", **changes))
    assert kill_at_random(tmp_path / "killed", kills=20, seed=20, **changes) == 20
    assert same(weights(whole), weights(checkpoints.list_checkpoints(tmp_path / "killed")[-1]))


def test_kill_while_saving_or_removing(tmp_path, monkeypatch):
    """At every call that changes the disk, the newest folder with a checkpoint's name is complete."""
    changes = {"steps": 12, "save_every": 1}
    config, whole = settings(tmp_path / "run", **changes), run(settings(tmp_path / "whole", **changes))
    for name in ("_sync", "_remove", "write_progress"):
        for calls in (1, 2):
            left, real = [calls], getattr(checkpoints, name)

            def dies(*args, left=left, real=real):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(checkpoints, name, dies)
                child = FORK.Process(target=_child, args=(config,))
                child.start()
                child.join()
            assert child.exitcode == -signal.SIGKILL, (name, calls)
    run(config)
    found = checkpoints.list_checkpoints(config.output)
    assert same(weights(whole), weights(found[-1]))
    assert not list(Path(config.output).glob(".checkpoint*")) and len(found) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_first_and_says_where(tmp_path, number, capfd):
    config = settings(tmp_path / "run", steps=100, save_every=1000, workers=1)
    child = FORK.Process(target=_child, args=(config, 0.05))  # 20 seconds, of which one is waited for
    child.start()
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number  # as if nobody had waited for it
    (stopped,) = checkpoints.list_checkpoints(config.output)
    step = checkpoints.read_progress(stopped)["step"]
    assert 0 < step < 100
    said = f"Stopped by {number.name} at step {step} of 100, saved in {stopped}. The same command resumes from there."
    assert said in capfd.readouterr().err
    whole = run(settings(tmp_path / "whole", steps=100, save_every=1000))
    assert same(weights(whole), weights(run(config)))


def test_old_checkpoints_are_removed(tmp_path):
    run(settings(tmp_path / "two", save_every=2, keep_checkpoints=2))
    assert [path.name[-1] for path in checkpoints.list_checkpoints(tmp_path / "two")] == ["6", "8"]
    run(settings(tmp_path / "all", save_every=2, keep_checkpoints=0))
    assert len(checkpoints.list_checkpoints(tmp_path / "all")) == 4


# What stops a run ------------------------------------------------------------------------------------------------


def test_nan_stops_with_step_samples_and_last_good_checkpoint(tmp_path):
    config = settings(tmp_path, accumulation=2)
    with pytest.raises(TrainingStopped) as caught:
        run(config, ToyStage(nan_at=2 * 4 + 1))  # the first pass of step 5
    message = str(caught.value)
    keys = [key for number in (8, 9) for key in dataset(config)[number]["keys"]]
    assert "step 5 is nan" in message and ", ".join(keys) in message
    assert str(tmp_path / "checkpoint-00000003") in message
    run(config)


def test_gradient_that_is_not_finite_stops(tmp_path):
    stage = ToyStage()
    stage.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingStopped, match="gradient norm of step 1 is .*There is no checkpoint yet"):
        run(settings(tmp_path), stage)


def _save_on_a_full_disk(folder, state):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def overflows(monkeypatch):
    """Function that makes the optimizer pass over some steps, as float16's scaler does when gradients overflow."""

    def overflow(numbers):
        made = []

        def step(self, closure=None):
            made.append(len(made) + 1)
            if made[-1] not in numbers:
                self.optimizer.step(closure)

        monkeypatch.setattr(AcceleratedOptimizer, "step", step)
        monkeypatch.setattr(
            AcceleratedOptimizer, "step_was_skipped", property(lambda self: made[-1] in numbers)
        )

    return overflow


def test_steps_that_are_passed_over_are_counted_and_change_nothing(tmp_path, overflows, capsys):
    overflows({1, 2, 5})
    checkpoint = run(settings(tmp_path, ema_decay=0.9))
    assert "3 of 8 steps were passed over: their gradients overflowed float16" in capsys.readouterr().err
    log = read_log(tmp_path)
    assert [line.get("passed_over", 0) for line in log] == [1, 2, 2, 2, 3, 3, 3, 3]
    assert log[0]["lr"] == log[1]["lr"] == 0 and log[3]["lr"] == log[4]["lr"]
    states = checkpoint / "training_state"
    average = next(path for path in states.iterdir() if path.name.startswith("custom_checkpoint_1"))
    assert torch.load(average, weights_only=True)["optimization_step"] == 5
    # a part of the run that is resumed counts on
    overflows({1})
    run(settings(tmp_path / "parts", lr_schedule="constant", steps=3))
    overflows({2})
    run(settings(tmp_path / "parts", lr_schedule="constant"))
    assert read_log(tmp_path / "parts")[-1]["passed_over"] == 2


def test_fifty_steps_in_a_row_that_are_passed_over_stop_the_run(tmp_path, overflows):
    overflows(set(range(5, 200)) - {30})
    words = "50 steps in a row were passed over, up to step 80: .* last good checkpoint is .*00000078. .*--mixed-precision bf16"
    with pytest.raises(TrainingStopped, match=words):
        run(settings(tmp_path, steps=200))


def test_log_is_json_whatever_the_numbers(tmp_path):
    log = Log(settings(tmp_path), 0, Accelerator(cpu=True))
    losses = {"square": torch.tensor(float("nan"))}
    log.write(3, losses, 0.1, torch.tensor(float("inf")), {"row": 2}, 1)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    values = json.loads(line, parse_constant=refuse)
    assert (values["square"], values["grad_norm"], values["lr"]) == (None, None, 0.1)
    assert (values["left_out"], values["passed_over"]) == ({"row": 2}, 1)


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    config, saves = settings(tmp_path / "run"), []

    def save_model(folder, state):
        ToyStage().save_pretrained(folder, state)
        saves.append(folder)
        if len(saves) == 2:
            _save_on_a_full_disk(folder, state)

    with pytest.raises(OSError, match="Checkpoint 6 .*No space left.*checkpoint-00000003.*same command"):
        run(config, save_model=save_model)
    assert [path.name for path in checkpoints.list_checkpoints(config.output)] == ["checkpoint-00000003"]
    assert not list(Path(config.output).glob(".checkpoint*"))
    assert same(weights(run(settings(tmp_path / "whole"))), weights(run(config)))


def _child_with_small_files(config, size, messages, limit=2**16):
    """The kernel refuses to let any file grow beyond the limit: what torch and safetensors raise then is their own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stage = ToyStage()
    trained = size < 1  # then the optimizer holds twice as much, and torch.save meets the limit first
    stage.big = torch.nn.Parameter(torch.zeros(int(size * limit / 4)), requires_grad=trained)
    if trained:
        stage.register_forward_hook(lambda *args: args[2] | {"big": stage.big.sum() * 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        _child(config, stage=stage)
    except BaseException as error:
        messages.put((type(error).__name__, str(error)))


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 4096),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2**40),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2**40),
    ],
    ids=["torch", "safetensors", "quota"],
)
def test_full_disk_is_named_as_such_whatever_library_raised_it(tmp_path, monkeypatch, error, free):
    """The errors are those of a file system of one MiB."""

    def save_model(folder, state):
        raise error

    usage = SimpleNamespace(total=2**40, used=0, free=free)
    monkeypatch.setattr("kosmos_g_diffusers.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=rf"^Checkpoint 3 .*: No space left on device \({tmp_path}\)\. There is"
    ):
        run(settings(tmp_path), save_model=save_model)


@pytest.mark.parametrize("size", [0.7, 1.5], ids=["torch.save", "safetensors"])
def test_writers_of_libraries_fail_alike(tmp_path, size):
    messages = FORK.Queue()
    config = settings(tmp_path, steps=2, save_every=1)
    child = FORK.Process(target=_child_with_small_files, args=(config, size, messages))
    child.start()
    name, message = messages.get(timeout=60)
    child.join()
    assert name == "OSError" and "Checkpoint 1 could not be written" in message, (name, message)
    assert not list(tmp_path.glob(".checkpoint*"))


def test_run_of_other_settings_is_refused(tmp_path):
    run(settings(tmp_path))
    with pytest.raises(
        ValueError, match=r"other settings: lr \(was 0.01, now 0.1\), seed \(was 0, now 1\)\. Continue"
    ):
        run(settings(tmp_path, lr=0.1, seed=1, log_every=2))
    run(settings(tmp_path, log_every=2))  # what is not learned may change


def test_a_finished_run_of_a_constant_schedule_continues_for_more_steps(tmp_path):
    whole = run(settings(tmp_path / "whole", lr_schedule="constant", ema_decay=0.9))
    run(settings(tmp_path / "parts", lr_schedule="constant", ema_decay=0.9, steps=3))
    longer = run(settings(tmp_path / "parts", lr_schedule="constant", ema_decay=0.9))
    assert same(weights(longer), weights(whole))
    assert [line["step"] for line in read_log(tmp_path / "parts")] == list(range(1, 9))
    with pytest.raises(ValueError, match=r"steps \(was 8, now 3\). Continue with the settings"):
        run(settings(tmp_path / "parts", lr_schedule="constant", ema_decay=0.9, steps=3))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_other_runs_say_how_to_train_on(tmp_path, schedule):
    run(settings(tmp_path, lr_schedule=schedule))
    words = rf"steps \(was 8, now 20\). With the {schedule} schedule .* begin a new run .*checkpoint-... as --model"
    with pytest.raises(ValueError, match=words):
        run(settings(tmp_path, lr_schedule=schedule, steps=20))


def test_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="is not a run"):
        run(settings(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match="No output was given"):
        run(settings(""))


def test_other_number_of_processes_is_refused(tmp_path):
    path = run(settings(tmp_path)) / "training_state" / "progress.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match="begun on 2 processes; this one has 1"):
        run(settings(tmp_path))


class SizedSource(ToySource):
    """Of several files."""

    def __len__(self):
        return sum(self.groups)


@pytest.mark.parametrize(
    ("groups", "words"),
    [([30, 31], "toy had 60 samples and has 61"), ([25, 35], "toy has its 60 samples in other files")],
)
def test_data_that_changed_is_refused(tmp_path, groups, words):
    """Else the same seed would order it anew, and a run would read some samples twice and others never."""

    def train_on(groups):
        config, source = settings(tmp_path), SizedSource()
        source.groups = groups
        return train(config, ToyStage(), dataset(config, source=source), progress_bar=False)

    train_on([30, 30])
    with pytest.raises(
        ValueError, match=f"has changed since .*checkpoint-00000008 was written: {words}.*pass it as --model"
    ):
        train_on(groups)
    assert train_on([30, 30]).name == "checkpoint-00000008"


def test_data_elsewhere_is_taken_when_it_is_said_to_be_the_same(tmp_path):
    first = settings(tmp_path, data=("shards:/old",))
    with pytest.raises(Stopped):
        train(first, ToyStage(), DyingDataset(dataset(first), 4), progress_bar=False)
    moved = settings(tmp_path, data=("shards:/new",))
    with pytest.raises(ValueError, match="data .was .*shards:/old"):
        run(moved)
    moved = settings(tmp_path, data=("shards:/new",), data_moved=True)
    with pytest.raises(Stopped):
        train(moved, ToyStage(), DyingDataset(dataset(moved), 6), progress_bar=False)
    whole = run(settings(tmp_path / "whole"))
    assert same(weights(run(moved)), weights(whole))
    with pytest.raises(ValueError, match="has changed since"):
        train(moved, ToyStage(), dataset(moved, source=ToySource(size=51)), progress_bar=False)
    path = tmp_path / "checkpoint-00000008" / "training_state" / "progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in progress.items() if name != "sources"}))
    with pytest.raises(
        ValueError, match="does not say how many samples its data had.*leave out --data-moved"
    ):
        run(moved)
    assert run(settings(tmp_path, data=("shards:/new",))).name == "checkpoint-00000008"  # as before


def test_too_many_bad_samples_stop_the_run_with_counts(tmp_path):
    config = settings(tmp_path, steps=100)
    data = dataset(config, source=ToySource(bad=range(10)))
    with pytest.raises(TooManyBadSamples, match="(?s)of 1.. samples .*row: .* such as toy:"):
        train(config, ToyStage(), data, progress_bar=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_source_without_a_usable_sample_is_named(tmp_path, workers):
    """In plain words from a worker as well, which would send its traceback."""
    config = settings(tmp_path, workers=workers)
    words = r"^\d+ samples in a row of source 'toy' \(50 samples\) cannot be used; the first: row: toy:.* out of the mixture\.$"
    with pytest.raises(ValueError, match=words):
        train(config, ToyStage(), dataset(config, source=ToySource(bad=range(50))), progress_bar=False)


def test_counts_of_bad_samples_are_resumed(tmp_path, capsys):
    whole = settings(tmp_path / "whole", max_bad_samples=0.9)
    train(whole, ToyStage(), dataset(whole, source=ToySource(bad=range(10))), progress_bar=False)
    summary = capsys.readouterr().out
    assert "samples read could not be used" in summary
    parts = settings(tmp_path / "parts", max_bad_samples=0.9)
    with pytest.raises(Stopped):
        data = DyingDataset(dataset(parts, source=ToySource(bad=range(10))), 4)
        train(parts, ToyStage(), data, progress_bar=False)
    train(parts, ToyStage(), dataset(parts, source=ToySource(bad=range(10))), progress_bar=False)
    assert capsys.readouterr().out == summary


class PickySource(ToySource):
    """A source of captions, of which all but ten are too long."""

    def read(self, index, rng):
        if index >= 10:
            raise FilteredSample("length", f"toy:{index} has 190 tokens of text, more than 85")
        return super().read(index, rng)


def test_a_run_that_learns_from_ten_samples_says_so_while_it_runs(tmp_path, capsys):
    config = settings(tmp_path, steps=15)
    train(config, ToyStage(), dataset(config, source=PickySource(size=200)), progress_bar=False)
    out, err = capsys.readouterr()
    (warning,) = (line for line in err.splitlines() if "Warning" in line)
    assert "of the first 1," in warning and ", 10 different ones. " in warning and "has 190 tokens" in warning
    log = read_log(tmp_path)
    counts = [line["left_out"]["filtered: length"] for line in log]
    assert counts == sorted(counts) and counts[-1] > 1000
    assert f"{counts[-1]:,} of {counts[-1] + 60:,} samples read could not be used" in out


# Next to the training -------------------------------------------------------------------------------------------


def test_drawing_samples_leaves_no_trace(tmp_path):
    seen = []

    def draw(stage, path):
        assert not stage.training and path.parent.is_dir()
        seen.append((path.name, stage.head.weight.detach().clone()))
        random_numbers()
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)
        path.write_bytes(b"")

    changes = {"ema_decay": 0.9}
    without = run(settings(tmp_path / "without", **changes))
    config = settings(tmp_path / "with", sample_every=3, **changes)
    drawn = run(config, draw_samples=draw)
    assert same(weights(without), weights(drawn))
    assert [name for name, _ in seen] == ["step-00000003.png", "step-00000006.png"]
    average = load_file(tmp_path / "with" / "checkpoint-00000006" / "toy.safetensors")
    assert torch.equal(seen[1][1], average["head.weight"])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def draw(stage, path):
        import PIL.Image

        PIL.Image.new("RGB", (8, 8), "red").save(path)

    config = settings(tmp_path, tracker="tensorboard", sample_every=3, data_weights=(1.0, 2.0))
    run(config, draw_samples=draw)
    events = EventAccumulator(str(next(tmp_path.glob("kosmos-g/events*")).parent))
    events.Reload()
    expected = [(line["step"], line["square"]) for line in read_log(tmp_path)]
    assert np.allclose([(event.step, event.value) for event in events.Scalars("square")], expected)
    assert len(events.Images("samples")) == 2


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path, log_every, monkeypatch):
    """Steps after the last checkpoint were logged before the kill, and are made and logged again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # files of one second are read in the order of their numbers as texts, where 10 comes before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    config = settings(tmp_path / "run", tracker="tensorboard", log_every=log_every, steps=8)
    for dies_at in (5, 7):
        with pytest.raises(Stopped):
            train(config, ToyStage(), DyingDataset(dataset(config), dies_at), progress_bar=False)
    run(config)
    events = EventAccumulator(str(tmp_path / "run" / "kosmos-g"))
    events.Reload()
    given = [(event.step, event.value) for event in events.Scalars("square")]
    assert [step for step, _ in given] == list(range(log_every, 9, log_every))
    assert np.allclose(given, [(line["step"], line["square"]) for line in read_log(tmp_path / "run")])


def test_a_resumed_run_stays_one_run_of_wandb(tmp_path, monkeypatch):
    """A stand-in for the package, which is large: what accelerate calls of it, with its signatures."""
    calls, logged = [], []
    handle = SimpleNamespace(log=lambda values, step=None: logged.append(step), finish=lambda: None)
    package = SimpleNamespace(
        __name__="wandb",
        __spec__=SimpleNamespace(name="wandb"),
        init=lambda **options: calls.append(options) or handle,
        config=SimpleNamespace(update=lambda values, allow_val_change: None),
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    monkeypatch.setattr("kosmos_g_diffusers.training.log.is_wandb_available", lambda: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    config = settings(tmp_path / "run", tracker="wandb")
    with pytest.raises(Stopped):
        train(config, ToyStage(), DyingDataset(dataset(config), 5), progress_bar=False)
    run(config)
    run(settings(tmp_path / "other", tracker="wandb"))
    assert [call["resume"] for call in calls] == ["allow"] * 3 and len(logged) > 8
    assert calls[0]["id"] == calls[1]["id"] != calls[2]["id"]
    assert calls[0]["project"] == "kosmos-g" and calls[0]["name"] == "run"


def test_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("kosmos_g_diffusers.training.log.is_wandb_available", lambda: False)
    with pytest.raises(ImportError, match="pip install wandb"):
        run(settings(tmp_path, tracker="wandb"))
    assert not list(tmp_path.iterdir())


# Workers that bring nothing ---------------------------------------------------------------------------------------------


def _train_on_stuck_data(config, samples, folder):
    train(config, ToyStage(), dataset(config, source=StuckSource(samples, folder)), progress_bar=False)


def test_signal_is_obeyed_while_no_data_comes(tmp_path, capfd):
    config = settings(tmp_path / "run", steps=8, save_every=1000, workers=1)
    child = FORK.Process(target=_train_on_stuck_data, args=(config, 12, tmp_path))
    child.start()
    while not (tmp_path / "stuck").exists() or len(read_log_lines(config)) < 3:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM
    (stopped,) = checkpoints.list_checkpoints(config.output)
    assert checkpoints.read_progress(stopped)["step"] == 3
    assert "Stopped by SIGTERM at step 3 of 8, saved in" in capfd.readouterr().err
    whole = run(settings(tmp_path / "whole", steps=8, save_every=1000))
    assert same(weights(whole), weights(run(config)))


def read_log_lines(config):
    path = Path(config.output) / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_shared_memory_that_is_full_ends_the_run_with_advice(tmp_path, monkeypatch):
    def share(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)  # in the worker, a copy of this process
    words = r"^A batch of 0.0 MiB found no place: workers pass .* docker run --shm-size 1g .* fewer --workers; 0 needs none\.$"
    with pytest.raises(ValueError, match=words):
        run(settings(tmp_path, workers=1))
    run(settings(tmp_path, workers=0))
