# ruff: noqa: F811  fixtures are imported, and used by the names of arguments
import json
import os
import shutil
import signal
import time

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.marks import DRAWN, term_of
from support.training_runs import (  # noqa: F401  fixtures
    FORK,
    data,
    fresh_accelerator,
    make_config,
    model,
    read_log,
    save_clip,
    train_stage,
    trained_weights,
)

from kosmos_g_diffusers import KosmosGPipeline, KosmosGTextEncoder, KosmosGTokenizer, cli, convert_checkpoint
from kosmos_g_diffusers.commands import train as command
from kosmos_g_diffusers.conversion.checkpoint import read_checkpoint
from kosmos_g_diffusers.conversion.target import load_target
from kosmos_g_diffusers.data import TooManyBadSamples
from kosmos_g_diffusers.training import TrainConfig, TrainingStopped, build_run, checkpoints, model_folder
from kosmos_g_diffusers.training.adapters import load_adapter, merge_adapter


@pytest.fixture
def prompts(tmp_path):
    """JSON file of two prompts, one with an image next to it."""
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "prompts.json").write_text('["a hat", [{"image": "red.png"}, "in the suit"]]')
    return str(tmp_path / "prompts.json")


def prompt_embeds(folder):
    pipe = KosmosGPipeline.from_pretrained(folder)
    return pipe.encode_prompt("a hat", do_classifier_free_guidance=False)[0]


# Checkpoints -----------------------------------------------------------------------------------------------------


def test_each_stage_starts_from_the_one_before_and_is_a_pipeline(
    make_config, model, monkeypatch, tmp_path, capsys
):
    """By the command line, as people do it."""
    monkeypatch.setattr(model_folder, "LINKED_SIZE", 2000)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    folder, embeds = model, [prompt_embeds(model)]
    for stage in ("pretrain", "align", "instruct"):
        config = make_config(stage, stage, model=str(folder))
        arguments = ["--model", config.model, "--data", *config.data, "--output", config.output]
        arguments += "--steps 2 --batch-size 3 --warmup-steps 1 --workers 0 --lr 0.01".split()
        assert cli.main(["train", stage, *arguments]) == 0
        folder = tmp_path / stage / "checkpoint-00000002"
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{stage}: ") and "2 steps of 3 samples" in lines[2]
        assert lines[-1] == str(folder)
        embeds.append(prompt_embeds(folder))
        for name in ("unet", "vae", "clip_text_encoder"):
            (one,), (other,) = (place.glob(f"{name}/*.safetensors") for place in (model, folder))
            assert os.path.samefile(one, other), "copied, not linked"
        assert TrainConfig.load(tmp_path / stage / "config.json").stage == stage
        card = (folder / "README.md").read_text()
        assert card.count("Trained further") == 1 and f"`kosmos-g train {stage}`" in card
        assert str(tmp_path) not in card
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(embeds, embeds[1:], strict=False))
    pipe = KosmosGPipeline.from_pretrained(folder)
    image = pipe("a hat", num_inference_steps=1).images[0]
    assert image.size == (64, 64)


def test_only_what_the_stage_trains_changes(make_config, model):
    before = load_file(model / "text_encoder" / "model.safetensors")
    checkpoint = train_stage(make_config("align", lr=0.01))
    after = load_file(checkpoint / "text_encoder" / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"aligner"}
    one, other = (load_file(place / "aligner_n/aligner_n.safetensors") for place in (model, checkpoint))
    assert not torch.equal(one["query_embeds"], other["query_embeds"])


def test_files_are_copied_where_they_cannot_be_linked(make_config, model, monkeypatch):
    def refuses(*args):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(model_folder, "LINKED_SIZE", 0)
    monkeypatch.setattr(os, "link", refuses)
    checkpoint = train_stage(make_config("align", steps=1))
    (one,), (other,) = (place.glob("unet/*.safetensors") for place in (model, checkpoint))
    assert one.read_bytes() == other.read_bytes() and not os.path.samefile(one, other)


def test_resumed_run_ends_with_the_same_bits(make_config, monkeypatch):
    changes = {"steps": 5, "save_every": 2, "lr": 0.01, "ema_decay": 0.9, "batch_size": 4}
    whole = train_stage(make_config("instruct", "whole", **changes))
    config = make_config("instruct", "parts", **changes)
    run = build_run("instruct", config)
    dataset_class, read = type(run.dataset), type(run.dataset).__getitem__

    def dies(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return read(self, step)

    monkeypatch.setattr(dataset_class, "__getitem__", dies)
    with pytest.raises(KeyboardInterrupt):
        train_stage(config)
    monkeypatch.setattr(dataset_class, "__getitem__", read)
    resumed = train_stage(config)
    for name in ("training_state/trained.safetensors", "text_encoder/model.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_command_with_a_checkpoint(make_config, monkeypatch, tmp_path, number, capfd):
    config = make_config("align", steps=5000, save_every=5000)
    config.save(tmp_path / "settings.json")
    values = json.loads((tmp_path / "settings.json").read_text())
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    monkeypatch.setattr(cli, "COMMANDS", (command,))

    def child():
        AcceleratorState._reset_state()
        raise SystemExit(cli.main(["train", "align", "--config", str(tmp_path / "run.toml")]))

    process = FORK.Process(target=child)
    process.start()
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    (checkpoint,) = checkpoints.list_checkpoints(config.output)
    assert 0 < checkpoints.read_progress(checkpoint)["step"] < 5000
    said = capfd.readouterr()
    assert (
        f"Stopped by {number.name} at step" in said.err
        and f"saved in {checkpoint}. The same command" in said.err
    )
    assert str(checkpoint) not in said.out.splitlines()  # the last line of a run that is done
    prompt_embeds(checkpoint)


# What is computed ------------------------------------------------------------------------------------------------


def test_sample_sheets_leave_no_trace(make_config, prompts):
    changes = {"lr": 0.01, "ema_decay": 0.5}
    without = train_stage(make_config("instruct", "without", **changes))
    config = make_config("instruct", "with", sample_every=2, sample_prompts=prompts, **changes)
    drawn = train_stage(config)
    for name in ("training_state/trained.safetensors", "text_encoder/model.safetensors"):
        assert (without / name).read_bytes() == (drawn / name).read_bytes()
    states = [
        torch.load(path / "training_state" / "random_states_0.pkl", weights_only=False)
        for path in (without, drawn)
    ]
    assert torch.equal(*(state["torch_manual_seed"] for state in states))
    sheet = PIL.Image.open(f"{config.output}/samples/step-00000002.png")
    assert sheet.size == (128, 64)  # two prompts
    assert term_of(sheet.filename) == DRAWN


def test_sample_sheet_is_what_the_pipeline_draws(make_config, prompts, tmp_path):
    from diffusers import DPMSolverMultistepScheduler

    config = make_config("align", steps=2, sample_every=2, sample_prompts=prompts, lr=0.01)
    pipe = KosmosGPipeline.from_pretrained(train_stage(config))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    drawn = pipe(
        "<i> in the suit",
        images=[tmp_path / "red.png"],
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    sheet = PIL.Image.open(f"{config.output}/samples/step-00000002.png").crop((64, 0, 128, 64))
    assert np.abs(np.asarray(sheet, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1


def test_gradient_checkpointing_gives_the_same_losses(make_config):
    plain, less = (
        make_config("instruct", "plain"),
        make_config("instruct", "less", gradient_checkpointing=True),
    )
    one, two = trained_weights(train_stage(plain)), trained_weights(train_stage(less))
    for line, other in zip(read_log(plain.output), read_log(less.output), strict=True):
        assert np.isclose(line["denoising"], other["denoising"], rtol=1e-6)
        assert np.isclose(line["grad_norm"], other["grad_norm"], rtol=1e-5)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_half_precision(make_config, stage):
    exact, half = (
        make_config(stage, "exact", steps=2),
        make_config(stage, "half", steps=2, mixed_precision="bf16"),
    )
    train_stage(exact)
    AcceleratorState._reset_state()
    checkpoint = train_stage(half)
    assert all(weight.dtype == torch.float32 for weight in trained_weights(checkpoint).values())
    losses = [
        [
            sum(line[name] for name in line if name in ("language", "mse", "rec", "denoising"))
            for line in read_log(config.output)
        ]
        for config in (exact, half)
    ]
    assert np.allclose(*losses, rtol=0.03) and losses[0] != losses[1]


def test_accumulated_alignment_is_that_of_the_larger_batch(make_config):
    """Passes of a step pad to the longest prompt of them all, as the larger batch does."""
    changes = {"steps": 6, "lr": 5e-3, "bucket_window": 1}
    whole = trained_weights(train_stage(make_config("align", "whole", batch_size=6, **changes)))
    passes = make_config("align", "passes", batch_size=2, accumulation=3, **changes)
    given = trained_weights(train_stage(passes))
    before = build_run("align", make_config("align", "before")).stage.state_dict()
    assert max((tensor - before[name]).abs().max() for name, tensor in whole.items()) > 0.005
    for name, expected in whole.items():
        torch.testing.assert_close(given[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", [False, True])
def test_cached_run_learns_the_same(make_config, data, tmp_path, words):
    changes = {"words": [f"shards:{data}"], "words_share": 0.5, "steps": 6} if words else {}
    plain = make_config("instruct", "plain", **changes)
    expected_weights = trained_weights(train_stage(plain))
    assert {"language" in line for line in read_log(plain.output)} == ({False, True} if words else {False})
    for output in ("first", "second"):
        config = make_config("instruct", output, cache=str(tmp_path / "frozen"), **changes)
        said = []
        cached = trained_weights(train_stage(config, announce=said.append))
        for name, expected in expected_weights.items():
            torch.testing.assert_close(cached[name], expected, atol=1e-5, rtol=0)
    assert " 0 computed" in said[-1]


# Adapters --------------------------------------------------------------------------------------------------------


def test_adapter_run(make_config, model, monkeypatch, capsys):
    config = make_config("instruct", lora_rank=16, lr=0.05, steps=4, save_every=2, keep_checkpoints=1)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    arguments = [
        "--model",
        config.model,
        "--data",
        *config.data,
        "--output",
        config.output,
        "--lora-rank",
        "16",
    ]
    arguments += "--lr 0.05 --steps 4 --save-every 2 --keep-checkpoints 1".split()
    arguments += "--batch-size 3 --warmup-steps 1 --workers 0 --log-every 1".split()
    assert cli.main(["train", "instruct", *arguments]) == 0
    checkpoint = checkpoints.checkpoint_folder(config.output, 4)
    assert capsys.readouterr().out.splitlines()[-1] == str(checkpoint)
    assert sorted(os.listdir(checkpoint)) == ["adapter", "training_state"]
    before = prompt_embeds(model)
    pipe = KosmosGPipeline.from_pretrained(model)
    load_adapter(pipe, checkpoint)
    adapted = pipe.encode_prompt("a hat", do_classifier_free_guidance=False)[0]
    assert (adapted - before).abs().max() > 1e-3
    merge_adapter(pipe)
    merged = pipe.encode_prompt("a hat", do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-4)
    pipe.save_pretrained(checkpoint.parent.parent / "merged")
    assert torch.equal(prompt_embeds(checkpoint.parent.parent / "merged"), merged)
    shutil.rmtree(checkpoint)
    assert train_stage(config) == checkpoint  # from nothing, or nearly: the seed decides
    pipe = KosmosGPipeline.from_pretrained(model)
    load_adapter(pipe, checkpoint)
    assert torch.equal(pipe.encode_prompt("a hat", do_classifier_free_guidance=False)[0], adapted)


def test_adapter_run_in_half_precision_with_sheets(make_config, prompts):
    config = make_config(
        "instruct", lora_rank=2, mixed_precision="bf16", sample_every=2, sample_prompts=prompts, steps=2
    )
    train_stage(config)
    assert PIL.Image.open(f"{config.output}/samples/step-00000002.png").size == (128, 64)


# An official checkpoint ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(reference, golden_encoder, tmp_path_factory):
    """The golden alignment-stage checkpoint as `kosmos-g convert` writes it, with made-up pieces of the official number."""
    place = tmp_path_factory.mktemp("converted")
    pieces = [("▁", -1.0), *((f"▁{letter}", -2.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces += [(f"▁piece{number}", -9.0) for number in range(63997 - len(pieces))]
    KosmosGTokenizer.from_vocabulary(pieces).save_pretrained(place / "tokenizer")
    return convert_checkpoint(
        reference / "tiny_reference_checkpoint.pt",
        place / "model",
        tokenizer=place / "tokenizer",
        base=reference / "tiny_stable_diffusion",
        config=golden_encoder.config,
    )


def test_alignment_continues_from_an_official_checkpoint(make_config, converted, reference, tmp_path):
    """Both AlignerNets are the checkpoint's, and N stays next to the model."""
    config = make_config(
        "align", model=str(converted), target=str(tmp_path / "clip"), steps=2, warmup_steps=1
    )
    save_clip(tmp_path / "clip", width=24)
    run = build_run("align", config)
    assert run.notes == []
    weights, official = run.stage.state_dict(), read_checkpoint(reference / "tiny_reference_checkpoint.pt")
    for ours, theirs in (
        ("aligner_n.query_embeds", "aligner.decoder_query"),
        ("aligner_n.output_projection.weight", "aligner.decoder_proj.output_projection.weight"),
        ("text_encoder.aligner.query_embeds", "aligner.encoder_query"),
    ):
        assert torch.equal(weights[ours], official[theirs]), ours
    checkpoint = train_stage(config)
    kept, before = (load_file(place / "aligner_n/aligner_n.safetensors") for place in (checkpoint, converted))
    assert kept.keys() == before.keys() and not torch.equal(kept["query_embeds"], before["query_embeds"])
    # names no target: it is kept
    again = build_run("align", make_config("align", "again", model=str(checkpoint)))
    assert torch.equal(again.stage.state_dict()["aligner_n.query_embeds"], kept["query_embeds"])


# Another decoder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_decoder(tmp_path_factory):
    """A Stable Diffusion whose conditions are 48 wide and 20 long."""
    folder = tmp_path_factory.mktemp("other")
    save_clip(folder, width=48, positions=20)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_same_model_is_aligned_to_another_decoder(make_config, other_decoder):
    said = []
    config = make_config("align", target=str(other_decoder), save_every=2)
    checkpoint = train_stage(config, announce=said.append)
    assert "77 states of width 32 is replaced by a new one, for the target's 20 of width 48" in said[0]
    pipe = KosmosGPipeline.from_pretrained(checkpoint)
    assert pipe.text_encoder.config.num_queries == 20 and pipe.unet.config.cross_attention_dim == 48
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe("a hat", num_inference_steps=1).images[0].size == (8, 8)
    target, _ = load_target(checkpoint)
    assert target.config.hidden_size == 48
    # resumed, and on to the next stages without naming the target again
    shutil.rmtree(checkpoint)
    assert train_stage(config) == checkpoint
    train_stage(make_config("align", "again", model=str(checkpoint), steps=1))
    train_stage(make_config("instruct", "next", model=str(checkpoint), steps=1))


def test_target_of_text_encoder_alone_keeps_the_decoder(make_config, model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    for name in ("clip_text_encoder", "clip_tokenizer", "aligner_n"):
        shutil.rmtree(plain / name)
    with pytest.raises(ValueError, match="has no clip_text_encoder. Pass --target with the Stable Diffusion"):
        build_run("align", make_config("align", "none", model=str(plain)))
    save_clip(tmp_path / "clip")
    said = []
    config = make_config("align", model=str(plain), target=str(tmp_path / "clip"), steps=1)
    checkpoint = train_stage(config, announce=said.append)
    assert "no AlignerNet N" in said[0]
    assert KosmosGPipeline.from_pretrained(checkpoint).unet.config.cross_attention_dim == 32
    assert (checkpoint / "clip_text_encoder").is_dir() and (checkpoint / "aligner_n").is_dir()
    save_clip(tmp_path / "wide", width=48)
    with pytest.raises(ValueError, match="has no U-Net, and that of .* width 32, not 48"):
        build_run("align", make_config("align", "new", target=str(tmp_path / "wide")))


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("align", {"model": ""}, "No model was given. Pass --model"),
        ("align", {"data": []}, "No data was given. Pass --data"),
        ("align", {"data": ["shards:/nowhere"]}, "nowhere"),
        ("align", {"data": ["web:x"]}, "not a source of training data"),
        ("align", {"data_weights": [1, 2]}, "2 weights were given for 1 sources"),
        ("instruct", {"target": "x"}, "target is 'x', which only the stage align has"),
        ("align", {"lora_rank": 4}, "lora_rank is 4, which only the stage instruct has"),
        ("pretrain", {"resolution": 64}, "resolution is 64, which only the stage instruct has"),
        ("align", {"words": ["shards:x"]}, "words is .*, which only the stage instruct has"),
        ("instruct", {"words": ["shards:/nowhere"]}, "nowhere"),
        ("instruct", {"resolution": 63}, "resolution=63 was given. Expected a multiple"),
        ("align", {"sample_every": 5}, "no prompts to draw. Pass --sample-prompts FILE"),
        ("align", {"sample_every": 5, "sample_prompts": "/nowhere.json"}, "cannot be read as JSON"),
    ],
)
def test_settings_that_do_not_work(make_config, stage, changes, words):
    with pytest.raises(ValueError, match=words):
        build_run(stage, make_config(stage, **changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds no list of prompts"),
        ("{}", "holds no list of prompts"),
        ('[{"image": 3}]', "Prompt 0 of .* Expected strings and objects"),
        ('["a", [{"image": "nowhere.png"}]]', "sample prompt 1.*nowhere.png"),
        ('["<b> here"]', "names no image word"),
    ],
)
def test_sample_prompts_that_cannot_be_drawn(make_config, tmp_path, text, words):
    (tmp_path / "prompts.json").write_text(text)
    config = make_config("instruct", sample_every=1, sample_prompts=str(tmp_path / "prompts.json"))
    with pytest.raises(ValueError, match=f"(?i){words}"):
        build_run("instruct", config)


def test_folders_that_are_not_a_model(make_config, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-00000005").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="is the folder of a run. Pass one of its checkpoints, such as .*00000005"
    ):
        build_run("align", make_config("align", "new", model=str(run)))
    (run / "checkpoint-00000005" / "adapter").mkdir()
    with pytest.raises(
        ValueError, match="holds an adapter, not a model.*kosmos-g train merge --adapter .* --model"
    ):
        build_run("align", make_config("align", "new", model=str(run / "checkpoint-00000005")))
    with pytest.raises(ValueError, match="holds no text_encoder/config.json"):
        build_run("align", make_config("align", "new", model=str(tmp_path)))
    with pytest.raises(ValueError, match="is not a folder, and not on the Hub"):
        build_run("align", make_config("align", "new", model="nobody/nothing"))


def test_model_with_a_weight_missing_is_refused(make_config, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    del weights["aligner.query_embeds"]
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="The text_encoder of .*: 1 weights .*such as aligner.query_embeds"):
        build_run("align", make_config("align", model=str(folder)))


def test_run_of_another_stage_is_refused(make_config, monkeypatch, capsys):
    config = make_config("align", steps=1)
    train_stage(config)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    arguments = ["--model", config.model, "--data", *config.data, "--output", config.output]
    arguments += "--steps 1 --batch-size 3 --warmup-steps 1".split()
    assert cli.main(["train", "instruct", *arguments]) == 2
    assert "other settings: stage (was 'align', now 'instruct')" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [TooManyBadSamples, TrainingStopped])
def test_command_says_why_it_stopped(make_config, monkeypatch, capsys, kind):
    def stops(*args, **kwargs):
        raise kind("5 of 100 samples\n  row: 5")

    monkeypatch.setattr("kosmos_g_diffusers.training.run.run_stage", stops)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "align"])
    assert stopped.value.code == 2
    assert "kosmos-g: stopped: 5 of 100 samples\n  row: 5" in capsys.readouterr().err
    with pytest.raises(kind):
        cli.main(["--traceback", "train", "align"])


def test_model_on_the_hub(make_config, model, monkeypatch):
    def download(repo_id, allow_patterns):
        assert (repo_id, allow_patterns) == ("me/mine", None)
        return str(model)

    monkeypatch.setattr("kosmos_g_diffusers.conversion.folder.snapshot_download", download)
    run = build_run("pretrain", make_config("pretrain", model="me/mine"))
    assert isinstance(run.stage.text_encoder, KosmosGTextEncoder)


def test_a_warm_up_longer_than_the_run_is_said_at_the_start(make_config):
    said = []
    train_stage(make_config("align", steps=2, warmup_steps=375, lr=1e-3), announce=said.append)
    assert (
        "warm-up of 375 steps is longer than the run of 2" in said[0]
        and "ends at 2.7e-06 and never" in said[0]
    )
    line = read_log(make_config("align").output)[-1]
    assert line["lr"] <= 1e-3 * 2 / 375
    said.clear()
    train_stage(make_config("align", output="enough", steps=3, warmup_steps=2), announce=said.append)
    assert "warm-up" not in said[0]
