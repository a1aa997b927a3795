import argparse
import json
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.commands import train as command
from kosmos_g_diffusers.training.config import STAGES, TrainConfig


def parse(*arguments):
    parser = argparse.ArgumentParser(prog="kosmos-g train")
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def show(capsys, *arguments):
    """The settings that a command line gives."""
    command.run(parse(*arguments, "--show"))
    return json.loads(capsys.readouterr().out)


# Forms -----------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_stage(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        'data = ["shards:a", "shards:b"]\ndata_weights = [1, 2]\nlr = 2e-4\nsteps = 7\ngradient_checkpointing = true\n'
    )
    given = show(
        capsys, "align", "--config", str(tmp_path / "run.toml"), "--lr", "1e-5", "--no-gradient-checkpointing"
    )
    assert given["stage"] == "align" and given["lr"] == 1e-5 and given["steps"] == 7
    assert given["data"] == ["shards:a", "shards:b"] and given["data_weights"] == [1.0, 2.0]
    assert given["gradient_checkpointing"] is False
    assert given["batch_size"] == 56  # the stage's
    assert given["adam_beta2"] == 0.98  # everybody's


def test_every_setting_is_a_flag_with_help(capsys):
    for stage in STAGES:
        with pytest.raises(SystemExit):
            parse(stage, "--help")
        text = capsys.readouterr().out
        for entry in fields(TrainConfig):
            assert ("--" + entry.name.replace("_", "-") in text) == (entry.name != "stage")
            assert entry.metadata["help"]
    assert "(default: 200000)" in text  # of instruct, the last
    assert "shards" in text or "tsv:captions" in text


def test_flags_of_every_type(capsys):
    flags = "--data a b --data-weights 1 2 --lr 1e-3 --steps 5 --tracker wandb --gradient-checkpointing"
    given = show(capsys, "pretrain", *flags.split())
    assert given["data"] == ["a", "b"] and given["data_weights"] == [1, 2] and given["tracker"] == "wandb"
    assert given["gradient_checkpointing"] is True


def test_saved_settings_are_read_back(tmp_path):
    config = TrainConfig.from_dict({"data": ["a"], "data_weights": [1]}, "instruct")
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    # of an earlier release, with fewer settings
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.1, "steps": 3}))
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig(lr=0.1, steps=3)


def test_defaults_are_those_of_the_paper():
    align, instruct = (TrainConfig.from_dict({}, name) for name in ("align", "instruct"))
    assert (align.lr, align.steps, instruct.lr, instruct.steps) == (1e-3, 300_000, 1e-3, 200_000)
    assert (align.adam_beta1, align.adam_beta2, align.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (align.weight_decay, align.warmup_steps, align.max_grad_norm) == (0.01, 375, 2.0)
    assert (instruct.condition_dropout, instruct.entity_dropout) == (0.1, 0.5)


# What is printed elsewhere ---------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "recipes").glob("*.toml")), ids=lambda path: path.stem
)
def test_recipes_are_settings(path):
    stage = path.stem.rpartition("_")[2]
    config = TrainConfig.from_toml(path, stage)
    text = path.read_text(encoding="utf-8")
    assert f"train {stage}" in text and f"--config examples/recipes/{path.name}" in text
    if batch := re.search(r"# x (?:8 x )?(\d+) = ([\d,]+)", text):  # processes x passes x samples
        processes = {"paper": 256, "one_node": 8, "one_gpu": 1}[path.stem.rpartition("_")[0]]
        assert processes * config.batch_size * config.accumulation == int(batch[2].replace(",", ""))


def commands(text):
    """Commands of kosmos-g in a text, as lists of arguments; those that accelerate launches as well."""
    text = re.sub(r"\\\n#?", " ", text)
    for line in re.findall(r"^(?:#? *)(?:.*-m kosmos_g_diffusers|kosmos-g) (.+)$", text, re.MULTILINE):
        yield shlex.split(line, comments=True)


def test_recipes_that_are_named_exist_and_commands_parse():
    """In the help, in the recipes and in the documentation."""
    texts = [command.__doc__, (ROOT / "docs" / "training.md").read_text(encoding="utf-8")]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "recipes").glob("*.toml")]
    parser, seen = cli.build_parser(), []
    for text in texts:
        for name in re.findall(r"examples/recipes/[\w./]+", text):
            assert (ROOT / name.rstrip(".")).exists(), name
        for words in commands(text):
            if "--help" not in words:
                parser.parse_args(words)
                seen.append(tuple(words[:2]))
    assert {("train", stage) for stage in STAGES} < set(seen) and len(seen) > 15


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("learning_rate = 1", ValueError, "run.toml has unknown settings: learning_rate"),
        ("stepz = 1", ValueError, r"stepz \(did you mean steps\?\)"),
        ("[train]\nlr = 1", ValueError, "unknown settings: train"),
        ("lr = '1e-4'", TypeError, r"run.toml: lr is '1e-4' \(str\). Expected float, such as lr = 0.001"),
        ("steps = 1.5", TypeError, r"steps is 1.5 \(float\). Expected int"),
        ("steps = true", TypeError, r"steps is True \(bool\). Expected int"),
        ("data = 'shards:x'", TypeError, "data is 'shards:x'. Expected a list of str values"),
        ("data_weights = ['a']", TypeError, r"data_weights is 'a' \(str\). Expected float"),
        ("gradient_checkpointing = 1", TypeError, "Expected bool"),
        (
            "mixed_precision = 'fp8'",
            ValueError,
            "mixed_precision is 'fp8'. Expected one of 'no', 'fp16', 'bf16'",
        ),
        ("lr = -1", ValueError, "lr is -1.0. Expected at least 0"),
        ("lr = nan", ValueError, "lr is nan"),
        ("lr = inf", ValueError, "lr is inf"),
        ("condition_dropout = 1.5", ValueError, "condition_dropout is 1.5. Expected 0 to 1"),
        ("batch_size = 0", ValueError, "batch_size is 0. Expected at least 1"),
        ("lr 1", ValueError, "run.toml is not TOML"),
        ("stage = 'instruct'", ValueError, "run.toml is for the stage 'instruct', and 'align' was asked for"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, line, error, words):
    path = tmp_path / "run.toml"
    path.write_text(line + "\n")
    with pytest.raises(error, match=words):
        TrainConfig.from_toml(path, "align")


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no configuration file at .*nowhere.toml"):
        TrainConfig.from_toml(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr abc", "argument --lr: invalid float value: 'abc'"),
        ("--steps 1.5", "argument --steps: invalid int value"),
        ("--mixed-precision fp8", "argument --mixed-precision: invalid choice"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
        ("--step 5", "unrecognized arguments: --step 5"),  # no guessing from beginnings
        ("--stage align", "unrecognized arguments"),
    ],
)
def test_mistakes_on_the_command_line_are_named(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("align", *flags.split())
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_value_out_of_range_on_the_command_line():
    with pytest.raises(ValueError, match="The command: lr is -1.0. Expected at least 0"):
        command.run(parse("align", "--lr", "-1"))


def test_settings_that_change_what_is_learned_are_kept(tmp_path):
    earlier = TrainConfig(lr=0.1, log_every=1, output="a")
    TrainConfig(lr=0.1, log_every=2, output="b", workers=7).check_resumes(earlier, "b")
    for name, value in asdict(TrainConfig(lr=0.2, seed=1, model="m", train_vision="all")).items():
        if value != getattr(earlier, name) and name not in ("log_every", "output"):
            with pytest.raises(ValueError, match=f"The run in b has other settings: {name} "):
                earlier.replace(**{name: value}).check_resumes(earlier, "b")


def test_file_of_settings_that_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match="config.json holds no settings of a run"):
        TrainConfig.load(tmp_path / "config.json")
