"""`--memory`: what is counted, against real modules; what is chosen, with stand-ins for a device's memory."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch.distributed._tools.mem_tracker import MemTracker

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTextEncoderConfig
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.environment import free_memory
from kosmos_g_diffusers.generation import generate as generation
from kosmos_g_diffusers.generation import memory
from kosmos_g_diffusers.generation.generate import load_pipeline
from kosmos_g_diffusers.generation.memory import (
    BY_LAYER,
    FIRST,
    GIB,
    TOGETHER,
    UNET_STATES,
    VAE_STATES,
    count,
    plan_memory,
)
from kosmos_g_diffusers.generation.png import read_settings
from kosmos_g_diffusers.generation.settings import ControlInput, GenerationSettings, InputImage
from kosmos_g_diffusers.quantization import has_library
from kosmos_g_diffusers.serving.models import Models
from kosmos_g_diffusers.testing import build_tiny_pipeline

STABLE_DIFFUSION = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def numbers(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder of the released size: configs, and files of weights that are headers before a hole; and the models, empty."""
    folder = tmp_path_factory.mktemp("released")
    with torch.device("meta"):
        models = {
            "text_encoder": KosmosGTextEncoder(KosmosGTextEncoderConfig()),
            "unet": UNet2DConditionModel(**STABLE_DIFFUSION),
            "vae": AutoencoderKL(**VAE),
        }
        models["controlnet"] = ControlNetModel(cross_attention_dim=768)
    for name, model in models.items():
        (folder / name).mkdir()
        if name == "text_encoder":
            model.config.save_pretrained(folder / name)
        else:
            model.save_config(folder / name)
        header, end = {}, 0
        for key, weight in model.named_parameters():
            begin, end = end, end + 2 * weight.numel()
            header[key] = {"dtype": "F16", "shape": list(weight.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with open(folder / name / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "lora.safetensors").write_bytes(b"")
    with open(folder / "lora.safetensors", "wb") as file:
        file.truncate(2**27)
    return folder, models


@pytest.fixture
def asked(released):
    """Two images, a ControlNet and a LoRA at 512 pixels on a GPU."""
    folder, _ = released
    picture = InputImage("a.png", "0" * 64)
    return GenerationSettings(
        "<i> by <i>",
        images=(picture, picture),
        controls=(ControlInput("canny", picture),),
        lora=str(folder / "lora.safetensors"),
        model=str(folder),
        dtype="float16",
        device="cuda",
    )


def chosen(plan):
    return plan.quantize, plan.encode, plan.offload


# What is counted -----------------------------------------------------------------------------------------------------


def test_weights_of_the_released_size_are_those_of_its_modules(released, asked):
    folder, models = released
    counts = count(folder, asked, "float16")
    assert counts.encoder == 2 * numbers(models["text_encoder"])
    assert counts.unet == 2 * numbers(models["unet"]) + 2**27
    assert counts.vae == 2 * numbers(models["vae"])
    # without its file, from the U-Net: its own layers that read control images are left out
    assert counts.controlnets == pytest.approx(2 * numbers(models["controlnet"]), rel=0.06)
    assert counts.layer == 2 * models["text_encoder"].get_input_embeddings().weight.numel()
    assert count(folder, asked, "float32").encoder == 2 * counts.encoder


def alive(model, *inputs):
    """The most bytes of states that are alive at once in a forward, by torch's own tracker."""
    tracker = MemTracker()
    tracker.track_external(model)
    with torch.no_grad(), tracker:
        model(*inputs)
    found = next(of for device, of in tracker.get_tracker_snapshot("peak").items() if device.type == "cpu")
    total = next(value for kind, value in found.items() if "Total" in str(kind))
    return total - sum(weight.nbytes for weight in model.parameters())


def test_states_of_the_unet_and_the_vae_are_those_that_live_at_once():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8
    )
    states = alive(unet, torch.randn(2, 4, 32, 32), torch.tensor(1), torch.randn(2, 77, 64))
    assert states == pytest.approx(UNET_STATES * 32 * 32 * 32 * 2 * 4, rel=0.1)
    vae = AutoencoderKL(**{**VAE, "block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8})
    vae.forward = lambda latents: vae.decode(latents)
    states = alive(vae, torch.randn(1, 4, 16, 16))
    assert states == pytest.approx(VAE_STATES * 64 * 128 * 128 * 4, rel=0.1)


def test_size_batch_and_guidance_count(released, asked):
    folder, _ = released
    small = count(folder, asked, "float16")
    large = count(folder, replace(asked, height=1024, width=1024), "float16", batch=3)
    assert large.decoding == 4 * small.decoding and large.denoising == 12 * small.denoising
    assert large.encoding == 3 * small.encoding
    assert 2 * count(folder, replace(asked, guidance=1.0), "float16").denoising == small.denoising


def test_unet_of_its_own_is_counted_by_its_folder_and_that_of_a_file_as_the_models(released, asked, tmp_path):
    folder, _ = released
    plain = count(folder, asked, "float16")
    small = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8, norm_num_groups=8
    )
    small.save_pretrained(tmp_path / "sd" / "unet")
    for place in (tmp_path / "sd", tmp_path / "sd" / "unet"):
        found = count(folder, replace(asked, unet=str(place)), "float16")
        assert found.unet == 2 * numbers(small) + 2**27 and found.controlnets < plain.controlnets
    # a whole checkpoint, as fine-tunes are shared
    weights = {f"model.diffusion_model.{name}": weight for name, weight in small.state_dict().items()}
    save_file({**weights, "cond_stage_model.weight": torch.zeros(2**20)}, tmp_path / "whole.safetensors")
    assert count(folder, replace(asked, unet=str(tmp_path / "whole.safetensors")), "float16") == plain


def test_unet_that_draws_no_squares(released, asked, tmp_path):
    folder = shutil.copytree(released[0], tmp_path / "model", copy_function=os.link)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": [64, 96]}))
    wide, square = count(folder, asked, "float16"), count(released[0], asked, "float16")
    assert 2 * wide.denoising == 3 * square.denoising


# What is chosen ------------------------------------------------------------------------------------------------------


def test_aim_two_images_a_controlnet_and_a_lora_within_3_8_gib_in_half_precision(asked):
    plan = plan_memory(asked, int(3.8 * GIB), encodes_first=True)
    assert chosen(plan) == ("none", FIRST, "none") and plan.peak <= 3.8 * GIB
    assert plan.applied_to(asked) == asked  # nothing of the image changes


@pytest.mark.parametrize(
    ("gib", "encodes_first", "expected"),
    [
        (24, True, ("none", TOGETHER, "none")),
        (5, True, ("none", FIRST, "none")),
        (5, False, ("none", TOGETHER, "model")),
        (3.2, True, ("none", BY_LAYER, "none")),
        (3.2, False, ("int8", TOGETHER, "model")),
        (1.5, True, ("none", TOGETHER, "sequential")),
    ],
)
def test_first_way_that_fits_is_taken(asked, monkeypatch, gib, encodes_first, expected):
    monkeypatch.setattr(memory, "has_library", lambda quantize: True)
    plan = plan_memory(asked, int(gib * GIB), encodes_first=encodes_first)
    assert chosen(plan) == expected and plan.peak <= gib * GIB and plan.dtype == "float16"


def test_int4_where_int8_does_not_fit_and_neither_where_its_library_is_missing(asked, monkeypatch):
    # without a ControlNet at 256 pixels the encoder is what is largest
    small = replace(asked, controls=(), lora=None, height=256, width=256)
    monkeypatch.setattr(memory, "has_library", lambda quantize: True)
    assert chosen(plan_memory(small, int(2.2 * GIB))) == ("int4", TOGETHER, "model")
    monkeypatch.setattr(memory, "has_library", lambda quantize: quantize == "none")
    assert chosen(plan_memory(small, int(2.2 * GIB))) == ("none", TOGETHER, "sequential")


@pytest.mark.parametrize("encodes_first", [True, False])
def test_weights_are_rounded_only_where_half_precision_fits_in_no_other_way(
    asked, monkeypatch, encodes_first
):
    monkeypatch.setattr(memory, "has_library", lambda quantize: True)
    for tenth in (8, 12, 20, 26, 28, 32, 36, 40, 60):
        budget = int(tenth / 10 * GIB)
        plan = plan_memory(asked, budget, encodes_first=encodes_first)
        if plan.quantize != "none":
            without = plan_memory(asked, budget, fixed=["quantize"], encodes_first=encodes_first)
            assert without.offload == "sequential" or without.peak > budget


@pytest.mark.parametrize("gib", [1, 3.2, 8])
def test_what_is_given_by_hand_stays(asked, gib):
    for given in (
        {"dtype": "float32"},
        {"offload": "model"},
        {"offload": "none"},
        {"offload": "sequential", "quantize": "int8"},
        {"quantize": "none"},
        {"quantize": "int4"},
    ):
        settings = replace(asked, **given)
        plan = plan_memory(settings, int(gib * GIB), fixed=given, encodes_first=True)
        for name, value in given.items():
            assert getattr(plan, name) == value
        assert plan.encode != BY_LAYER or "offload" not in given


def test_on_a_cpu_nothing_is_offloaded_and_bfloat16_comes_before_rounded_weights(asked, monkeypatch):
    monkeypatch.setattr(memory, "has_library", lambda quantize: True)
    settings = replace(asked, device="cpu", dtype="float32")
    found = []
    for gib in (14, 8, 6.7, 4, 2.9, 1):
        plan = plan_memory(settings, int(gib * GIB), encodes_first=True)
        found.append((plan.dtype, *chosen(plan)))
    assert found[:4] == [
        ("float32", "none", TOGETHER, "none"),
        ("float32", "none", FIRST, "none"),
        ("bfloat16", "none", TOGETHER, "none"),
        ("bfloat16", "none", FIRST, "none"),
    ]
    assert found[4][1] == "int8"
    assert "IT MAY NOT FIT" in str(plan)
    kept = plan_memory(settings, int(4 * GIB), fixed=["dtype"], encodes_first=True)
    assert kept.dtype == "float32"


def test_plan_is_told_in_one_line(asked):
    text = str(plan_memory(asked, int(3.2 * GIB), encodes_first=True))
    assert text.startswith("Memory: float16, prompts encoded layer by layer before the U-Net is loaded (")
    assert "3.2 GiB are free" in text and "--memory off" in text and "\n" not in text


# The flag ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """A stand-in for a GPU of 4 GiB."""
    monkeypatch.setattr(memory, "check_device", lambda device: None)
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * GIB)


def test_off_on_a_cpu_and_auto_on_an_accelerator(on_gpu):
    assert memory.find_budget(None, "cpu") is None
    assert memory.find_budget(None, "cuda:1") == memory.find_budget("auto", "mps") == 4 * GIB
    assert memory.find_budget("auto", "cpu") == 4 * GIB
    assert memory.find_budget("off", "cuda") is None
    assert memory.find_budget(3.5, "cuda") == 3.5 * GIB


def test_device_that_does_not_say_what_is_free(on_gpu, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert memory.find_budget(None, "mps") is None
    with pytest.raises(ValueError, match="does not say what is free. Pass --memory with a number"):
        memory.find_budget("auto", "mps")


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", "1e9", ""])
def test_other_values_are_refused(text, capsys):
    for command in (["generate", "a hat"], ["app"], ["evaluate", "sprites", "--output", "o"]):
        with pytest.raises(SystemExit):
            main([*command, "--memory", text])
        assert "expected auto, off, or GiB" in capsys.readouterr().err


def test_what_the_allocator_holds_without_a_tensor_in_it_is_free(monkeypatch):
    module = SimpleNamespace(
        mem_get_info=lambda device: (100, 1000),
        memory_reserved=lambda device: 70,
        memory_allocated=lambda device: 20,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    assert free_memory("cuda") == 150


def test_free_memory_of_the_machine_is_a_number_of_bytes():
    assert 2**20 < free_memory("cpu") < 2**50


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (32, 32), "teal").save("teal.png")
    build_tiny_pipeline().save_pretrained("kosmos-g")
    return tmp_path


def generate(*arguments, output="out.png"):
    drawn = ["a hat by <i>", "--image", "teal.png", "--model", "kosmos-g", "--seed", "1", "--steps", "1"]
    assert main(["generate", *drawn, "--force", "--output", output, *arguments]) == 0
    return PIL.Image.open(output).tobytes()


def budget_for(encode, **given):
    """GiB that a way to hold the tiny model needs, and not a byte more."""
    settings = GenerationSettings(
        "<i>", images=(InputImage("teal.png", "0" * 64),), model="kosmos-g", **given
    )
    return str(
        math.nextafter(count(Path("kosmos-g"), settings, settings.dtype).peak(encode, "none") / GIB, 1)
    )


def test_prompts_that_are_encoded_first_give_the_same_image(model, capsys, monkeypatch):
    expected = generate()
    assert "Memory:" not in capsys.readouterr().err
    loaded = []

    def load(settings, encoded=False):
        loaded.append(load_pipeline(settings, encoded))
        return loaded[-1]

    monkeypatch.setattr(generation, "load_pipeline", load)
    monkeypatch.setattr(memory, "RESERVE", 0)
    assert generate("--memory", budget_for(FIRST), output="first.png") == expected
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Memory:")]
    assert len(said) == 1 and "float32, prompts encoded before the U-Net is loaded" in said[0]
    assert loaded[0].text_encoder is None
    # maps need the encoder while they are drawn
    generate("--memory", budget_for(FIRST), "--maps", "--dtype", "float32", "--quantize", "none")
    assert loaded[1].text_encoder is not None


def test_encoder_that_is_there_a_layer_at_a_time_gives_the_same_condition(model, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    placed = []

    def place(pipe, device, offload):
        placed.append(offload)
        if (
            offload == "sequential"
        ):  # what diffusers does; its own name for a device means none for accelerate on a CPU
            accelerate.cpu_offload(pipe.text_encoder, torch.device("cpu"))

    monkeypatch.setattr(generation, "place", place)
    settings = GenerationSettings(
        "a hat by <i>", images=(InputImage.from_file("teal.png"),), model="kosmos-g"
    )
    whole, by_layer = (
        generation.encode_first(settings, ["teal.png"], by_layer=by_layer) for by_layer in (False, True)
    )
    assert placed == ["none", "sequential"]
    assert torch.equal(whole["prompt_embeds"], by_layer["prompt_embeds"])


def test_quantisation_is_recorded_and_drawn_again(model, capsys):
    if not has_library("int8"):
        pytest.skip("torchao is not installed, or too old")
    plain, rounded = generate(), generate("--quantize", "int8", output="int8.png")
    assert plain != rounded
    assert "quantize" not in read_settings("out.png").as_record()
    assert read_settings("int8.png").quantize == "int8"
    assert main(["generate", "--from", "int8.png", "--output", "again.png"]) == 0
    assert PIL.Image.open("again.png").tobytes() == rounded
    assert main(["generate", "--from", "int8.png", "--quantize", "none", "--output", "plain.png"]) == 0
    assert PIL.Image.open("plain.png").tobytes() == plain
    capsys.readouterr()
    assert (
        main(["generate", "--from", "int8.png", "--output", "int8.png", "--resume", "--quantize", "none"])
        == 2
    )
    assert "quantize is 'int8' in it and 'none' now" in capsys.readouterr().err


def test_resumed_run_keeps_the_weights_that_it_was_begun_with(model, capsys):
    drawn = ["generate", "a hat", "--model", "kosmos-g", "--steps", "1", "--num-images", "2"]
    rounded = (
        [("bfloat16", "int8")] if has_library("int8") else []
    )  # chosen by hand, where less is free it is by the plan
    for dtype, quantize in [("bfloat16", "none"), *rounded]:
        held = ["--dtype", dtype, "--quantize", quantize]
        assert main([*drawn, "--output", f"{quantize}.png", *held]) == 0
        expected = PIL.Image.open(f"{quantize}_1.png").tobytes()
        Path(f"{quantize}_1.png").unlink()
        capsys.readouterr()
        assert main([*drawn, "--output", f"{quantize}.png", "--resume", "--memory", "1000"]) == 0
        assert f"Memory: {dtype}" in capsys.readouterr().err
        assert PIL.Image.open(f"{quantize}_1.png").tobytes() == expected
        wrong = ["--resume", "--memory", "1000", "--dtype", "float32"]
        assert main([*drawn, "--output", f"{quantize}.png", *wrong]) == 2
        assert f"dtype is '{dtype}' in it and 'float32' now" in capsys.readouterr().err


def test_benchmark_that_is_resumed_keeps_the_dtype_that_it_was_begun_with(model, monkeypatch, capsys):
    from kosmos_g_diffusers.evaluation import run

    seen = []

    def begin(manifest, output, scorers, settings, **_):
        seen.append(settings["dtype"])
        replace(manifest, settings=settings, model={}, conditions={}).write(Path(output))

    monkeypatch.setattr(run, "evaluate", begin)
    command = ["evaluate", "sprites", "--count", "2", "--output", "run", "--memory"]
    Path("run").mkdir()
    assert main([*command, "1e-9", "--quantize", "none"]) == main([*command, "1000"]) == 0
    assert main([*command, "1000", "--dtype", "float32"]) == 0
    assert seen == ["bfloat16", "bfloat16", "float32"]


def test_app_holds_each_model_as_it_fits_and_says_so_in_its_images(model, on_gpu, monkeypatch):
    if not has_library("int8"):
        pytest.skip("torchao is not installed, or too old")
    monkeypatch.setattr(memory, "RESERVE", 0)
    models = Models(["kosmos-g"], device="cpu", memory_flag=1e-9)
    assert (models.dtype, models.quantize) == ("float32", "none")
    models.load()
    assert models.dtype == "bfloat16" and models.quantize in ("int8", "int4")  # what takes least
    assert models.pipe.text_encoder.hf_quantizer is not None
    plain = Models(["kosmos-g"], device="cpu")
    plain.load()
    assert (plain.dtype, plain.quantize) == ("float32", "none")
