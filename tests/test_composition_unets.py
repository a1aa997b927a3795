"""Other U-Nets of the Stable Diffusion 1.5 family, from folders and single files, and those that do not fit."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from support.composing import assert_all_differ, borrow, generate, name_in_a_single_file

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGInpaintPipeline, KosmosGPipeline

DOG, CAT = "<dog> in a hat", "<cat> in a hat"


@pytest.fixture
def worded(pipe, photos):
    """A pipeline with the image words <dog> and <cat>."""
    pipe.add_image_word("<dog>", photos[0])
    pipe.add_image_word("<cat>", photos[1])
    return pipe


@pytest.fixture
def fine_tuned(worded):
    """A U-Net of the same shape with other weights."""
    return vary(worded.unet)


def vary(unet, **changes):
    """A U-Net of random weights, of the same configuration but for `changes`."""
    torch.manual_seed(5)
    return UNet2DConditionModel.from_config(unet.config, **changes).eval()


# Fine-tunes --------------------------------------------------------------------------------------------------------


def test_unet_of_a_folder(worded, fine_tuned, draw, photos, tmp_path):
    fine_tuned.save_pretrained(tmp_path / "anime" / "unet")
    worded.save_pretrained(tmp_path / "kosmos-g")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "anime", subfolder="unet")
    loaded = KosmosGPipeline.from_pretrained(tmp_path / "kosmos-g", unet=unet)
    loaded.set_progress_bar_config(disable=True)
    image = draw(loaded, DOG)
    assert_all_differ(image, draw(loaded, CAT), draw(worded, DOG))
    for cls in (KosmosGPipeline, StableDiffusionPipeline):
        assert np.array_equal(draw(borrow(cls, worded, unet=fine_tuned), DOG), image)
    assert np.array_equal(draw(loaded, "<i> in a hat", images=[photos[0]]), image)
    # what the prompt means is the encoder's alone
    assert torch.equal(loaded.encode_prompt(DOG)[0], worded.encode_prompt(DOG)[0])


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_unet_of_a_single_file(worded, fine_tuned, draw, tmp_path, suffix):
    weights = {
        f"model.diffusion_model.{name_in_a_single_file(name)}": value
        for name, value in fine_tuned.state_dict().items()
    }
    weights["first_stage_model.decoder.conv_in.bias"] = torch.zeros(3)  # a whole checkpoint is read, too
    path = tmp_path / f"anime{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    # without config= diffusers fetches the one of Stable Diffusion 1.5, which has the released size
    worded.save_pretrained(tmp_path / "kosmos-g")
    unet = UNet2DConditionModel.from_single_file(
        str(path), config=str(tmp_path / "kosmos-g"), subfolder="unet"
    )
    for name, value in fine_tuned.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value), name
    pipe = borrow(KosmosGPipeline, worded, unet=unet)
    image = draw(pipe, DOG)
    expected = draw(borrow(KosmosGPipeline, worded, unet=fine_tuned), DOG)
    # weights that are mapped from a file may lie in memory in a way that torch rounds differently for
    np.testing.assert_allclose(image, expected, atol=1e-5, rtol=0)
    assert_all_differ(image, draw(pipe, CAT), draw(worded, DOG))


def test_lcm_distilled_unet_takes_guidance_as_a_condition(worded, draw):
    unet = vary(worded.unet, time_cond_proj_dim=8)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    for cls in (KosmosGPipeline, StableDiffusionPipeline):
        pipe = borrow(cls, worded, unet=unet, scheduler=LCMScheduler.from_config(worded.scheduler.config))
        arguments = {"num_inference_steps": 4, "guidance_scale": 8.0}
        image = draw(pipe, DOG, **arguments)
        weaker = draw(pipe, DOG, **arguments | {"guidance_scale": 2.0})
        assert_all_differ(image, draw(pipe, CAT, **arguments), weaker)


# More channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [KosmosGInpaintPipeline, StableDiffusionInpaintPipeline])
def test_inpainting_unet_of_nine_channels(worded, photos, cls):
    unet = vary(worded.unet, in_channels=9)
    pipe = borrow(cls, worded, unet=unet)
    assert pipe.unet.config.in_channels == 9
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :16] = 255
    masks = PIL.Image.fromarray(left), PIL.Image.fromarray(left.T.copy())
    pictures = [photo.resize((32, 32)) for photo in photos[2:]]

    def inpaint(prompt=DOG, image=pictures[0], mask_image=masks[0], **arguments):
        return generate(pipe, prompt, image=image, mask_image=mask_image, height=32, width=32, **arguments)

    image = inpaint()
    assert_all_differ(image, inpaint(CAT), inpaint(image=pictures[1]), inpaint(mask_image=masks[1]))
    if cls is KosmosGInpaintPipeline:
        assert np.array_equal(inpaint("<i> in a hat", images=[photos[0]]), image)


def test_instruct_pix2pix_unet_of_eight_channels(worded, photos):
    pipe = borrow(StableDiffusionInstructPix2PixPipeline, worded, unet=vary(worded.unet, in_channels=8))
    pictures = [photo.resize((32, 32)) for photo in photos[2:]]
    image = generate(pipe, "make it <dog>", image=pictures[0])
    assert_all_differ(
        image,
        generate(pipe, "make it <cat>", image=pictures[0]),
        generate(pipe, "make it <dog>", image=pictures[1]),
        generate(pipe, "make it <dog>", image=pictures[0], image_guidance_scale=4.0),
    )
    condition, negative = worded.encode_prompt("make it <i>", images=[photos[0]])
    embeds = {"prompt_embeds": condition, "negative_prompt_embeds": negative}
    assert np.array_equal(generate(pipe, None, image=pictures[0], **embeds), image)


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1024, 2048], ids=["2.1", "sdxl"])
def test_unet_of_another_width_is_refused_naming_both(worded, draw, no_model_runs, width):
    pipe = borrow(KosmosGPipeline, worded, unet=vary(worded.unet, cross_attention_dim=width))
    with no_model_runs(pipe), pytest.raises(ValueError, match=f"U-Net has cross_attention_dim {width}.* 32"):
        draw(pipe, DOG)


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_controlnet_of_another_width_is_refused_naming_both(worded, photos, no_model_runs, several, ready):
    good, bad = (
        ControlNetModel.from_unet(vary(worded.unet, cross_attention_dim=width)) for width in (32, 2048)
    )
    parts = {"controlnet": [good, bad] if several else bad}
    arguments = {"prompt": DOG, "image": [photos[3]] * 2 if several else photos[3]}
    if ready:  # the encoder was freed
        condition, negative = worded.encode_prompt(DOG)
        parts |= {"text_encoder": None, "tokenizer": None}
        arguments |= {"prompt": None, "prompt_embeds": condition, "negative_prompt_embeds": negative}
    pipe = borrow(KosmosGControlNetPipeline, worded, **parts)
    message = "ControlNet has cross_attention_dim 2048.* width 32"
    with no_model_runs(worded), pytest.raises(ValueError, match=message):
        pipe(**arguments, num_inference_steps=1)


@pytest.mark.parametrize(
    "load, message",
    [
        (lambda pipe, path: UNet2DConditionModel.from_pretrained(path), "anime"),
        (lambda pipe, path: UNet2DConditionModel.from_single_file(f"{path}.safetensors"), "valid URL"),
        (lambda pipe, path: ControlNetModel.from_pretrained(path), "anime"),
        (lambda pipe, path: pipe.load_ip_adapter(path, subfolder=".", weight_name="a.bin"), "anime"),
        (lambda pipe, path: pipe.load_image_words(path), "anime"),
    ],
    ids=["unet", "single-file", "controlnet", "ip-adapter", "image-words"],
)
def test_missing_weights_are_refused(worded, draw, tmp_path, load, message):
    before = draw(worded, DOG)
    with pytest.raises((OSError, ValueError), match=message):
        load(worded, str(tmp_path / "anime"))
    assert np.array_equal(draw(worded, DOG), before)
