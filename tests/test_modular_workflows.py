"""Workflows of the modular pipeline: the images of the ordinary classes, every guider, blocks put in and taken out, mistakes."""

import numpy as np
import PIL.Image
import pytest
import torch
from support.composing import write_ip_adapter

pytest.importorskip(
    "diffusers.modular_pipelines", reason="Modular Diffusers may move: diffusers calls it experimental"
)

from diffusers import (  # noqa: E402
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LayerSkipConfig,
    LCMScheduler,
    PerturbedAttentionGuidance,
    PNDMScheduler,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    SmoothedEnergyGuidanceConfig,
    TangentialClassifierFreeGuidance,
    UNet2DConditionModel,
)
from diffusers.loaders import ModularIPAdapterMixin  # noqa: E402
from diffusers.models import MultiControlNetModel  # noqa: E402
from diffusers.modular_pipelines import ModularPipelineBlocks, StableDiffusionXLAutoBlocks  # noqa: E402
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam  # noqa: E402

import kosmos_g_diffusers  # noqa: E402
from kosmos_g_diffusers.modular import KosmosGAutoBlocks, KosmosGModularPipeline  # noqa: E402

MASK = PIL.Image.fromarray((np.indices((64, 64))[0] > 30).astype(np.uint8) * 255)
BLOCK = "mid_block.attentions.0.transformer_blocks"


@pytest.fixture(scope="module")
def square(photos):
    """Three pictures of the size that is drawn."""
    return [photo.resize((64, 64)) for photo in photos[:3]]


@pytest.fixture
def modular(pipe, build_controlnet):
    """The modular pipeline around the components of `pipe`, and a ControlNet."""
    return around(pipe, build_controlnet(pipe.unet))


def around(pipe, controlnet=None):
    modular = KosmosGAutoBlocks().init_pipeline()
    parts = {name: pipe.components.get(name) for name in modular.component_names}
    modular.update_components(**{name: part for name, part in parts.items() if part is not None})
    if controlnet is not None:
        modular.update_components(controlnet=controlnet)
    modular.set_progress_bar_config(disable=True)
    return modular


def draw_both(pipe, modular, task, guidance_scale, call, seed=3, **settings):
    """Images of the ordinary class and of the modular pipeline, from the same call and seed, as float64 arrays."""
    cls = getattr(kosmos_g_diffusers, f"KosmosG{task}Pipeline")
    parts = {"controlnet": modular.controlnet} if "ControlNet" in task else {}
    ordinary = cls.from_pipe(pipe, **parts)
    ordinary.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np"} | settings

    def generator():
        several = [torch.Generator().manual_seed(each) for each in seed] if isinstance(seed, list) else None
        return several or torch.Generator().manual_seed(seed)

    given = dict(call)
    if task == "ControlNet":  # which calls the control image so
        given["image"] = given.pop("control_image")
    expected = ordinary(**given, **settings, guidance_scale=guidance_scale, generator=generator()).images
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    drawn = modular(**call, **settings, generator=generator(), output="images")
    return [
        np.stack([np.asarray(image, dtype=np.float64) for image in images]) for images in (expected, drawn)
    ]


def assert_equal_images(pipe, modular, task, call, **settings):
    """Bit for bit without guidance; with it the U-Net reads both conditions at once or one after the other."""
    for guidance_scale, tolerance in ((1.0, 0.0), (6.0, 1e-4)):
        expected, drawn = draw_both(pipe, modular, task, guidance_scale, call, **settings)
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=tolerance)


def inputs_of(task, square):
    call = {"prompt": ["<i> in a hat", "a suit"], "images": [square[:1], []], "negative_prompt": "furniture"}
    call |= {"image": square[1]} if "Img2Img" in task else {}
    call |= {"image": square[1], "mask_image": MASK} if "Inpaint" in task else {}
    return call | ({"control_image": square[2]} if "ControlNet" in task else {})


TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")


@pytest.mark.parametrize("task", TASKS)
def test_workflow_draws_the_images_of_the_ordinary_class(pipe, modular, square, task):
    assert_equal_images(pipe, modular, task, inputs_of(task, square))
    few = {"strength": 0.7} if "I" in task.removeprefix("Control") else {"eta": 0.5}
    settings = {"num_images_per_prompt": 2, "seed": [1, 2, 3, 4], "num_inference_steps": 2, **few}
    expected, drawn = draw_both(pipe, modular, task, 6.0, inputs_of(task, square), **settings)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint", "ControlNetInpaint"])
def test_workflow_with_an_ip_adapter_draws_the_images_of_the_ordinary_class(
    pipe, modular, square, tmp_path, task
):
    files = write_ip_adapter(tmp_path, pipe.unet)
    pipe.load_ip_adapter(**files)
    pipe.set_ip_adapter_scale(0.7)
    assert isinstance(modular, ModularIPAdapterMixin)
    modular.update_components(
        image_encoder=pipe.image_encoder
    )  # the extractor is made as load_ip_adapter makes it
    call = {**inputs_of(task, square), "ip_adapter_image": square[2]}
    assert_equal_images(pipe, modular, task, call)


@pytest.mark.parametrize(
    ("scheduler", "task"),
    [
        (PNDMScheduler, ""),
        (HeunDiscreteScheduler, "Img2Img"),
        (EulerAncestralDiscreteScheduler, "Inpaint"),
        (LCMScheduler, "Inpaint"),
    ],
)
def test_schedulers_of_all_kinds_draw_the_same(pipe, modular, square, scheduler, task):
    """With more calls of the U-Net than steps too, which guiders count; with noise in every step."""
    config = {**pipe.scheduler.config, "skip_prk_steps": True}  # Stable Diffusion 1.5's PNDM
    pipe.scheduler = scheduler.from_config(config)
    modular.update_components(scheduler=scheduler.from_config(config))
    assert_equal_images(pipe, modular, task, inputs_of(task, square))


def build_unet(pipe, **changes):
    config = {name: value for name, value in pipe.unet.config.items() if name != "_use_default_values"}
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**config, **changes}).eval()


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_unet_for_inpainting_draws_the_same_under_a_controlnet_as_well(
    pipe, square, build_controlnet, strength
):
    controlnet = build_controlnet(pipe.unet)
    pipe.unet = build_unet(pipe, in_channels=9)
    modular = around(pipe, controlnet)
    for task in ("Inpaint", "ControlNetInpaint"):
        assert_equal_images(pipe, modular, task, inputs_of(task, square), strength=strength)


def test_unet_with_guidance_built_in_draws_the_same(pipe, square):
    pipe.unet = build_unet(pipe, time_cond_proj_dim=32)
    modular = around(pipe)
    for guidance_scale in (3.0, 8.0):
        expected, drawn = draw_both(pipe, modular, "", guidance_scale, inputs_of("", square))
        assert np.array_equal(expected, drawn)
    assert modular.guider.get_state()["enabled"]


def test_several_controlnets_and_guess_mode_draw_the_same(pipe, square, build_controlnet):
    controlnet = MultiControlNetModel([build_controlnet(pipe.unet), build_controlnet(pipe.unet, seed=1)])
    modular = around(pipe, controlnet)
    call = {**inputs_of("ControlNet", square), "control_image": [square[:2], square[1:3]]}
    assert_equal_images(pipe, modular, "ControlNet", call, controlnet_conditioning_scale=[0.5, 0.9])
    call = {**inputs_of("ControlNetImg2Img", square), "control_image": square[:2]}
    assert_equal_images(pipe, modular, "ControlNetImg2Img", call, control_guidance_end=[0.5, 1.0])
    modular.update_components(controlnet=controlnet.nets[0])
    assert_equal_images(pipe, modular, "ControlNet", inputs_of("ControlNet", square), guess_mode=True)


def test_sizes_latents_crops_and_files_are_taken_as_by_the_ordinary_class(pipe, modular, square, tmp_path):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    one = {"prompt": "<i> in a hat", "images": square[:1]}
    square[1].convert("RGBA").save(tmp_path / "image.png")
    inpainting = {**one, "image": square[1], "mask_image": MASK}
    for task, call in (
        ("", {**one, "height": 32, "width": 48}),
        ("", {**one, "latents": latents, "clip_skip": 1}),
        ("ControlNet", {**one, "control_image": square[2].resize((48, 32))}),
        ("Img2Img", {**one, "image": str(tmp_path / "image.png")}),
        ("Img2Img", {**one, "image": latents}),
        ("Inpaint", {**inpainting, "latents": latents, "strength": 0.8}),
        ("Inpaint", {**inpainting, "padding_mask_crop": 4, "output_type": "pil"}),
        (
            "ControlNetInpaint",
            {**inpainting, "control_image": square[0], "padding_mask_crop": 4, "output_type": "pil"},
        ),
    ):
        settings = {"output_type": call.pop("output_type", "np")}
        expected, drawn = draw_both(pipe, modular, task, 1.0, call, **settings)
        assert np.array_equal(expected, drawn), (task, list(call))


# Guiders -----------------------------------------------------------------------------------------------------------


def test_guiders_take_each_others_place(modular, square):
    call = {"prompt": "<i> in a hat", "images": square[:1], "num_inference_steps": 5, "output_type": "np"}
    everywhere = {"start": 0.0, "stop": 1.0}

    def drawn(guider):
        modular.update_components(guider=guider)
        images = [
            modular(**call, generator=torch.Generator().manual_seed(0), output="images") for _ in range(2)
        ]
        assert np.isfinite(images[0]).all() and np.array_equal(*images)  # a call leaves nothing behind
        return images[0]

    def span(name):
        return {f"{name}_{end}": value for end, value in everywhere.items()}

    scores = LayerSkipConfig([0], BLOCK, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    found = {
        "none": drawn(ClassifierFreeGuidance(1.0)),
        "cfg": drawn(ClassifierFreeGuidance(6.0)),
        "part": drawn(ClassifierFreeGuidance(6.0, start=0.2, stop=0.6)),
        "pag": drawn(
            PerturbedAttentionGuidance(6.0, perturbed_guidance_config=scores, **span("perturbed_guidance"))
        ),
        "slg": drawn(
            SkipLayerGuidance(
                6.0, skip_layer_config=LayerSkipConfig([0], BLOCK), **span("skip_layer_guidance")
            )
        ),
        "apg": drawn(AdaptiveProjectedGuidance(6.0, adaptive_projected_guidance_momentum=-0.5)),
        "zero": drawn(ClassifierFreeZeroStarGuidance(6.0)),
        "tangential": drawn(TangentialClassifierFreeGuidance(6.0)),
    }
    images = list(found.values())
    for index, image in enumerate(images):
        assert all(np.abs(image - other).max() > 1e-4 for other in images[:index]), list(found)[index]
    # a guider that is off stays off; diffusers' loop would switch it on
    off = ClassifierFreeGuidance(6.0, enabled=False)
    assert np.array_equal(drawn(off), found["none"]) and not off.get_state()["enabled"]
    # diffusers 0.42 counts no batches in this one, so that its blur is never applied: classifier-free guidance remains
    smoothed = SmoothedEnergyGuidance(
        6.0, seg_guidance_config=SmoothedEnergyGuidanceConfig([0], BLOCK), **span("seg_guidance")
    )
    assert np.abs(drawn(smoothed) - found["none"]).max() > 1e-4
    for registry in (module for module in modular.unet.modules() if hasattr(module, "_diffusers_hook")):
        assert not registry._diffusers_hook.hooks


def test_guiders_see_pictures_and_image_words_of_both_prompts(pipe, square):
    pipe.add_image_word("<cup>", square[1])
    modular = around(pipe)
    settings = {"num_inference_steps": 2, "output_type": "np"}

    def drawn(**call):
        return modular(**call, **settings, generator=torch.Generator().manual_seed(0), output="images")

    images = [
        drawn(prompt="<i>", images=square[:1]),
        drawn(prompt=[square[2]]),
        drawn(prompt="<cup>"),
        drawn(prompt="<cup>", negative_prompt="a <i>", negative_images=square[:1]),
    ]
    for index, image in enumerate(images):
        assert all(np.abs(image - other).max() > 1e-4 for other in images[:index])
    assert np.abs(drawn(prompt=[square[1]]) - images[2]).max() < 1e-4


# Blocks ------------------------------------------------------------------------------------------------------------


def test_workflows_have_the_names_of_diffusers_and_need_what_they_use():
    blocks = KosmosGAutoBlocks()
    others = [name for name in StableDiffusionXLAutoBlocks().available_workflows if "union" not in name]
    assert blocks.available_workflows == others
    steps = {name: list(blocks.get_workflow(name).sub_blocks) for name in others}
    core = ["denoise.input", "denoise.set_timesteps", "denoise.prepare_latents"]
    assert steps["text2image"] == ["text_encoder", *core, "denoise.denoise", "decode"]
    assert steps["ip_adapter_controlnet_inpainting"] == [
        *("text_encoder", "ip_adapter", "vae_encoder", *core, "denoise.controlnet_input"),
        *("denoise.denoise", "decode"),
    ]
    plain = {"text_encoder", "tokenizer", "guider", "unet", "vae", "scheduler"}
    for name in others:
        extra = {"controlnet"} if "controlnet" in name else set()
        extra |= {"image_encoder", "feature_extractor"} if "ip_adapter" in name else set()
        pruned = blocks.get_workflow(name).init_pipeline()
        assert isinstance(pruned, KosmosGModularPipeline) and set(pruned.component_names) == plain | extra
        assert all(block.description for block in pruned.blocks.sub_blocks.values())
    assert "A string with a <i>" in blocks.doc


def test_workflow_that_was_pruned_draws_the_same(pipe, modular, square):
    call = {**inputs_of("Img2Img", square), "num_inference_steps": 3, "output_type": "np"}
    expected = modular(**call, generator=torch.Generator().manual_seed(0), output="images")
    pruned = modular.blocks.get_workflow("image2image").init_pipeline()
    pruned.update_components(
        **{name: getattr(modular, name) for name in pruned.component_names if name != "guider"}
    )
    drawn = pruned(**call, generator=torch.Generator().manual_seed(0), output="images")
    assert np.array_equal(expected, drawn)


def test_blocks_are_taken_out_and_put_in(pipe, modular, square):
    call = {**inputs_of("", square), "num_inference_steps": 2, "output_type": "np"}
    expected = modular(**call, generator=torch.Generator().manual_seed(0), output="images")
    blocks = KosmosGAutoBlocks()
    encoder = blocks.sub_blocks.pop("text_encoder").init_pipeline()
    assert "prompt" not in blocks.input_names and "prompt_embeds" in blocks.input_names
    encoder.update_components(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    embeds = encoder(
        **{name: call.pop(name) for name in ("prompt", "images", "negative_prompt")}, output=names
    )
    rest = blocks.init_pipeline()
    rest.update_components(unet=pipe.unet, vae=pipe.vae, scheduler=pipe.scheduler)
    assert np.array_equal(
        rest(**embeds, **call, generator=torch.Generator().manual_seed(0), output="images"), expected
    )

    class Mirror(ModularPipelineBlocks):
        inputs = [InputParam("images", required=True)]
        intermediate_outputs = [OutputParam("images")]

        def __call__(self, components, state):
            values = self.get_block_state(state)
            values.images = values.images[:, :, ::-1]
            self.set_block_state(state, values)
            return components, state

    blocks.sub_blocks.insert("mirror", Mirror(), len(blocks.sub_blocks))
    rest = blocks.init_pipeline()
    rest.update_components(unet=pipe.unet, vae=pipe.vae, scheduler=pipe.scheduler)
    drawn = rest(**embeds, **call, generator=torch.Generator().manual_seed(0), output="images")
    assert np.array_equal(drawn[:, :, ::-1], expected)


def test_no_component_is_changed_by_a_call(pipe, modular, square, snapshot):
    parts = {name: getattr(modular, name) for name in ("text_encoder", "unet", "vae", "controlnet")}
    before = {name: snapshot(part) for name, part in parts.items()}
    configs = dict(modular.scheduler.config), dict(modular.guider.config)
    modular(**inputs_of("ControlNetInpaint", square), num_inference_steps=2)
    after = {name: snapshot(part) for name, part in parts.items()}
    for name in parts:
        assert before[name].keys() == after[name].keys()
        for key in ("config", "modules", "dtypes"):
            assert before[name][key] == after[name][key]
        for key, value in before[name]["weights"].items():
            assert torch.equal(value, after[name]["weights"][key])
    assert configs == (dict(modular.scheduler.config), dict(modular.guider.config))


def test_progress_bars_are_silenced_and_shown(modular, capsys):
    modular(prompt="a hat", num_inference_steps=2, output_type="latent")
    assert not capsys.readouterr().err
    modular.set_progress_bar_config(disable=False)
    modular(prompt="a hat", num_inference_steps=2, output_type="latent")
    assert "2/2" in capsys.readouterr().err


# Mistakes ----------------------------------------------------------------------------------------------------------


def test_missing_component_is_named_before_a_model_runs(modular, square, pipe, no_model_runs):
    modular.update_components(controlnet=None, unet=None)
    with no_model_runs(pipe):
        with pytest.raises(ValueError, match=r"missing: unet\. .*load_components\(\) or .*unet=\.\.\."):
            modular(prompt="a hat")
        with pytest.raises(ValueError, match="missing: unet, controlnet"):
            modular(prompt="a hat", control_image=square[0])
        with pytest.raises(ValueError, match="missing: image_encoder"):
            modular(prompt="a hat", ip_adapter_image=square[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt"),
        ({"height": 64}, "height=64 and width=None"),
        ({"generator": 3}, "torch.Generator"),
        ({"image": slice(0, 1), "strength": 0.01}, "no step"),
        ({"image": slice(0, 1), "strength": float("nan")}, "strength"),
        ({"prompt": "<i> <i>", "images": slice(0, 1)}, "'<i>'"),
        ({"prompt": None}, "prompt"),
        ({"ip_adapter_image": slice(0, 1)}, "none is loaded|image_encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_mistakes_are_the_errors_of_the_ordinary_class_before_a_model_runs(
    pipe, modular, square, no_model_runs, call, message
):
    call = {name: square[value] if isinstance(value, slice) else value for name, value in call.items()}
    with no_model_runs(pipe), pytest.raises((ValueError, TypeError), match=message):
        modular(**{"prompt": "a hat", **call})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 63, "width": 64}, "multiples of 8"),
        ({"image": slice(0, 1), "strength": 1.5}, "from 0 to 1"),
        ({"control_image": slice(0, 3)}, "3 control images were given for 1 prompts"),
        ({"control_image": slice(0, 1), "height": 32, "width": 32}, "Make them of one size"),
        (
            {"image": slice(0, 1), "generator": [torch.Generator()] * 3, "num_images_per_prompt": 2},
            "3 generators",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_mistakes_are_errors_before_the_unet_runs(modular, square, call, message):
    call = {name: square[value] if isinstance(value, slice) else value for name, value in call.items()}
    modular.unet.forward = None
    with pytest.raises(ValueError, match=message):
        modular(**{"prompt": "a hat", "num_inference_steps": 2, **call})


def test_parts_that_do_not_fit_are_refused(pipe, modular):
    pipe.unet.to(torch.float64)
    with pytest.raises(ValueError, match="different dtypes"):
        modular(prompt="a hat")
