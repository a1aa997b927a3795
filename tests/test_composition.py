"""What is made for Stable Diffusion 1.5 plugs in: controls, tasks and techniques, with diffusers' own classes.

Each test draws with a stock class that shares the components of our pipeline and sees that the picture follows the image
in the prompt and the technique's own input. docs/composition.md lists all of them; LoRA, U-Nets, prompt arithmetic and
offloading have files of their own.
"""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from support.composing import assert_all_differ, borrow, generate, write_ip_adapter

from kosmos_g_diffusers import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
)

DOG, CAT = "<dog> in a hat", "<cat> in a hat"  # what both words mean differs, nothing else
SIZE = {"height": 32, "width": 32}


@pytest.fixture
def worded(pipe, photos):
    """A pipeline with the image words <dog> and <cat>."""
    pipe.add_image_word("<dog>", photos[0])
    pipe.add_image_word("<cat>", photos[1])
    return pipe


@pytest.fixture(scope="module")
def pictures():
    """Two pictures of 32 x 32 pixels, to be changed or to control: black and white squares, and coloured bars."""
    squares = np.kron(np.random.default_rng(0).integers(0, 2, (4, 4, 1)) * 255, np.ones((8, 8, 3)))
    bars = np.tile(np.kron([[255, 0, 0], [0, 255, 255]], np.ones((4, 1)))[:, None], (4, 32, 1))
    return [PIL.Image.fromarray(array.astype(np.uint8)) for array in (squares, bars)]


@pytest.fixture(scope="module")
def masks():
    """The left and the upper half of 32 x 32 pixels."""
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :16] = 255
    return [PIL.Image.fromarray(left), PIL.Image.fromarray(left.T.copy())]


# Controls ----------------------------------------------------------------------------------------------------------

WAYS = {
    "plain": {},
    "guess_mode": {"guess_mode": True},
    "start": {"control_guidance_start": 0.3},
    "end": {"control_guidance_end": 0.4},
    "scale": {"controlnet_conditioning_scale": 0.4},
}


@pytest.mark.parametrize("way", WAYS)
def test_controlnet(worded, pictures, photos, way, build_controlnet):
    controlnet = build_controlnet(worded.unet)
    stock = borrow(StableDiffusionControlNetPipeline, worded, controlnet=controlnet)
    ours = KosmosGControlNetPipeline.from_pipe(worded, controlnet=controlnet)
    image = generate(stock, DOG, image=pictures[0], **WAYS[way])
    other_prompt = generate(stock, CAT, image=pictures[0], **WAYS[way])
    other_control = generate(stock, DOG, image=pictures[1], **WAYS[way])
    assert_all_differ(image, other_prompt, other_control, generate(worded, DOG, **SIZE))
    # the same bits, from the stock class with a word and from ours with the picture
    itself = generate(ours, "<i> in a hat", images=[photos[0]], image=pictures[0], **WAYS[way])
    assert np.array_equal(image, itself)


def test_image_word_in_the_stock_controlnet_class_is_bit_identical_to_the_picture_in_ours(
    pipe, pictures, photos, build_controlnet
):
    controlnet = build_controlnet(pipe.unet)
    ours = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    stock = borrow(StableDiffusionControlNetPipeline, pipe, controlnet=controlnet)
    pipe.add_image_word("<dog>", photos[0])
    for seed in (0, 1):
        settings = {"image": pictures[0], "num_inference_steps": 4, "negative_prompt": "furniture"}
        word = stock("a <dog> by a hat", generator=torch.Generator().manual_seed(seed), **settings)
        settings |= {"images": [photos[0]], "generator": torch.Generator().manual_seed(seed)}
        picture = ours("a <i> by a hat", **settings)
        assert np.array_equal(np.asarray(word.images[0]), np.asarray(picture.images[0]))


def test_guess_mode_start_and_end_each_change_what_a_controlnet_does(worded, pictures, build_controlnet):
    stock = borrow(StableDiffusionControlNetPipeline, worded, controlnet=build_controlnet(worded.unet))
    assert_all_differ(*[generate(stock, DOG, image=pictures[0], **way) for way in WAYS.values()])
    # a ControlNet that ends before the first of three steps has done nothing
    never = generate(stock, DOG, image=pictures[0], control_guidance_end=0.3)
    assert np.array_equal(never, generate(worded, DOG, **SIZE))


def test_several_controlnets(worded, pictures, photos, build_controlnet):
    first, second = build_controlnet(worded.unet), build_controlnet(worded.unet, 1)
    stock = borrow(StableDiffusionControlNetPipeline, worded, controlnet=[first, second])
    image = generate(stock, DOG, image=pictures)
    assert_all_differ(
        image,
        generate(stock, CAT, image=pictures),
        generate(stock, DOG, image=[pictures[0], pictures[0]]),
        generate(stock, DOG, image=[pictures[1], pictures[1]]),
        generate(stock, DOG, image=pictures, guess_mode=True),
        generate(stock, DOG, image=pictures, control_guidance_start=[0.0, 0.3]),
    )
    ours = KosmosGControlNetPipeline.from_pipe(worded, controlnet=[first, second])
    itself = generate(ours, "<i> in a hat", images=[photos[0]], image=pictures)
    assert np.array_equal(image, itself)
    alone = borrow(StableDiffusionControlNetPipeline, worded, controlnet=first)
    scaled = generate(stock, DOG, image=pictures, controlnet_conditioning_scale=[1.0, 0.0])
    assert np.array_equal(scaled, generate(alone, DOG, image=pictures[0]))


def test_t2i_adapter(worded, pictures):
    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=8)
    stock = borrow(StableDiffusionAdapterPipeline, worded, adapter=adapter.eval())
    assert_all_differ(
        generate(stock, DOG, image=pictures[0]),
        generate(stock, CAT, image=pictures[0]),
        generate(stock, DOG, image=pictures[1]),
        generate(stock, DOG, image=pictures[0], adapter_conditioning_scale=0.3),
    )


# Tasks -------------------------------------------------------------------------------------------------------------


def test_image_to_image(worded, pictures, photos):
    stock = borrow(StableDiffusionImg2ImgPipeline, worded)
    image = generate(stock, DOG, image=pictures[0], strength=0.9)
    assert_all_differ(
        image,
        generate(stock, CAT, image=pictures[0], strength=0.9),
        generate(stock, DOG, image=pictures[1], strength=0.9),
        generate(stock, DOG, image=pictures[0], strength=0.4),
    )
    ours = KosmosGImg2ImgPipeline.from_pipe(worded)
    itself = generate(ours, "<i> in a hat", images=[photos[0]], image=pictures[0], strength=0.9)
    assert np.array_equal(image, itself)


def test_inpainting_with_the_text_to_image_unet(worded, pictures, masks, photos):
    stock = borrow(StableDiffusionInpaintPipeline, worded)
    arguments = SIZE | {"image": pictures[0], "mask_image": masks[0]}
    image = generate(stock, DOG, **arguments)
    assert_all_differ(
        image,
        generate(stock, CAT, **arguments),
        generate(stock, DOG, **arguments | {"image": pictures[1]}),
        generate(stock, DOG, **arguments | {"mask_image": masks[1]}),
    )
    ours = KosmosGInpaintPipeline.from_pipe(worded)
    assert np.array_equal(image, generate(ours, "<i> in a hat", images=[photos[0]], **arguments))


@pytest.mark.parametrize(
    "stock_class, our_class",
    [
        (StableDiffusionControlNetImg2ImgPipeline, KosmosGControlNetImg2ImgPipeline),
        (StableDiffusionControlNetInpaintPipeline, KosmosGControlNetInpaintPipeline),
    ],
)
def test_controlnet_over_a_picture(worded, pictures, masks, photos, stock_class, our_class, build_controlnet):
    controlnet = build_controlnet(worded.unet)
    stock = borrow(stock_class, worded, controlnet=controlnet)
    arguments = {"image": pictures[0], "control_image": pictures[1], "strength": 0.9}
    changes = [
        {"image": pictures[1]},
        {"control_image": pictures[0]},
        {"strength": 0.4},
        {"guess_mode": True},
    ]
    if "Inpaint" in stock_class.__name__:
        arguments |= {"mask_image": masks[0]}
        changes += [{"mask_image": masks[1]}]
    image = generate(stock, DOG, **arguments)
    assert_all_differ(
        image,
        generate(stock, CAT, **arguments),
        *[generate(stock, DOG, **arguments | change) for change in changes],
    )
    ours = our_class.from_pipe(worded, controlnet=controlnet)
    assert np.array_equal(image, generate(ours, "<i> in a hat", images=[photos[0]], **arguments))


def test_animatediff(worded):
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=worded.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
    )
    stock = borrow(AnimateDiffPipeline, worded, motion_adapter=adapter)

    def animate(prompt, n_frames=3):
        return generate(stock, prompt, num_frames=n_frames, height=16, width=16)[0]

    frames = animate("<dog> running")
    assert frames.shape == (3, 16, 16, 3)
    assert_all_differ(*frames)
    assert_all_differ(frames, animate("<cat> running"))
    still = np.stack([animate("<dog> running", 1)[0]] * 3)
    assert_all_differ(frames, still)  # frames see each other through the motion adapter
    condition, negative = worded.encode_prompt("<dog> running")
    ready = generate(
        stock,
        None,
        prompt_embeds=condition,
        negative_prompt_embeds=negative,
        num_frames=3,
        height=16,
        width=16,
    )
    assert np.array_equal(ready[0], frames)


# Techniques --------------------------------------------------------------------------------------------------------


def test_perturbed_attention_guidance(worded):
    before = generate(worded, DOG, **SIZE)
    stock = borrow(StableDiffusionPAGPipeline, worded, pag_applied_layers=["mid"])
    assert_all_differ(
        generate(stock, DOG, pag_scale=3.0, **SIZE),
        generate(stock, CAT, pag_scale=3.0, **SIZE),
        generate(stock, DOG, pag_scale=1.0, **SIZE),
        before,
    )
    assert np.array_equal(generate(stock, DOG, pag_scale=0.0, **SIZE), before)
    assert np.array_equal(generate(worded, DOG, **SIZE), before)  # the U-Net that both share


@pytest.mark.parametrize("cls", [KosmosGPipeline, StableDiffusionPipeline])
def test_freeu(worded, cls):
    pipe = borrow(cls, worded)
    before = generate(pipe, DOG, **SIZE)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    changed = generate(pipe, DOG, **SIZE), generate(pipe, CAT, **SIZE)
    pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6)
    assert_all_differ(before, *changed, generate(pipe, DOG, **SIZE))
    pipe.disable_freeu()
    assert np.array_equal(generate(pipe, DOG, **SIZE), before)


@pytest.fixture
def ip_adapter(worded, tmp_path):
    return write_ip_adapter(tmp_path, worded.unet)


def test_ip_adapter_beside_a_prompt_of_words_and_pictures(worded, ip_adapter, photos):
    before = generate(worded, "<i> in a hat", images=[photos[0]], **SIZE)
    processors = {name: type(value) for name, value in worded.unet.attn_processors.items()}
    worded.load_ip_adapter(**ip_adapter)

    def adapted(picture, reference, scale):
        worded.set_ip_adapter_scale(scale)
        return generate(worded, "<i> in a hat", images=[picture], ip_adapter_image=reference, **SIZE)

    image = adapted(photos[0], photos[2], 1.0)
    assert_all_differ(
        image,
        adapted(photos[1], photos[2], 1.0),
        adapted(photos[0], photos[3], 1.0),
        adapted(photos[0], photos[2], 0.5),
        before,
    )
    assert np.array_equal(adapted(photos[0], photos[2], 0.0), before)
    worded.unload_ip_adapter()
    assert np.array_equal(generate(worded, "<i> in a hat", images=[photos[0]], **SIZE), before)
    assert worded.image_encoder is None
    assert {name: type(value) for name, value in worded.unet.attn_processors.items()} == processors


def test_ip_adapter_without_its_image_and_with_sliced_attention_is_refused_before_a_model_runs(
    worded, ip_adapter, photos, no_model_runs
):
    worded.load_ip_adapter(**ip_adapter)
    with (
        no_model_runs(worded),
        pytest.raises(ValueError, match="no image was given for it.*unload_ip_adapter"),
    ):
        generate(worded, DOG, **SIZE)
    worded.enable_attention_slicing()
    with (
        no_model_runs(worded),
        pytest.raises(ValueError, match=r"Call disable_attention_slicing\(\), unload"),
    ):
        generate(worded, DOG, ip_adapter_image=photos[2], **SIZE)
    # what the message says to do
    worded.disable_attention_slicing()
    worded.unload_ip_adapter()
    worded.load_ip_adapter(**ip_adapter)
    assert np.isfinite(generate(worded, DOG, ip_adapter_image=photos[2], **SIZE)).all()


def test_ip_adapter_is_left_out_of_what_is_saved(worded, ip_adapter, photos, tmp_path, logged):
    before = generate(worded, DOG, **SIZE)
    worded.load_ip_adapter(**ip_adapter)
    logged.clear()
    worded.save_pretrained(tmp_path / "saved")
    assert [
        record.getMessage() for record in logged.records if "IP-Adapter is not saved" in record.getMessage()
    ]
    loaded = KosmosGPipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(generate(loaded, DOG, **SIZE), before)
    assert worded.unet.config.encoder_hid_dim_type == "ip_image_proj"
    loaded.load_ip_adapter(**ip_adapter)
    images = [generate(pipe, DOG, ip_adapter_image=photos[2], **SIZE) for pipe in (worded, loaded)]
    assert np.array_equal(*images)


def test_ip_adapter_in_a_stock_pipeline(worded, ip_adapter, photos):
    stock = borrow(StableDiffusionPipeline, worded)
    before = generate(stock, DOG, **SIZE)
    stock.load_ip_adapter(**ip_adapter)
    image = generate(stock, DOG, ip_adapter_image=photos[2], **SIZE)
    assert_all_differ(
        image,
        generate(stock, CAT, ip_adapter_image=photos[2], **SIZE),
        generate(stock, DOG, ip_adapter_image=photos[3], **SIZE),
        before,
    )
    worded_too = KosmosGPipeline.from_pipe(stock)  # the adapter travels with U-Net and image encoder
    itself = generate(worded_too, "<i> in a hat", images=[photos[0]], ip_adapter_image=photos[2], **SIZE)
    assert np.array_equal(itself, image)
    stock.unload_ip_adapter()
    assert np.array_equal(generate(stock, DOG, **SIZE), before)


# Documentation -----------------------------------------------------------------------------------------------------


def test_every_row_of_the_documentation_names_a_test_that_is_there():
    folder = Path(__file__).parent
    text = (folder.parent / "docs" / "composition.md").read_text(encoding="utf-8")
    text = text.partition("## Appendix: what is tested")[2]
    rows = re.findall(r"^\| .* \| (.*?) \|$", text, re.MULTILINE)
    rows = [row for row in rows if row != "tested by"]
    assert len(rows) > 30
    for row in rows:
        names = re.findall(r"`([\w/]+)\.py::(\w+)`", row)
        assert names, row
        for file, test in names:
            assert f"def {test}(" in (folder / f"{file}.py").read_text(encoding="utf-8"), row
