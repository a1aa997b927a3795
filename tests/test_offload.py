"""Memory and speed knobs on the CPU: the hooks of offloading, quantisation, compilation, and the small ones.

Offloading moves weights to a device right before a module's `forward`, so the encoder must be reached through it alone,
image words included. The mechanisms run here with the CPU as the device; those marked slow need an accelerator.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines import pipeline_utils
from diffusers.quantizers import PipelineQuantizationConfig
from support.composing import borrow

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGPipeline, KosmosGTextEncoder

MODELS = ("text_encoder", "unet", "vae")
CPU = torch.device("cpu")
on_an_accelerator = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator"),
]


@pytest.fixture
def worded(pipe, photos):
    """A pipeline with the image word <dog>."""
    pipe.add_image_word("<dog>", photos[0])
    return pipe


@pytest.fixture
def expected(build_pipe, draw, photos):
    """What a pipeline without any knob draws: prompts of a word, of a second word, and of a picture."""
    plain = build_pipe()
    plain.add_image_word("<dog>", photos[0])
    plain.add_image_word("<cat>", photos[1])
    return everything(plain, draw, photos)


def everything(pipe, draw, photos):
    return [
        draw(pipe, "<dog> in a hat"),
        draw(pipe, "<cat> in a hat", negative_prompt="<dog>"),
        draw(pipe, "<i> by <dog>", images=[photos[1]]),
    ]


def assert_draws(pipe, draw, photos, expected, tolerance=1e-4):
    """The pipeline draws what is expected, with a word of before and one that is added now."""
    pipe.add_image_word("<cat>", photos[1])
    for given, image in zip(everything(pipe, draw, photos), expected, strict=True):
        assert np.abs(given - image).max() <= tolerance


# Offloading ----------------------------------------------------------------------------------------------------------


def test_encoder_runs_through_forward_alone(worded, draw, photos, monkeypatch):
    encoder, inside, calls = worded.text_encoder, [], []
    encoder.register_forward_pre_hook(lambda *args: inside.append(1))
    encoder.register_forward_hook(lambda *args: inside.pop() and None)

    def watch(name, part):
        def watched(*args, **kwargs):
            assert inside, f"{name} ran outside forward"
            calls.append(name)
            return part(*args, **kwargs)

        monkeypatch.setattr(encoder, name, watched)

    for name in ("get_image_features", "get_language_hidden_states", "get_condition"):
        watch(name, getattr(encoder, name))
    worded.add_image_word("<cat>", photos[1])
    worded.blend([("<dog>", 1), ("a hat", 2)])
    everything(worded, draw, photos)
    draw(borrow(StableDiffusionPipeline, worded), "<dog> by <cat>")
    assert not inside and {"get_image_features", "get_language_hidden_states", "get_condition"} <= set(calls)


def test_sequential_offloading(worded, draw, photos, expected):
    accelerate = pytest.importorskip("accelerate")
    for name in MODELS:
        accelerate.cpu_offload(getattr(worded, name), CPU)  # what enable_sequential_cpu_offload does
    assert all(parameter.is_meta for parameter in worded.text_encoder.parameters())
    assert_draws(worded, draw, photos, expected)
    stock = borrow(StableDiffusionPipeline, worded)
    assert np.array_equal(draw(stock, "<dog> in a hat"), expected[0])
    # nothing was left behind on the device but the states of the word that came later
    loaded = [name for name, value in worded.text_encoder.named_parameters() if not value.is_meta]
    assert loaded == ["image_words.1.states"]


@pytest.mark.parametrize("cls", [KosmosGPipeline, StableDiffusionPipeline])
def test_model_offloading(worded, draw, photos, expected, monkeypatch, cls):
    pytest.importorskip("accelerate")
    from accelerate.hooks import CpuOffload

    loaded, pre_forward = [], CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload,
        "pre_forward",
        lambda self, module, *a, **k: loaded.append(module) or pre_forward(self, module, *a, **k),
    )
    pipe = borrow(cls, worded)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(draw(pipe, "<dog> in a hat"), expected[0])
    assert loaded[0] is loaded[1] is pipe.text_encoder and pipe.unet in loaded
    if cls is KosmosGPipeline:
        loaded.clear()
        pipe.add_image_word("<cat>", photos[1])
        assert loaded == [pipe.text_encoder]
        pipe.remove_image_word("<cat>")
        assert_draws(pipe, draw, photos, expected)
    pipe.remove_all_hooks()
    assert np.array_equal(draw(pipe, "<dog> in a hat"), expected[0])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_an_accelerator_says_so(pipe, draw, method):
    pytest.importorskip("accelerate")
    before = draw(pipe, "a hat")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        getattr(pipe, method)()
    assert np.array_equal(draw(pipe, "a hat"), before)


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_accelerate_says_so(pipe, monkeypatch, method):
    monkeypatch.setattr(pipeline_utils, "is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match="accelerate"):
        getattr(pipe, method)()


@pytest.mark.parametrize(
    "arguments", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(worded, draw, photos, expected, arguments):
    try:
        torch.accelerator.current_accelerator()
    except RuntimeError as error:  # up to torch 2.6
        pytest.skip(f"group offloading asks torch for its accelerator: {error}")
    worded.enable_group_offload(onload_device=CPU, offload_device=CPU, **arguments)
    assert_draws(worded, draw, photos, expected)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=on_an_accelerator) for name in ("model", "sequential", "group")]
)
def test_offloading_on_an_accelerator(worded, draw, photos, expected, method):
    device = torch.accelerator.current_accelerator()
    if method == "group":
        worded.enable_group_offload(onload_device=device, offload_type="leaf_level")
    else:
        getattr(worded, f"enable_{method}_cpu_offload")(device=device)
    assert_draws(worded, draw, photos, expected, tolerance=2e-2)
    # the states of the word that came later may stay where they were computed
    weights = [w for name, w in worded.text_encoder.named_parameters() if name != "image_words.1.states"]
    assert {weight.device.type for weight in weights} <= {"cpu", "meta"}


@pytest.mark.parametrize("device_map", ["balanced", "cpu"])
def test_device_map(worded, draw, photos, expected, tmp_path, device_map):
    pytest.importorskip("accelerate")
    worded.save_pretrained(tmp_path)
    pipe = KosmosGPipeline.from_pretrained(tmp_path, device_map=device_map)
    pipe.set_progress_bar_config(disable=True)
    assert_draws(
        pipe, draw, photos, expected, tolerance=1e-4 if not torch.accelerator.is_available() else 2e-2
    )


def test_encoder_is_freed_once_prompts_are_encoded(worded, draw, photos, expected):
    condition, negative = worded.encode_prompt("<i> in a hat", images=[photos[0]])
    embeds = {"prompt_embeds": condition, "negative_prompt_embeds": negative}
    encoder = weakref.ref(worded.text_encoder)
    rest = borrow(KosmosGPipeline, worded, text_encoder=None, tokenizer=None)
    assert np.array_equal(draw(rest, **embeds), expected[0])
    worded.text_encoder = None
    gc.collect()
    assert encoder() is None
    assert np.array_equal(draw(worded, **embeds), expected[0])
    with pytest.raises(ValueError, match="NoneType.*give ready prompt_embeds"):
        draw(worded, "a hat")


# Quantisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("text_encoder",), ("text_encoder", "unet")], ids="-".join)
def test_torchao_int8_weights(worded, draw, photos, expected, tmp_path, parts):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    import diffusers
    import transformers

    int8 = quantization.Int8WeightOnlyConfig(version=2)
    configs = {"text_encoder": transformers.TorchAoConfig(int8), "unet": diffusers.TorchAoConfig(int8)}
    worded.save_pretrained(tmp_path)
    quantized = KosmosGPipeline.from_pretrained(
        tmp_path,
        quantization_config=PipelineQuantizationConfig(quant_mapping={name: configs[name] for name in parts}),
        dtype=torch.float32,
    )
    quantized.set_progress_bar_config(disable=True)
    for name in parts:
        kinds = {
            type(module.weight).__name__
            for module in getattr(quantized, name).modules()
            if isinstance(module, torch.nn.Linear)
        }
        assert any("Int8" in kind or "Affine" in kind for kind in kinds), kinds
    assert_draws(quantized, draw, photos, expected, tolerance=0.1)
    given = draw(quantized, "<dog> in a hat")
    assert np.abs(given - expected[0]).max() > 1e-6  # it is another model
    assert np.abs(given - draw(quantized, "<cat> in a hat")).max() > 1e-3
    # stock from_pipe always casts, which a quantised U-Net refuses: build the stock class from the components
    stock = StableDiffusionPipeline(**quantized.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(stock, "<dog> in a hat"), given)


def test_bitsandbytes_configuration_reaches_each_component(worded, tmp_path, monkeypatch):
    import diffusers
    import transformers

    worded.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_8bit",
        quant_kwargs={"load_in_8bit": True},
        components_to_quantize=["text_encoder", "unet"],
    )
    # bitsandbytes itself wants a GPU, and says so or how to install it
    with pytest.raises((ImportError, RuntimeError), match="pip install .*bitsandbytes|GPU"):
        KosmosGPipeline.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    seen = {}
    for name, cls in (("text_encoder", KosmosGTextEncoder), ("unet", UNet2DConditionModel)):

        def load(*args, part=cls.from_pretrained, name=name, quantization_config=None, **kwargs):
            seen[name] = quantization_config
            return part(*args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", load)
    pipe = KosmosGPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert pipe.image_words == ["<dog>"]
    assert type(seen["text_encoder"]) is transformers.BitsAndBytesConfig and seen["text_encoder"].load_in_8bit
    assert type(seen["unet"]) is diffusers.BitsAndBytesConfig and seen["unet"].load_in_8bit


# Speed ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forget_compiled():
    yield
    torch._dynamo.reset()


# the default backend would call a C++ compiler
@pytest.mark.usefixtures("forget_compiled")
def test_compiled_encoder(worded, draw, photos, expected):
    worded.text_encoder.compile(backend="eager")
    assert_draws(worded, draw, photos, expected)
    stock = borrow(StableDiffusionPipeline, worded)
    assert np.abs(draw(stock, "<dog> in a hat") - expected[0]).max() < 1e-4


@pytest.mark.usefixtures("forget_compiled")
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_compiled_unet(worded, draw, expected, how):
    if how == "whole":
        worded.unet = torch.compile(worded.unet, backend="eager")
    else:
        worded.unet.compile_repeated_blocks(backend="eager")
    assert np.abs(draw(worded, "<dog> in a hat") - expected[0]).max() < 1e-4


def test_channels_last(worded, draw, photos, expected):
    for model in (worded.unet, worded.vae):
        model.to(memory_format=torch.channels_last)
    assert worded.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_draws(worded, draw, photos, expected)


@pytest.mark.parametrize("cls", [KosmosGPipeline, StableDiffusionPipeline])
def test_vae_tiling(worded, draw, cls):
    pipe = borrow(cls, worded)
    arguments = {"height": 96, "width": 72}
    whole = draw(pipe, "<dog> in a hat", **arguments)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    decoded, decoder = [], pipe.vae.decoder
    hook = decoder.register_forward_pre_hook(lambda module, args: decoded.append(tuple(args[0].shape[2:])))
    tiled = draw(pipe, "<dog> in a hat", **arguments)
    hook.remove()
    assert len(decoded) > 1 and max(max(size) for size in decoded) == 8
    assert tiled.shape == whole.shape and np.isfinite(tiled).all()
    pipe.vae.disable_tiling()
    assert np.array_equal(draw(pipe, "<dog> in a hat", **arguments), whole)


def test_tiling_leaves_a_picture_of_one_tile_as_it_is(worded, draw, photos, expected):
    worded.vae.enable_tiling()
    worded.vae.enable_slicing()
    assert_draws(worded, draw, photos, expected, tolerance=0)


def test_knobs_together_under_a_controlnet(worded, draw, photos, build_controlnet):
    pytest.importorskip("accelerate")
    controlnet = build_controlnet(worded.unet)
    pipe = KosmosGControlNetPipeline.from_pipe(worded, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    control = photos[3].resize((16, 16))
    image = draw(pipe, "<dog> in a hat", image=control)
    pipe.enable_attention_slicing()
    pipe.vae.enable_tiling()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.abs(draw(pipe, "<dog> in a hat", image=control) - image).max() < 1e-4
    stock = borrow(StableDiffusionControlNetPipeline, pipe)
    assert np.abs(draw(stock, "<dog> in a hat", image=control) - image).max() < 1e-4
