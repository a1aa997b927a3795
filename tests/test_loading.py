"""Every part of every loader has the weights of its files or is refused with the file and the weight named."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from support.composing import name_in_a_single_file
from transformers import CLIPConfig, CLIPImageProcessor

import kosmos_g_diffusers
from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.captioning import load_answerer
from kosmos_g_diffusers.control.controls import load_controlnet
from kosmos_g_diffusers.generation.generate import draw_images, load_unet, prompt_arguments, size_arguments
from kosmos_g_diffusers.generation.settings import GenerationSettings
from kosmos_g_diffusers.loading import load_pretrained

FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "safety_checker": "model.safetensors",
    "controlnet": "diffusion_pytorch_model.safetensors",
}
# a weight of each, which every one of these faults is done to
WEIGHTS = {
    "text_encoder": "aligner.query_layers.0.ffn.fc1.weight",
    "unet": "mid_block.attentions.0.proj_in.weight",
    "vae": "decoder.conv_in.weight",
    "safety_checker": "visual_projection.weight",
    "controlnet": "controlnet_cond_embedding.conv_in.weight",
}


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


# name -> (what is done to the weights, given the name of one; what the message says of it)
FAULTS = {
    "missing": (lambda weights, name: weights.pop(name), "1 weights"),
    "another shape": (lambda weights, name: weights.update({name: weights[name][:1].clone()}), ""),
    "integers": (
        lambda weights, name: weights.update({name: weights[name].long()}),
        "1 weights are integers",
    ),
    "bytes": (lambda weights, name: weights.update({name: weights[name].byte()}), "1 weights are integers"),
    "foreign": (
        lambda weights, name: weights.update({f"{name}_2": weights[name].clone()}),
        "1 weights are not those",
    ),
    "NaN": (lambda weights, name: weights.update({name: nan(weights[name])}), "NaN or infinite"),
}


@pytest.fixture(scope="module")
def folder(build_pipe, build_controlnet, tmp_path_factory):
    """A pipeline with a ControlNet and a safety checker, saved."""
    pipe = build_pipe()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=8)
    )
    extractor = CLIPImageProcessor(size=32, crop_size=32)
    parts = {"safety_checker": checker, "feature_extractor": extractor}
    path = tmp_path_factory.mktemp("saved") / "model"
    controlnet = build_controlnet(pipe.unet)
    kosmos_g_diffusers.KosmosGControlNetPipeline.from_pipe(
        pipe, controlnet=controlnet, **parts
    ).save_pretrained(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """Function that copies the folder with a fault in a part, and returns the copy."""

    def make(part, fault):
        copied = tmp_path / "model"
        shutil.copytree(folder, copied)
        path = copied / part / FILES[part]
        weights = load_file(path)
        FAULTS[fault][0](weights, WEIGHTS[part])
        save_file(weights, path, metadata={"format": "pt"})
        return copied

    return make


def refused(load, *parts):
    """The message, which is one line and names all of `parts`."""
    with pytest.raises((OSError, ValueError)) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", FILES)
def test_a_part_with_other_weights_is_refused(broken, part, fault):
    model = broken(part, fault)
    load = kosmos_g_diffusers.KosmosGControlNetPipeline.from_pretrained
    refused(lambda: load(model), part, WEIGHTS[part], FAULTS[fault][1])


@pytest.mark.parametrize("name", [name for name in dir(kosmos_g_diffusers) if name.endswith("Pipeline")])
def test_every_class_refuses(broken, name):
    model = broken("vae", "missing")
    controlnet = {"controlnet": None} if "ControlNet" not in name else {}
    refused(
        lambda: getattr(kosmos_g_diffusers, name).from_pretrained(model, **controlnet), "vae", WEIGHTS["vae"]
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_loaders_of_a_single_part_refuse(broken, build_pipe, fault):
    like = build_pipe().unet
    unet = broken("unet", fault)
    for source in (unet, unet / "unet"):
        refused(lambda source=source: load_unet(source, like), "unet", WEIGHTS["unet"], FAULTS[fault][1])
    shutil.rmtree(unet)
    controlnet = broken("controlnet", fault) / "controlnet"
    refused(lambda: load_controlnet(controlnet), str(controlnet), WEIGHTS["controlnet"], FAULTS[fault][1])
    shutil.rmtree(controlnet.parent)
    encoder = broken("text_encoder", fault)
    refused(
        lambda: load_answerer(encoder, torch.float32, "cpu"),
        "text_encoder",
        WEIGHTS["text_encoder"],
        FAULTS[fault][1],
    )


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"foreign"}))
def test_single_file_of_a_unet_refuses(folder, build_pipe, tmp_path, layout, fault):
    like = build_pipe().unet
    weights, name = load_file(folder / "unet" / FILES["unet"]), WEIGHTS["unet"]
    FAULTS[fault][0](weights, name)
    if layout == "original":
        weights = {
            f"model.diffusion_model.{name_in_a_single_file(key)}": value for key, value in weights.items()
        }
    save_file(weights, tmp_path / "anime.safetensors")
    message = refused(
        lambda: load_unet(tmp_path / "anime.safetensors", like), "anime.safetensors", FAULTS[fault][1]
    )
    assert name in message or name_in_a_single_file(name) in message


def test_without_accelerate_nothing_is_random(broken, build_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.models.modeling_utils._LOW_CPU_MEM_USAGE_DEFAULT", False)
    monkeypatch.setattr("diffusers.models.modeling_utils.is_accelerate_available", lambda: False)
    model = broken("unet", "missing")
    refused(lambda: KosmosGPipeline.from_pretrained(model), "unet", WEIGHTS["unet"])


def test_shards_are_looked_at(folder, tmp_path):
    KosmosGPipeline.from_pretrained(folder).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loaded = KosmosGPipeline.from_pretrained(tmp_path / "model")
    assert loaded.unet is not None
    shard = sorted((tmp_path / "model" / "unet").glob("*.safetensors"))[1]
    weights = load_file(shard)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, shard, metadata={"format": "pt"})
    refused(lambda: KosmosGPipeline.from_pretrained(tmp_path / "model"), "unet", lost)


@pytest.mark.parametrize("name", ["fp16", None])
def test_the_file_of_the_variant_is_looked_at(broken, folder, name):
    model = broken("unet", "missing")
    file = model / "unet" / FILES["unet"]
    if name:
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
        shutil.copy(folder / "unet" / FILES["unet"], file)
        assert KosmosGPipeline.from_pretrained(model).unet is not None
    refused(lambda: KosmosGPipeline.from_pretrained(model, variant=name), WEIGHTS["unet"])


# What is not foreign -------------------------------------------------------------------------------------------------


def respelled_as_stable_diffusion_1_5(folder):
    """Give VAE and safety checker of a folder the names that stable-diffusion-v1-5 has."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae" / FILES["vae"]
    weights = {}
    for name, value in load_file(path).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        weights[name] = value
    assert any(".query." in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    path = folder / "safety_checker" / FILES["safety_checker"]
    weights = {}
    for name, value in load_file(path).items():
        if name.startswith("vision_model.") and not name.startswith("vision_model.vision_model."):
            name = f"vision_model.{name}"
        weights[name] = value
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, path, metadata={"format": "pt"})


def test_layout_of_stable_diffusion_1_5_loads(folder, tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    respelled_as_stable_diffusion_1_5(copied)
    expected, given = KosmosGPipeline.from_pretrained(folder), KosmosGPipeline.from_pretrained(copied)
    for part in ("vae", "safety_checker"):
        state = getattr(given, part).state_dict()
        assert all(
            torch.equal(state[name], value) for name, value in getattr(expected, part).state_dict().items()
        )


def test_what_does_no_harm_is_not_foreign(folder, tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    for part, extra in (
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv.weight"),
        ("text_encoder", "vision_model.model.embeddings.position_ids"),
        ("vae", "encoder.norm.num_batches_tracked"),
    ):
        path = copied / part / FILES[part]
        save_file(load_file(path) | {extra: torch.ones(1)}, path, metadata={"format": "pt"})
    KosmosGPipeline.from_pretrained(copied)


# Broken folders ------------------------------------------------------------------------------------------------------

DEEP = "[" * 10_000 + "]" * 10_000
HUGE_HEADER = (10**17).to_bytes(8, "little") + b"{}"
# file -> contents that it must not have
BROKEN = {
    "model_index.json": [
        "[]",
        "3",
        '"x"',
        DEEP,
        "{",
        '{"_class_name": 3}',
        '{"unet": 3}',
        '{"unet": ["diffusers"]}',
    ],
    "unet/config.json": [
        *("[]", "null", DEEP, "{"),
        {"block_out_channels": "wide"},
        {"block_out_channels": [-16, -32]},
        {"block_out_channels": 3},
        {"cross_attention_dim": "x"},
        {"attention_head_dim": 0},
        {"norm_num_groups": 7},
    ],
    "vae/config.json": ["[]", {"block_out_channels": []}, {"latent_channels": "four"}],
    "text_encoder/config.json": [
        *("[]", DEEP),
        {"text_config": []},
        {"text_config": {"embed_dim": "wide"}},
        {"text_config": {"layers": -1}},
        {"text_config": {"attention_heads": 0}},
        {"aligner_hidden_size": -3},
        {"image_words": 3},
        {"image_words": [["<dog>"]]},
        {"vision_config": {"patch_size": 0}},
    ],
    "scheduler/scheduler_config.json": ["[]", "{", {"beta_schedule": 3}, {"num_train_timesteps": "many"}],
    "tokenizer/tokenizer.json": ["{}", "[]", "{", '{"model": {}}'],
    "tokenizer/tokenizer_config.json": ["[]", "{"],
    "unet/diffusion_pytorch_model.safetensors": [
        b"",
        b"\0" * 7,
        HUGE_HEADER,
        b"\x02\0\0\0\0\0\0\0[]",
        100,
        5000,
    ],
    "text_encoder/model.safetensors": [b"", HUGE_HEADER, 100, 5000],
}


@pytest.mark.parametrize(
    "file, content", [(file, content) for file, contents in BROKEN.items() for content in contents]
)
def test_broken_folders_are_refused_in_one_line(folder, tmp_path, file, content):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    path = model / file
    if isinstance(content, int):
        path.write_bytes(path.read_bytes()[:content])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, value in content.items():
            if isinstance(value, dict):
                value = values[name] | value
            values[name] = value
        path.write_text(json.dumps(values), encoding="utf-8")
    else:
        path.write_text(content, encoding="utf-8")
    message = refused(lambda: KosmosGPipeline.from_pretrained(model), str(model))
    part = file.partition("/")[0]
    assert part in message, message
    assert "huggingface.co" not in message


# Images that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, hint", [("float32", "Try another scheduler"), ("float16", "--dtype float32 or bfloat16")]
)
def test_an_image_that_is_not_finite_is_an_error(pipe, dtype, hint):
    pipe.unet.to(getattr(torch, dtype))
    pipe.unet.forward = lambda sample, *args, **kwargs: (torch.full_like(sample, torch.nan),)
    pipe.text_encoder.to(pipe.unet.dtype), pipe.vae.to(pipe.unet.dtype)
    settings = GenerationSettings(prompt="a hat", steps=1, seed=3, height=16, width=16)
    arguments = size_arguments(pipe, settings) | prompt_arguments(pipe, settings, [])
    with pytest.raises(ValueError, match=f"seed 3 .*NaN.*{hint}"):
        list(draw_images(pipe, settings, arguments))


def test_images_are_those_of_the_pipeline(pipe):
    settings = GenerationSettings(prompt="a hat", steps=2, seed=3, height=16, width=16)
    arguments = size_arguments(pipe, settings) | prompt_arguments(pipe, settings, [])
    [(image, _)] = draw_images(pipe, settings, arguments)
    options = {
        "generator": torch.Generator().manual_seed(3),
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
    }
    assert np.array_equal(image, pipe("a hat", guidance_scale=settings.guidance, **options).images[0])


def test_conditions_that_are_not_finite_are_refused(pipe, no_model_runs):
    embeds = pipe.encode_prompt("a hat")[0]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.clone()} | {name: nan(embeds)}
        with no_model_runs(pipe), pytest.raises(ValueError, match=f"^{name} .*NaN"):
            pipe(**given, num_inference_steps=1)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "a/b/c", "/nowhere/at/all", "x" * 5000])
def test_what_is_neither_a_folder_nor_a_hub_id_is_told_without_asking_the_hub(source):
    for load in (
        lambda: KosmosGPipeline.from_pretrained(source),
        lambda: load_pretrained(UNet2DConditionModel, source),
    ):
        with pytest.raises(
            OSError, match="There is no folder '.*and a Hub id has the form owner/name"
        ) as raised:
            load()
        assert len(str(raised.value)) < 300


def test_hub_id_that_cannot_be_fetched_is_told_in_one_line():
    with pytest.raises(OSError, match="'someone/else' is not a folder here, and it was not found in the Hub"):
        KosmosGPipeline.from_pretrained("someone/else")
