# ruff: noqa: F811  fixtures are imported, and used by the names of arguments
"""Runs on two processes, against one process with the doubled batch."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from support.training_runs import (  # noqa: F401  fixtures
    StuckSource,
    ToySource,
    ToyStage,
    data,
    dataset,
    fresh_accelerator,
    make_config,
    model,
    read_log,
    run_processes,
    settings,
    train_stage,
    trained_weights,
    weights,
)

from kosmos_g_diffusers.training import build_run, checkpoints, train
from kosmos_g_diffusers.training.rehearsal import describe, rehearse


def train_toy(config):
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    train(config, ToyStage(dropout=0), dataset(config, state.process_index, 2), progress_bar=False)


def test_two_processes_learn_what_one_learns_from_the_doubled_batch(tmp_path):
    changes = {"steps": 20, "ema_decay": 0.9, "bucket_window": 4, "accumulation": 2}
    two = settings(tmp_path / "two", batch_size=4, **changes)
    assert run_processes(train_toy, two) == [0, 0]
    config = settings(tmp_path / "one", batch_size=8, **changes)
    one = weights(train(config, ToyStage(dropout=0), dataset(config), progress_bar=False))
    assert (one["head.weight"] - ToyStage().head.weight).abs().max() > 0.05
    together = weights(tmp_path / "two" / "checkpoint-00000020")
    for name, expected in one.items():
        torch.testing.assert_close(together[name], expected, atol=1e-6, rtol=1e-4)
    # it is resumed by two, and not by one
    shutil.rmtree(tmp_path / "two" / "checkpoint-00000020")
    assert run_processes(train_toy, two) == [0, 0]
    again = weights(tmp_path / "two" / "checkpoint-00000020")
    assert all(torch.equal(again[name], tensor) for name, tensor in together.items())
    with pytest.raises(ValueError, match="begun on 2 processes; this one has 1"):
        train(two, ToyStage(), dataset(two), progress_bar=False)


def train_toy_until_a_signal(config):
    state, source = PartialState(cpu=True), ToySource()
    if state.process_index == 1:
        read = source.read

        def read_at_last(index, rng):
            if list(Path(config.output).glob("log.jsonl")):  # the first step is done
                os.kill(os.getpid(), signal.SIGTERM)
            return read(index, rng)

        source.read = read_at_last
    data = dataset(config, state.process_index, 2, source=source)
    train(config, ToyStage(), data, progress_bar=False)


def test_signal_to_one_process_ends_both_with_one_checkpoint(tmp_path, capfd):
    config = settings(tmp_path, steps=500, save_every=500)
    assert run_processes(train_toy_until_a_signal, config) == [128 + signal.SIGTERM] * 2
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    assert checkpoints.read_progress(checkpoint)["step"] < 500
    assert capfd.readouterr().err.count("Stopped by SIGTERM") == 1


def train_toy_on_stuck_data(config, folder, told):
    """The second process waits for data that never comes, the first for the second; those in `told` are told to stop."""
    state = PartialState(cpu=True)
    source = StuckSource(12, folder) if state.process_index == 1 else ToySource()

    def signal_when_stuck():
        while not (folder / "stuck").exists() or len(read_log(config.output)) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    if state.process_index in told:
        threading.Thread(target=signal_when_stuck, daemon=True).start()
    batches = dataset(config, state.process_index, 2, source=source)
    train(config, ToyStage(dropout=0), batches, progress_bar=False)


@pytest.mark.parametrize(
    "told", [(0,), (1,)], ids=["the one that waits for the other", "the one without data"]
)
def test_signal_to_one_process_is_obeyed_while_one_waits_for_data(tmp_path, capfd, told):
    config = settings(tmp_path / "run", steps=8, save_every=1000, workers=1)
    (tmp_path / "run").mkdir()
    config.save(tmp_path / "run" / "config.json")
    (tmp_path / "run" / ".stop").write_text("15")  # of an earlier part of the run
    codes = run_processes(train_toy_on_stuck_data, config, tmp_path, told, timeout=120)
    assert codes == [128 + signal.SIGTERM] * 2
    (checkpoint,) = checkpoints.list_checkpoints(config.output)
    assert checkpoints.read_progress(checkpoint)["step"] == 3
    assert "Stopped by SIGTERM at step 3 of 8" in capfd.readouterr().err


WORDS = {"words_share": 0.4, "words_weight": 1.0, "accumulation": 2}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("pretrain", {}), ("align", {}), ("instruct", {}), ("instruct", {"lora_rank": 2}), ("instruct", WORDS)],
    ids=["pretrain", "align", "instruct", "adapters", "words"],
)
def test_two_processes_train_every_stage_as_one(make_config, data, stage, changes):
    if changes is WORDS:
        changes = {**WORDS, "words": [f"shards:{data}"]}
    changes = {"steps": 20, "lr": 2e-3, "warmup_steps": 2, "bucket_window": 4, **changes}
    two = make_config(stage, "two", batch_size=2, **changes)
    assert run_processes(train_stage, two) == [0, 0]
    one = make_config(stage, "one", batch_size=4, **changes)
    expected = trained_weights(train_stage(one))
    check_equal(stage, make_config(stage, "before", **changes), expected, two.output)
    for line, other in zip(read_log(one.output), read_log(two.output), strict=True):
        del line["samples_per_second"], other["samples_per_second"]
        assert line == pytest.approx(other, rel=1e-3)


def check_equal(stage, fresh, expected, output):
    """Compare the newest checkpoint's weights with those expected, which must have changed since the beginning."""
    given = trained_weights(checkpoints.list_checkpoints(output)[-1])
    before = build_run(stage, fresh).stage.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(given[name], tensor, atol=1e-4, rtol=0)
    assert max((expected[name] - before[name]).abs().max() for name in expected) > 0.005


@pytest.mark.parametrize("stage", ["pretrain", "align"])
def test_without_agreement_they_differ(make_config, monkeypatch, stage):
    """The test above would see it: numbers of labels, and lengths, differ between the processes."""
    changes = {"steps": 4, "lr": 2e-3, "warmup_steps": 0}
    expected = trained_weights(train_stage(make_config(stage, "one", batch_size=4, **changes)))
    monkeypatch.setattr("kosmos_g_diffusers.training.loop.agree_on_batches", lambda *args: None)
    two = make_config(stage, "two", batch_size=2, **changes)
    assert run_processes(train_stage, two) == [0, 0]
    given = trained_weights(checkpoints.list_checkpoints(two.output)[-1])
    assert max((expected[name] - given[name]).abs().max() for name in expected) > 1e-4


def rehearse_together(config):
    found = rehearse("align", config, timed=1)
    assert found.figures["processes"] == 2 and found.samples_a_step == 2 * config.batch_size
    assert "2 processes" in describe(found)


def test_two_processes_rehearse_in_one_folder_and_leave_nothing(make_config, tmp_path):
    config = make_config("align", batch_size=2)
    assert run_processes(rehearse_together, config) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


FSDP = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def train_sharded(config):
    # accelerate shards on accelerators alone; torch can on a CPU
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    train_stage(config)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_sharded_training(make_config, stage):
    """FSDP 2: the same weights as one process, checkpoints that from_pretrained reads, and resuming."""
    from safetensors.torch import load_file

    changes = {"steps": 8, "lr": 2e-3, "save_every": 4}
    expected = train_stage(make_config(stage, "one", batch_size=4, **changes))
    two = make_config(stage, "two", batch_size=2, **changes)
    assert run_processes(train_sharded, two, environment=FSDP) == [0, 0]
    last = checkpoints.list_checkpoints(two.output)[-1]
    name = "text_encoder/model.safetensors"
    given = load_file(last / name)
    for key, tensor in load_file(expected / name).items():
        torch.testing.assert_close(given[key], tensor, atol=1e-4, rtol=0)
    shutil.rmtree(last)
    assert run_processes(train_sharded, two, environment=FSDP) == [0, 0]
    assert all(torch.equal(given[key], tensor) for key, tensor in load_file(last / name).items())


@pytest.mark.parametrize("original", ["true", "false"])
def test_fsdp_1_is_refused_at_the_start(make_config, original):
    environment = FSDP | {"FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": original}
    words = "FSDP 1 was asked for.*fsdp_version: 2"
    assert run_processes(refuse_sharded, make_config("align"), words, environment=environment) == [0, 0]


def refuse_sharded(config, words):
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match=words):
        train_stage(config)


def test_what_sharded_training_cannot_do_is_refused(make_config):
    config = make_config("align", ema_decay=0.9)
    words = "ema_decay is 0.9, which needs the weights whole, and FSDP shards them"
    assert run_processes(refuse_sharded, config, words, environment=FSDP) == [0, 0]
