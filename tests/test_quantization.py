"""Weights of the text encoder in 8 and 4 bits, by the real libraries on the CPU."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from diffusers import PipelineQuantizationConfig

from kosmos_g_diffusers import SPRITES, KosmosGPipeline, quantization
from kosmos_g_diffusers.files import read_json
from kosmos_g_diffusers.generation.generate import load_model
from kosmos_g_diffusers.generation.memory import count
from kosmos_g_diffusers.generation.settings import GenerationSettings
from kosmos_g_diffusers.quantization import (
    KEPT,
    LIBRARIES,
    has_library,
    is_kept,
    quantization_config,
    saved_quantization,
)
from kosmos_g_diffusers.sprites import HEART, STAR

# of the QLoRA paper (appendix E): levels that split a normal distribution evenly
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


@pytest.fixture(params=LIBRARIES)
def quantize(request):
    if not has_library(request.param):
        pytest.skip(f"{LIBRARIES[request.param]} is not installed, or too old")
    return request.param


def conditions(pipe):
    """Of three prompts of the small model, with two images in all: (3, K, A) in float32."""
    with torch.no_grad():
        found = [pipe.encode_prompt("a large red striped star on a white background")[0]]
        found.append(pipe.encode_prompt("<i> on a mint background", images=[STAR])[0])
        found.append(pipe.encode_prompt("<i>", images=[HEART])[0])
    return torch.cat(found).float()


@pytest.fixture(scope="module")
def plain():
    """The small model as it is, and its conditions."""
    pipe = KosmosGPipeline.from_pretrained(SPRITES)
    return pipe, conditions(pipe)


def rms(tensor):
    return tensor.square().mean().sqrt().item()


def rounded_by_hand(encoder, quantize):
    """Round the weights to levels, with a scale for each 32 or 64 of them, and back."""
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear) and not is_kept(name, quantize):
            groups = module.weight.detach().reshape(-1, 32 if quantize == "int8" else 64)
            largest = groups.abs().amax(1, keepdim=True)
            if quantize == "int8":
                rounded = (groups / (largest / 127.5)).round().clamp(-128, 127) * (largest / 127.5)
            else:
                nearest = ((groups / largest)[..., None] - NF4).abs().argmin(-1)
                rounded = NF4[nearest] * largest
            module.weight = torch.nn.Parameter(rounded.reshape(module.weight.shape))


def bytes_of(model):
    """What the weights and buffers of a model take, those that libraries hold in tensors of their own too."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        inner = getattr(tensor, "__tensor_flatten__", None)
        parts = [getattr(tensor, name) for name in inner()[0]] if inner else [tensor]
        total += sum(part.nbytes for part in parts)
        if state := getattr(tensor, "quant_state", None):
            total += state.absmax.nbytes + state.state2.absmax.nbytes
    return total


def test_rounded_weights_are_saved_and_loaded_to_the_bit(plain, quantize, tmp_path):
    dtype = {"int8": "float32", "int4": "bfloat16"}[quantize]
    pipe = load_model(SPRITES, dtype, quantize)
    pipe.add_image_word("<star>", STAR)
    pipe.save_pretrained(tmp_path)
    assert saved_quantization(tmp_path) == LIBRARIES[quantize]
    (file,) = (tmp_path / "text_encoder").glob("*.safetensors")
    again = load_model(tmp_path, dtype)
    assert again.image_words == ["<star>"] and again.text_encoder.hf_quantizer is not None
    given = conditions(again)
    assert torch.equal(conditions(pipe), given)
    assert 0 < rms(given - plain[1]) < {"int8": 0.02, "int4": 0.08}[quantize]
    settings = GenerationSettings("", model=str(tmp_path))
    assert count(tmp_path, settings, dtype).encoder == file.stat().st_size
    with pytest.raises(ValueError, match=f"saved with quantised weights.*{quantize}.*Leave out --quantize"):
        load_model(tmp_path, dtype, quantize)
    image = again("<star>", num_inference_steps=1, output_type="pt").images
    assert image.isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_what_was_saved_in_half_precision_is_loaded_in_any_dtype_and_saved_again(
    plain, quantize, dtype, tmp_path
):
    load_model(SPRITES, "float16", quantize).save_pretrained(tmp_path / "first")
    pipe = KosmosGPipeline.from_pretrained(tmp_path / "first", **({} if dtype is None else {"dtype": dtype}))
    weights = [weight for weight in pipe.text_encoder.parameters() if type(weight) is torch.nn.Parameter]
    assert {weight.dtype for weight in weights} == {dtype or torch.float32}
    assert rms(conditions(pipe) - plain[1]) < {"int8": 0.02, "int4": 0.08}[quantize]
    pipe.add_image_word("<star>", STAR)
    pipe.save_pretrained(tmp_path / "second")
    again = KosmosGPipeline.from_pretrained(tmp_path / "second", dtype=pipe.dtype)
    assert again.image_words == ["<star>"]
    assert rms(conditions(again) - conditions(pipe)) < 0.01


def test_linear_layers_are_rounded_as_by_hand_except_those_that_are_kept(plain, quantize):
    pipe = load_model(SPRITES, "float32", quantize)
    layers = dict(pipe.text_encoder.named_modules())
    for name, module in plain[0].text_encoder.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            found = layers[name].weight
            same = type(found) is torch.nn.Parameter and torch.equal(found, weight)
            assert same == (not isinstance(module, torch.nn.Linear) or is_kept(name, quantize)), name
    counted = count(Path(SPRITES), GenerationSettings("", model=SPRITES), "float32", quantize)
    assert counted.encoder == pytest.approx(bytes_of(pipe.text_encoder), rel=0.05)
    by_hand = KosmosGPipeline.from_pretrained(SPRITES)
    rounded_by_hand(by_hand.text_encoder, quantize)
    rounded, expected = conditions(pipe), conditions(by_hand)
    # bitsandbytes computes in bfloat16 on CPUs that have its products
    assert rms(rounded - expected) < {"int8": 0.3, "int4": 0.5}[quantize] * rms(rounded - plain[1])
    assert all(hasattr(plain[0].text_encoder, kept) for kept in KEPT[quantize])


def test_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    for found in (missing, lambda name: "0.1.0"):
        monkeypatch.setattr(quantization, "version", found)
        for quantize, library in LIBRARIES.items():
            with pytest.raises(ImportError, match=rf"{quantize} .*{library} 0.*pip install .*\[quantize\]"):
                load_model(SPRITES, "float32", quantize)
    with pytest.raises(ValueError, match="'int3' was given. Expected 'int8' or 'int4'"):
        quantization_config("int3")


def test_config_of_a_model_that_is_damaged_or_elsewhere_says_nothing(tmp_path):
    assert saved_quantization("owner/name") is None
    (tmp_path / "text_encoder").mkdir()
    for text in ('{"quantization_config": 3}', "[]"):
        (tmp_path / "text_encoder" / "config.json").write_text(text)
        assert saved_quantization(tmp_path) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_by_diffusers_own_configuration(plain, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit",
        quant_kwargs={f"load_in_{bits}bit": True},
        components_to_quantize=["text_encoder"],
    )
    pipe = KosmosGPipeline.from_pretrained(SPRITES, quantization_config=config, dtype=torch.float32)
    pipe.save_pretrained(tmp_path)
    values = read_json(tmp_path / "text_encoder" / "config.json")
    assert values["quantization_config"][f"load_in_{bits}bit"]
    given = conditions(pipe)
    assert torch.equal(conditions(KosmosGPipeline.from_pretrained(tmp_path)), given)
    assert 0 < rms(given - plain[1]) < 0.3
