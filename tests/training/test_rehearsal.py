# ruff: noqa: F811  fixtures are imported, and used by the names of arguments
import json
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from support.training_runs import (  # noqa: F401  fixtures
    data,
    fresh_accelerator,
    make_config,
    model,
)

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.commands import train as command
from kosmos_g_diffusers.training import TrainConfig, build_run
from kosmos_g_diffusers.training.checkpoints import trained_parameters
from kosmos_g_diffusers.training.rehearsal import describe, rehearse, rehearsing, report, trial
from kosmos_g_diffusers.training.rehearsal.counting import GIB, Shape, Sizes, count


def test_rehearsal_writes_nothing_and_tells_what_the_run_takes(make_config, monkeypatch, tmp_path):
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "prompts.json").write_text('["a hat", [{"image": "red.png"}, "in the suit"]]')
    prompts = {"sample_every": 100, "sample_prompts": str(tmp_path / "prompts.json")}
    config = make_config("instruct", steps=1000, accumulation=2, warmup_steps=2000, **prompts)
    # in this process, which has everything loaded
    monkeypatch.setattr(
        rehearsing, "_try_apart", lambda config: trial.run_trial(config.stage, config, None, 2)
    )
    found = rehearse("instruct", config, for_memory=24, price=2.0)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "cache",
        "prompts.json",
        "red.png",
    }  # no run, nothing of it
    text = describe(found)
    print(text)
    assert " (60 samples); largest of the first 60: " in text
    assert "Note: the warm-up of 2,000 steps is longer than the run of 1,000" in text
    assert "run: 1,000 steps, 6,000 samples (100 times the data), " in text
    assert " at 2 an hour" in text and "CPU-days" in text
    assert "a sample sheet drawn in" in text and "count for a GPU of 24 GiB" in text
    assert text.endswith("nothing runs out")
    figures = found.figures
    assert figures["left"] == [f"checkpoint-{figures['steps']:08d}"] and figures["checkpoint"] > 1000
    # the tests' own process may have given memory back that was its before the trial: then the parts are more than the peak
    assert sum(figures["parts"].values()) == pytest.approx(figures["peak"], rel=0.05)
    json.dumps(figures)  # it comes from another process
    assert 0 < figures["step_cpu_seconds"]
    expected = 1000 * found.step_seconds + figures["save_seconds"] + 10 * figures["sheet_seconds"]
    assert found.run_seconds == pytest.approx(expected)


def test_batch_that_needs_most_memory_is_made_of_the_largest_sample(make_config):
    dataset = build_run("instruct", make_config("instruct")).dataset
    looked_at = trial.look_at(dataset, 0)
    batches = [dataset[number] for number in range(60)]
    assert looked_at["tokens"] == max(batch["input_ids"].shape[1] for batch in batches)
    batch = looked_at["batch"]
    assert batch["input_ids"].shape == (3, looked_at["tokens"]) and bool(batch["attention_mask"].all())
    assert len(batch["pixel_values"]) == 3 * looked_at["images"] and not batch["drop_condition"].any()
    rehearsed = trial.RehearsedDataset(dataset, [batch], 2)
    given = [rehearsed[number]["keys"][0] == "the largest sample" for number in range(6)]
    assert given == [False, False, True, False, False, False]


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_count_is_that_of_the_stage_itself(make_config, model, stage):
    config = make_config(stage, ema_decay=0.9)
    built = build_run(stage, config).stage
    sizes = Sizes.of_folder(stage, model)
    cost = count(config, sizes, Shape(20, 0 if stage == "align" else 1, 64))
    models = (built, *built.frozen_models)
    assert cost.trained == sum(parameter.numel() for parameter in trained_parameters(built))
    assert cost.weights == sum(parameter.nbytes for each in models for parameter in each.parameters())
    assert cost.parts(config)["moments"] == 8 * cost.trained == 2 * cost.parts(config)["average"]
    assert cost.kept > 1000 and cost.operations > 0 and cost.fixed < 0.01 * cost.weights
    saved = count(config.replace(gradient_checkpointing=True), sizes, Shape(20, 0, 64))
    assert saved.kept < cost.kept or stage == "align"
    eight = cost.memory(config) - cost.memory(config.replace(optimizer="adamw8bit"))
    assert eight == 6 * cost.trained


def counted_only(monkeypatch, first):
    """Trials that take no time; the first one gives `first`. Returns the list of settings that were tried."""
    tried = []

    def try_apart(config):
        tried.append(config)
        return first if len(tried) == 1 else {"step_seconds": 1.0, "peak": 2**20}

    monkeypatch.setattr(rehearsing, "_try_apart", try_apart)
    return tried


def test_where_memory_is_short_settings_that_fit_are_tried(make_config, model, monkeypatch):
    config = make_config("align", batch_size=8, accumulation=1)
    largest = {
        "tokens": 40,
        "images": 0,
        "mean_tokens": 20,
        "mean_images": 0,
        "shown": [],
        "samples": 60,
        "left_out": {},
        "looked_at": 60,
    }
    figures = FIGURES | {"sources": [{"name": "captions", **largest}], "parts": {}, "notes": []}
    figures |= {"fastest_step": 1.0, "slowest_step": 1.0, "read_back_seconds": 1.0}
    cost = count(config, Sizes.of_folder("align", model), Shape(40, 0, 0))
    most, least = (cost.memory(config.replace(batch_size=size)) / 0.75 / GIB for size in (8, 1))
    tried = counted_only(monkeypatch, figures)
    short = rehearse("align", config, for_memory=(most + least) / 2)
    assert 0 < short.operations < short.cost.operations
    assert short.is_short and [proposal.changes for proposal in short.proposals] == [
        {name: value for name, value in vars(settings).items() if value != getattr(config, name)}
        for settings in tried[1:]
    ]
    assert short.proposals[0].changes == {"batch_size": 4, "accumulation": 2}
    assert short.proposals[-1].changes["optimizer"] == "adamw8bit"
    for proposal in short.proposals:
        changed = config.replace(**proposal.changes)
        assert proposal.counted <= short.for_memory * GIB and changed.batch_size * changed.accumulation == 8
    text = describe(short)
    assert (
        "runs out: memory: " in text and "settings that fit, tried: --batch-size 4 --accumulation 2 (" in text
    )
    short.proposals.clear()
    assert "No settings were found that fit" in describe(short)


def test_trial_that_runs_out_of_memory_is_told_and_counted(make_config, monkeypatch):
    error = {"error": "CUDA out of memory. Tried to allocate 20 GiB.", "memory": True}
    tried = counted_only(monkeypatch, error)
    found = rehearse("align", make_config("align", batch_size=4), for_memory=24)
    assert "The trial ran out of memory: CUDA out of memory" in describe(found)
    assert len(found.proposals) == len(tried) - 1 == 3


def as_in_another_process(command, **options):
    *_, settings, result = command
    assert trial.main(str(settings), str(result)) == 0
    return SimpleNamespace(returncode=0, stderr="")


def test_command(make_config, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    monkeypatch.setattr(rehearsing.subprocess, "run", as_in_another_process)
    config = make_config("align")
    flags = [
        "--model",
        config.model,
        "--output",
        config.output,
        "--steps",
        "300",
        "--workers",
        "0",
        "--batch-size",
        "2",
    ]
    assert (
        cli.main(
            [
                "train",
                "align",
                *flags,
                "--data",
                *config.data,
                "--rehearse",
                "--pages",
                str(tmp_path / "pages"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        out.startswith("align on cpu, tried in a temporary folder") and "run: 300 steps, 600 samples" in out
    )
    assert cli.main(["train", "align", *flags, "--data", "shards:/nowhere", "--rehearse"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert cli.main(["train", "align", *flags, "--for-memory", "24"]) == 2
    assert "It belongs to --rehearse" in capsys.readouterr().err
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("code", "memory", "words"), [(-9, True, "main memory is full"), (1, False, "early: the last line")]
)
def test_trial_that_ends_without_a_word(make_config, monkeypatch, code, memory, words):
    done = SimpleNamespace(returncode=code, stderr="Traceback\nthe last line\n")
    monkeypatch.setattr(rehearsing.subprocess, "run", lambda command, **options: done)
    figures = rehearsing._try_apart(make_config("align"))
    assert figures["memory"] is memory and words in figures["error"]


@pytest.mark.slow
def test_trial_in_a_process_of_its_own(make_config):
    found = rehearse("align", make_config("align", workers=1))
    assert found.figures["step_seconds"] > 0 and 2**26 < found.figures["peak"]
    assert found.figures["step_cpu_seconds"] > 0


FIGURES = {
    "device": "cpu",
    "processes": 1,
    "steps": 10,
    "step_seconds": 1.0,
    "read_seconds": 0.1,
    "peak": 2**30,
    "checkpoint": 10 * 2**20,
    "decoder": 2**20,
    "save_seconds": 2.0,
    "sheet_seconds": None,
    "batch": 2**20,
    "sources": [{"name": "captions", "samples": 100, "left_out": {}, "looked_at": 64}],
}


def problems_of(figures=(), **settings):
    config = TrainConfig.from_dict({"workers": 2, "steps": 100, "save_every": 50, **settings}, "align")
    found = rehearsing.Rehearsal(config, FIGURES | dict(figures))
    return " ".join(report.find_problems(found)), found


def test_what_runs_out_is_named_with_the_setting_to_change(monkeypatch):
    monkeypatch.setattr(report, "free_bytes", lambda path: 31 * 2**20)
    said, found = problems_of()
    assert not said and report.disk_need(found) == 31 * 2**20
    assert found.run_seconds == 100 * 1.0 + 2 * 2.0
    said, found = problems_of(keep_checkpoints=3)
    assert said.startswith("disk: 41.0 MiB of 31.0 MiB free. Pass a smaller --keep-checkpoints")
    said, found = problems_of({"read_seconds": 4.0})
    assert said.startswith("data: 2 workers need 2 s for a step that is computed in 1 s. Pass more --workers")
    assert found.run_seconds == 100 * 2.0 + 2 * 2.0
    left_out = [{"name": "captions", "samples": 100, "left_out": {"long": 30}, "looked_at": 64}]
    assert problems_of({"sources": left_out})[0].startswith(
        "samples of captions: 30 of the first 64 are left out"
    )
    monkeypatch.setattr(report, "machine_memory", lambda: 2**30)
    assert problems_of()[0].startswith("main memory: 1.00 GiB of 1.00 GiB. Pass a smaller --batch-size")
    monkeypatch.setattr(report.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
    assert "shared memory: 2 workers hold up to 4.0 MiB" in problems_of()[0]


def test_caches_are_counted_for_the_samples_that_the_run_reads(monkeypatch):
    _, found = problems_of({"cache_entries": 20, "cache_bytes": 2**20}, batch_size=2, steps=30, cache="there")
    assert report.cache_need(found) == 2**20 * 60 / 20
    _, found = problems_of(
        {"cache_entries": 20, "cache_bytes": 2**20}, batch_size=2, steps=1000, cache="there"
    )
    assert report.cache_need(found) == 2**20 * 100 / 20
