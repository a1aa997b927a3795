"""LoRAs of every spelling, few-step recipes, and what is refused: in our pipelines and, by from_pipe, in stock ones."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file
from support.composing import borrow
from support.loras import (
    ATTENTION,
    DIFFUSERS_TEXT_ENCODER,
    RANK,
    differ,
    equal,
    make_lora,
    merge_by_hand,
    picture_of,
    to_kohya,
    with_prefix,
)

from kosmos_g_diffusers import KosmosGImg2ImgPipeline, KosmosGPipeline, pipeline_kosmos_g

peft = pytest.importorskip("peft")


@pytest.fixture
def worded(pipe, photos):
    """A pipeline with the image words <dog> and <cat>."""
    pipe.add_image_word("<dog>", photos[0])
    pipe.add_image_word("<cat>", photos[1])
    return pipe


SPELLINGS = {
    "peft": with_prefix,
    "diffusers": lambda layers: with_prefix(convert_state_dict_to_diffusers(layers)),
    "kohya": to_kohya,
}
KOHYA_TEXT_ENCODER = {
    f"lora_te_text_model_encoder_layers_{layer}_mlp_fc1.{part}": value
    for layer in range(3)
    for part, value in (
        ("lora_down.weight", torch.ones(4, 768)),
        ("lora_up.weight", torch.ones(3072, 4)),
        ("alpha", torch.tensor(4.0)),
    )
}
# Spellings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_lora_of_any_spelling_acts_as_its_weights_merged_by_hand(worded, draw, photos, spelling):
    before = draw(worded, "<dog> in a hat")
    layers = make_lora(worded.unet)
    expected = picture_of(worded, draw, merge_by_hand(worded.unet, (layers, 1.0)))
    worded.load_lora_weights(SPELLINGS[spelling](layers))
    given = draw(worded, "<dog> in a hat")
    assert equal(given, expected) and differ(given, before)
    assert differ(draw(worded, "<cat> in a hat"), given)
    assert np.array_equal(draw(worded, "<i> in a hat", images=[photos[0]]), given)
    worded.unload_lora_weights()
    assert np.array_equal(draw(worded, "<dog> in a hat"), before)
    assert not getattr(worded.unet, "peft_config", None)


def test_alpha_of_kohya_scales_the_lora(worded, draw):
    layers = make_lora(worded.unet)
    expected = picture_of(worded, draw, merge_by_hand(worded.unet, (layers, 0.5)))
    worded.load_lora_weights(to_kohya(layers, alpha=RANK / 2))
    assert equal(draw(worded, "<dog> in a hat"), expected)


def test_lora_is_read_from_a_file_and_from_a_folder(worded, draw, tmp_path):
    layers = with_prefix(make_lora(worded.unet))
    worded.load_lora_weights(layers)
    expected = draw(worded, "<dog> in a hat")
    save_file(layers, tmp_path / "style.safetensors")
    for source, arguments in (
        (tmp_path / "style.safetensors", {}),
        (str(tmp_path / "style.safetensors"), {}),
        (str(tmp_path), {"weight_name": "style.safetensors"}),
    ):
        worded.unload_lora_weights()
        worded.load_lora_weights(source, **arguments)
        assert equal(draw(worded, "<dog> in a hat"), expected)


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_dora(worded, draw, spelling):
    before = draw(worded, "<dog> in a hat")
    layers = make_lora(worded.unet, targets=ATTENTION, use_dora=True)
    assert any("lora_magnitude_vector" in name for name in layers)
    expected = picture_of(worded, draw, merge_by_hand(worded.unet, (layers, 1.0)))
    plain = {name: value for name, value in layers.items() if "magnitude" not in name}
    assert differ(expected, picture_of(worded, draw, merge_by_hand(worded.unet, (plain, 1.0))))
    worded.load_lora_weights(SPELLINGS[spelling](layers))
    given = draw(worded, "<dog> in a hat")
    assert equal(given, expected) and differ(given, draw(worded, "<cat> in a hat"))
    worded.unload_lora_weights()
    assert np.array_equal(draw(worded, "<dog> in a hat"), before)


def test_dora_of_kohya_is_read_as_a_plain_lora_with_a_warning(worded, draw, logged):
    layers = make_lora(worded.unet, targets=ATTENTION)
    expected = picture_of(worded, draw, merge_by_hand(worded.unet, (layers, 1.0)))
    kohya = to_kohya(layers)
    scales = {name.replace("alpha", "dora_scale"): torch.ones(3) for name in kohya if name.endswith("alpha")}
    worded.load_lora_weights(kohya | scales)
    assert "dora_scale" in logged.text
    assert equal(draw(worded, "<dog> in a hat"), expected)


# Strength ------------------------------------------------------------------------------------------------------------


def test_several_loras_are_weighted(worded, draw):
    before = draw(worded, "<dog> in a hat")
    first, second = make_lora(worded.unet, 0), make_lora(worded.unet, 1, ATTENTION)
    worded.load_lora_weights(with_prefix(first), adapter_name="first")
    worded.load_lora_weights(to_kohya(second), adapter_name="second")
    for names, weights in ((["first", "second"], [0.5, 1.5]), (["second"], [1.0]), (["first"], [0.3])):
        worded.set_adapters(names, weights)
        layers = {"first": first, "second": second}
        merged = merge_by_hand(
            worded_base(worded), *[(layers[n], w) for n, w in zip(names, weights, strict=True)]
        )
        given = draw(worded, "<dog> in a hat")
        assert equal(given, picture_of(worded, draw, merged)) and differ(given, before)
        assert differ(given, draw(worded, "<cat> in a hat"))
    worded.delete_adapters("first")
    assert worded.get_list_adapters() == {"unet": ["second"]}
    worded.unload_lora_weights()
    assert np.array_equal(draw(worded, "<dog> in a hat"), before)


def worded_base(pipe):
    """The pipeline's U-Net without its LoRAs."""
    unet = copy.deepcopy(pipe.unet)
    unet.unload_lora()
    return unet


def test_lora_may_be_scaled_for_one_call(worded, draw):
    before = draw(worded, "<dog> in a hat")
    layers = make_lora(worded.unet)
    half = picture_of(worded, draw, merge_by_hand(worded.unet, (layers, 0.5)))
    worded.load_lora_weights(with_prefix(layers))
    whole = draw(worded, "<dog> in a hat")
    assert equal(draw(worded, "<dog> in a hat", cross_attention_kwargs={"scale": 0.5}), half)
    assert equal(draw(worded, "<dog> in a hat", cross_attention_kwargs={"scale": 0.0}), before)
    assert np.array_equal(draw(worded, "<dog> in a hat"), whole)
    worded.disable_lora()
    assert np.array_equal(draw(worded, "<dog> in a hat"), before)
    worded.enable_lora()
    assert np.array_equal(draw(worded, "<dog> in a hat"), whole)


def test_fused_lora_draws_the_same_and_can_be_taken_out_again(worded, draw):
    before = draw(worded, "<dog> in a hat")
    layers = make_lora(worded.unet)
    worded.load_lora_weights(with_prefix(layers))
    loaded, half = draw(worded, "<dog> in a hat"), None
    worded.fuse_lora()
    assert worded.num_fused_loras == 1
    assert equal(draw(worded, "<dog> in a hat"), loaded)
    worded.unfuse_lora()
    assert equal(draw(worded, "<dog> in a hat"), loaded)
    worded.fuse_lora(lora_scale=0.5)
    half = draw(worded, "<dog> in a hat")
    worded.unfuse_lora()
    worded.unload_lora_weights()
    # to rounding: the weights were added and subtracted
    assert equal(draw(worded, "<dog> in a hat"), before)
    assert equal(half, picture_of(worded, draw, merge_by_hand(worded.unet, (layers, 0.5))))


# Text-encoder keys, stock pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling, foreign, count",
    [("kohya", KOHYA_TEXT_ENCODER, 6), ("diffusers", DIFFUSERS_TEXT_ENCODER, 8)],
)
def test_keys_of_the_text_encoder_are_left_out_with_one_warning(
    worded, draw, logged, snapshot, spelling, foreign, count
):
    before, encoder = draw(worded, "<dog> in a hat"), snapshot(worded.text_encoder)
    condition = worded.encode_prompt("<dog> in a hat")[0]
    layers = make_lora(worded.unet, targets=ATTENTION)
    worded.load_lora_weights(SPELLINGS[spelling](layers))
    expected = draw(worded, "<dog> in a hat")
    worded.unload_lora_weights()
    assert not [record for record in logged.records if "CLIP" in record.getMessage()]
    logged.clear()
    worded.load_lora_weights(SPELLINGS[spelling](layers) | foreign, adapter_name="style")
    warnings = [record.getMessage() for record in logged.records]
    assert len(warnings) == 1 and f"{count} of {len(layers) + count} keys" in warnings[0], warnings
    assert np.array_equal(draw(worded, "<dog> in a hat"), expected)
    worded.set_adapters("style", 0.5)
    worded.fuse_lora()
    worded.unfuse_lora()
    worded.unload_lora_weights()
    assert equal(draw(worded, "<dog> in a hat"), before)
    assert torch.equal(worded.encode_prompt("<dog> in a hat")[0], condition)
    after = snapshot(worded.text_encoder)
    assert after["modules"] == encoder["modules"] and after["config"] == encoder["config"]


def test_lora_loaded_by_ours_is_there_in_the_stock_pipeline(worded, draw):
    before = draw(worded, "<dog> in a hat")
    lora = to_kohya(make_lora(worded.unet)) | KOHYA_TEXT_ENCODER
    stock = borrow(StableDiffusionPipeline, worded)
    # the way round: keys for CLIP's text encoder break the stock class over any other encoder
    with pytest.raises((IndexError, KeyError, ValueError, RuntimeError)):
        borrow(StableDiffusionPipeline, worded, unet=copy.deepcopy(worded.unet)).load_lora_weights(lora)
    worded.load_lora_weights(lora, adapter_name="style")
    expected = draw(worded, "<dog> in a hat")
    assert differ(expected, before)
    assert np.array_equal(draw(stock, "<dog> in a hat"), expected)  # the U-Net is shared
    assert np.array_equal(draw(borrow(StableDiffusionPipeline, worded), "<dog> in a hat"), expected)
    assert differ(draw(stock, "<cat> in a hat"), expected)
    stock.set_adapters("style", 0.5)
    assert differ(draw(stock, "<dog> in a hat"), expected)
    stock.unload_lora_weights()
    assert np.array_equal(draw(stock, "<dog> in a hat"), before)
    assert np.array_equal(draw(worded, "<dog> in a hat"), before)


def test_lora_acts_in_the_siblings(worded, photos):
    other = KosmosGImg2ImgPipeline.from_pipe(worded)
    other.set_progress_bar_config(disable=True)

    def change():
        generator = torch.Generator().manual_seed(0)
        arguments = {"image": photos[2].resize((16, 16)), "num_inference_steps": 2, "generator": generator}
        return other("<dog> in a hat", output_type="np", **arguments).images

    before = change()
    other.load_lora_weights(with_prefix(make_lora(worded.unet)))
    assert differ(change(), before)
    worded.unload_lora_weights()
    assert np.array_equal(change(), before)


# Few steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, changes, steps, guidance",
    [
        (LCMScheduler, {}, 4, 1.0),
        (LCMScheduler, {}, 8, 1.5),
        (TCDScheduler, {}, 4, 1.0),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, 4, 1.0),
        (DDIMScheduler, {"timestep_spacing": "trailing"}, 4, 1.0),
    ],
)
@pytest.mark.parametrize("cls", [KosmosGPipeline, StableDiffusionPipeline])
def test_few_steps_with_a_distilled_lora(worded, draw, cls, scheduler, changes, steps, guidance):
    plain = draw(worded, "<dog> in a hat", num_inference_steps=steps, guidance_scale=guidance)
    worded.load_lora_weights(with_prefix(make_lora(worded.unet)))
    worded.fuse_lora()
    pipe = borrow(cls, worded, scheduler=scheduler.from_config(worded.scheduler.config, **changes))
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance}
    image = draw(pipe, "<dog> in a hat", **arguments)
    assert rows == [1 if guidance == 1.0 else 2] * steps
    assert np.isfinite(image).all() and differ(image, plain)
    assert differ(image, draw(pipe, "<cat> in a hat", **arguments))


# What does not fit ---------------------------------------------------------------------------------------------------


def pair(name, width, up_width=None):
    return {
        f"{name}.lora_A.weight": torch.ones(4, width),
        f"{name}.lora_B.weight": torch.ones(up_width or width, 4),
    }


SDXL_KOHYA = {
    f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.{part}": value
    for part, value in (
        ("lora_down.weight", torch.ones(4, 640)),
        ("lora_up.weight", torch.ones(640, 4)),
        ("alpha", torch.tensor(4.0)),
    )
} | {name.replace("lora_te_", "lora_te2_"): value for name, value in KOHYA_TEXT_ENCODER.items()}
BLOCK = "attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    "lora, message",
    [
        (SDXL_KOHYA, r"2 of 2 layers of this LoRA do not fit the U-Net, such as .*640.*another architecture"),
        (pair(f"unet.down_blocks.1.{BLOCK}.attn1.to_q", 640), r"2 of 2 layers .*\(4, 640\)"),
        (pair(f"unet.down_blocks.0.{BLOCK}.attn2.to_k", 1024, 16), r"1 of 2 layers .*attn2.*\(4, 1024\)"),
        (
            pair("transformer.single_blocks.0.attn.to_q", 3072),
            "None of the 2 keys .*'transformer.single_blocks",
        ),
        (DIFFUSERS_TEXT_ENCODER, "None of the 8 keys of this LoRA is for a U-Net.*text encoder alone"),
    ],
    ids=["sdxl-kohya", "sdxl", "2.1", "transformer", "text-encoder-only"],
)
def test_lora_for_another_architecture_is_refused_and_leaves_nothing(worded, draw, lora, message):
    before = draw(worded, "<dog> in a hat")
    with pytest.raises(ValueError, match=message):
        worded.load_lora_weights(lora)
    assert np.array_equal(draw(worded, "<dog> in a hat"), before)
    assert not getattr(worded.unet, "peft_config", None)
    worded.load_lora_weights(with_prefix(make_lora(worded.unet, targets=ATTENTION)))  # still takes a good one
    assert differ(draw(worded, "<dog> in a hat"), before)


@pytest.mark.parametrize("name", ["no_such_style.safetensors", "/no/such/folder", "no/such/style.bin"])
def test_missing_file_of_a_lora_is_named(worded, name):
    with pytest.raises(ValueError, match=f"no LoRA at '{name}'"):
        worded.load_lora_weights(name)


def test_missing_file_in_a_folder_is_named(worded, tmp_path):
    with pytest.raises(OSError, match=f"style.safetensors.*{tmp_path.name}"):
        worded.load_lora_weights(str(tmp_path), weight_name="style.safetensors")


def test_missing_peft_is_named_with_its_install_command(worded, monkeypatch):
    monkeypatch.setattr(pipeline_kosmos_g, "USE_PEFT_BACKEND", False)
    with pytest.raises(ImportError, match="pip install -U peft"):
        worded.load_lora_weights({})
