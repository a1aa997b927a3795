"""Maps of real pipelines of toy size: compared with attention computed by the libraries' own plain code, and by property."""

import copy
import inspect
import sys
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from support.composing import borrow, write_ip_adapter

from kosmos_g_diffusers import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
)
from kosmos_g_diffusers.maps import regions_of

SIX = (
    KosmosGPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
)
PROMPT = "a <i> in the suit of <i>"
LABELS = ["image 1", "image 2", "words", "null token"]


def call(pipe, prompt=PROMPT, seed=0, **arguments):
    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "np"}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings | arguments)


def hooks_of(pipe):
    """All that a call hangs into its components."""
    modules = [*pipe.unet.modules(), *pipe.text_encoder.modules()]
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules)
    return hooks, "step" in vars(pipe.scheduler), [*pipe.unet.attn_processors.values()]


# What a map is -----------------------------------------------------------------------------------------------------


class Remembering(AttnProcessor):
    """diffusers' own processor without fused kernels, which writes down what it computes."""

    seen = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **keywords):
        original = attn.get_attention_scores

        def scores(*arguments):
            weights = original(*arguments)
            if encoder_hidden_states is not None:
                self.seen.append(weights.unflatten(0, (-1, attn.heads)).mean(1))
            return weights

        attn.get_attention_scores = scores
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **keywords)
        finally:
            del attn.get_attention_scores


def attention_of_the_aligner(pipe, photos):
    """(K, tokens): of transformers' eager attention, over layers and heads."""
    encoder, seen = copy.deepcopy(pipe.text_encoder), []
    for layer in encoder.aligner.query_layers:
        layer.encoder_attn.config._attn_implementation = "eager"
        layer.encoder_attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    with torch.no_grad():
        encoder(**pipe.get_processor()(PROMPT, photos[:2]))
    return torch.cat(seen).mean((0, 1))


def test_map_is_the_product_of_the_attention_of_unet_and_aligner(pipe, photos):
    tokens = attention_of_the_aligner(pipe, photos)
    # <s>, a, an image of 6 tokens, in the suit of, an image
    of = [[*range(2, 8)], [*range(12, 18)], [1, *range(8, 12)], [0]]
    sources = torch.stack([tokens[:, columns].sum(-1) for columns in of], 1)
    assert torch.allclose(sources.sum(1), torch.ones(len(sources)))
    remembering = Remembering()
    remembering.seen.clear()
    pipe.unet.set_attn_processor(remembering)
    output = call(pipe, images=photos[:2], return_maps=True, num_inference_steps=5)
    # by steps: of 4 x 4 places a layer of the down blocks and two of the up block; with guidance, the prompt's rows come last
    seen = torch.stack([weights[-1] for weights in remembering.seen if weights.shape[1] == 16])
    seen = seen.unflatten(0, (5, 3))[:, 1:]
    expected = (seen[2:].mean((0, 1)) @ sources).T.unflatten(-1, (4, 4))
    (found,) = output.maps
    assert found.dtype == torch.float32 and found.shape == (4, 4, 4)
    assert torch.allclose(found, expected, atol=1e-5)
    assert output.map_labels == [LABELS]


@pytest.mark.parametrize("cls", SIX)
def test_all_six_pipelines_tell_where_images_went_and_draw_the_same(pipe, build_controlnet, photos, cls):
    name, size = cls.__name__, (32, 32)
    parts = {"controlnet": build_controlnet(pipe.unet)} if "ControlNet" in name else {}
    other, picture = borrow(cls, pipe, **parts), photos[2].resize(size)
    given = {"height": None, "width": None, "images": photos[:2]}
    if "Img2Img" in name or "Inpaint" in name:
        given |= {"image": picture, "strength": 0.8}
        given |= {"control_image": picture} if parts else {}
    elif parts:
        given["image"] = picture
    if "Inpaint" in name or "image" not in given:
        given |= {"height": 32, "width": 32}
    if "Inpaint" in name:
        given["mask_image"] = PIL.Image.new("L", size, 255)
    if "Img2Img" in name:
        del given["height"], given["width"]
    settings = {"num_inference_steps": 4, "output_type": "np"}
    plain, seen = (
        other(PROMPT, generator=torch.Generator().manual_seed(0), **settings, **given, **more)
        for more in ({}, {"return_maps": True})
    )
    assert np.array_equal(plain.images, seen.images)
    assert type(plain).__name__ == "StableDiffusionPipelineOutput"
    (found,) = seen.maps
    assert found.shape == (4, 4, 4) and seen.map_labels == [LABELS]
    assert torch.allclose(found.sum(0), torch.ones(4, 4))
    for name in ("return_maps", "binding", "regions"):
        assert name in inspect.signature(cls.__call__).parameters
    half = (0, 0, 0.5, 1)
    for more in ({"binding": 1.0}, {"regions": [half, None]}):
        steered = other(PROMPT, generator=torch.Generator().manual_seed(0), **settings, **given, **more)
        assert np.isfinite(steered.images).all() and not np.array_equal(steered.images, plain.images)


def test_maps_are_in_the_order_of_the_images_and_a_prompt_has_its_own_sources(pipe, photos):
    pipe.add_image_word("<dog>", photos[:2])
    prompts, images = ["<i> in a hat", "furniture", "<dog> and <i>"], [[photos[2]], [], [photos[3]]]
    both = call(pipe, prompts, images=images, return_maps=True, num_images_per_prompt=2)
    labels = [["image 1"], [], ["<dog>", "image 1"]]
    assert both.map_labels == [[*row, "words", "null token"] for row in labels for _ in range(2)]
    assert [len(one) for one in both.maps] == [3, 3, 2, 2, 4, 4]
    alone = call(pipe, prompts[2], images=images[2], return_maps=True)
    again = call(pipe, prompts[2:], images=images[2:], return_maps=True, return_dict=False)
    assert torch.equal(again[2][0], alone.maps[0]) and again[3] == alone.map_labels
    assert all(torch.allclose(one.sum(0), torch.ones(one.shape[1:])) for one in both.maps)


def test_maps_without_guidance_and_of_a_size_that_is_not_square(pipe, photos):
    output = call(pipe, images=photos[:2], return_maps=True, guidance_scale=1.0, height=40, width=64)
    assert output.maps[0].shape == (4, 5, 8)


def test_sliced_and_fused_attention_give_the_same_maps(pipe, photos):
    expected = call(pipe, images=photos[:2], return_maps=True).maps[0]
    pipe.enable_attention_slicing(1)
    assert any(isinstance(one, SlicedAttnProcessor) for one in pipe.unet.attn_processors.values())
    assert torch.allclose(call(pipe, images=photos[:2], return_maps=True).maps[0], expected, atol=1e-5)
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections(vae=False)
    assert torch.allclose(call(pipe, images=photos[:2], return_maps=True).maps[0], expected, atol=1e-5)
    bound = call(pipe, images=photos[:2], binding=1.0).images
    pipe.unfuse_qkv_projections(vae=False)
    assert np.allclose(bound, call(pipe, images=photos[:2], binding=1.0).images, atol=1e-3)


def test_compiled_text_encoder_tells_the_same(pipe, photos):
    expected = call(pipe, images=photos[:2], return_maps=True).maps[0]
    pipe.text_encoder.compile(backend="eager")
    assert torch.allclose(call(pipe, images=photos[:2], return_maps=True).maps[0], expected, atol=1e-5)


def test_region_is_where_an_image_draws_two_thirds():
    maps = torch.tensor([[0.7, 0.6, 0.0], [0.1, 0.1, 0.9], [0.1, 0.2, 0.05], [0.1, 0.1, 0.05]])[:, None]
    expected = torch.tensor([[[True, False, False]], [[False, False, True]]])
    assert torch.equal(regions_of(maps, LABELS), expected)
    assert regions_of(maps, LABELS, (4, 12)).shape == (2, 4, 12)


# Nothing stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "asked", [{"return_maps": True}, {"binding": 1.0}, {"regions": [None, (0, 0, 1, 0.5)]}]
)
def test_components_are_as_before_after_a_call_an_error_and_ctrl_c(pipe, photos, snapshot, asked, error):
    def stop(pipeline, step, timestep, tensors):
        if error and step == 1:
            raise error("stop")
        return {}

    before = [hooks_of(pipe), snapshot(pipe.unet), snapshot(pipe.text_encoder)]
    given = {"images": photos[:2], "callback_on_step_end": stop, **asked}
    if error:
        with pytest.raises(error, match="stop"):
            call(pipe, **given)
    else:
        call(pipe, **given)
    after = [hooks_of(pipe), snapshot(pipe.unet), snapshot(pipe.text_encoder)]
    assert after[0] == before[0]
    for old, new in zip(before[1:], after[1:], strict=True):
        assert old["modules"] == new["modules"]
        assert all(torch.equal(value, new["weights"][name]) for name, value in old["weights"].items())
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_error_inside_the_unet_while_latents_are_moved_leaves_nothing(pipe, photos, monkeypatch):
    before = hooks_of(pipe)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        call(pipe, images=photos[:2], binding=1.0)
    assert hooks_of(pipe) == before


def test_gradient_that_is_not_finite_moves_nothing(pipe, photos, monkeypatch):
    gradients = []
    original = torch.autograd.grad

    def spoil(*arguments, **keywords):
        gradients.append(original(*arguments, **keywords)[0])
        return (torch.full_like(gradients[-1], torch.nan),)

    monkeypatch.setattr(torch.autograd, "grad", spoil)
    spoiled = call(pipe, images=photos[:2], regions=[(0, 0, 0.5, 1), None]).images
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: (torch.zeros_like(gradients[0]),))
    assert np.array_equal(spoiled, call(pipe, images=photos[:2], regions=[(0, 0, 0.5, 1), None]).images)
    assert len(gradients) == 2 and gradients[0].abs().max() > 0


def test_another_thread_that_draws_with_the_same_unet_is_not_seen(pipe, photos):
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = borrow(KosmosGPipeline, pipe, scheduler=scheduler)
    expected = [
        call(pipe, images=photos[:2], return_maps=True, binding=1.0),
        call(other, images=photos[2:], seed=1),
    ]
    found = {}

    def draw_meanwhile(pipeline, step, timestep, tensors):
        if step == 1:
            thread = threading.Thread(
                target=lambda: found.update(other=call(other, images=photos[2:], seed=1))
            )
            thread.start()
            thread.join()
        return {}

    output = call(pipe, images=photos[:2], return_maps=True, binding=1.0, callback_on_step_end=draw_meanwhile)
    assert np.array_equal(output.images, expected[0].images)
    assert torch.equal(output.maps[0], expected[0].maps[0])
    assert np.array_equal(found["other"].images, expected[1].images)


def test_lora_keeps_acting(pipe, photos):
    pytest.importorskip("peft")
    from support.loras import make_lora, with_prefix

    before = call(pipe, images=photos[:2], return_maps=True)
    pipe.load_lora_weights(with_prefix(make_lora(pipe.unet)))
    plain, seen = (call(pipe, images=photos[:2], return_maps=flag) for flag in (False, True))
    assert np.array_equal(plain.images, seen.images) and not np.array_equal(plain.images, before.images)
    assert (seen.maps[0] - before.maps[0]).abs().max() > 1e-3
    assert not np.array_equal(call(pipe, images=photos[:2], binding=1.0).images, plain.images)


def test_ip_adapter_keeps_acting(pipe, photos, tmp_path):
    before = call(pipe, images=photos[:2], return_maps=True)
    pipe.load_ip_adapter(**write_ip_adapter(tmp_path, pipe.unet))
    arguments = {"images": photos[:2], "ip_adapter_image": photos[2]}
    processors = dict(pipe.unet.attn_processors)
    plain, seen = (call(pipe, **arguments, return_maps=flag) for flag in (False, True))
    assert np.array_equal(plain.images, seen.images) and not np.array_equal(plain.images, before.images)
    assert torch.allclose(seen.maps[0].sum(0), torch.ones(()))
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    guided = call(pipe, **arguments, binding=1.0, regions=[left, right]).images
    pipe.set_ip_adapter_scale(0.0)
    without = call(pipe, **arguments, binding=1.0, regions=[left, right]).images
    bare = call(pipe, **arguments, return_maps=True)
    assert np.isfinite(guided).all() and not np.array_equal(guided, plain.images)
    assert not np.array_equal(guided, without)
    assert torch.allclose(bare.maps[0], before.maps[0], atol=1e-5)  # the prompt's attention alone is read
    assert dict(pipe.unet.attn_processors) == processors


@pytest.mark.parametrize("compile_it", [lambda unet: torch.compile(unet, backend="eager"), None])
def test_compiled_unet_is_an_error_that_says_so_before_a_model_runs(pipe, photos, no_model_runs, compile_it):
    if compile_it:
        pipe.unet = compile_it(pipe.unet)
    else:
        pipe.unet.compile(backend="eager")
    for asked in ({"return_maps": True}, {"binding": 1.0}, {"regions": [None, (0, 0, 1, 1)]}):
        with pytest.raises(ValueError, match="The U-Net is compiled"):
            call(pipe, images=photos[:2], **asked)


def test_code_of_a_saved_folder_finds_maps_where_the_package_is_and_says_what_to_install_elsewhere(
    pipe, photos, tmp_path, monkeypatch
):
    expected = call(pipe, images=photos[:2], return_maps=True)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert not isinstance(loaded, KosmosGPipeline)
    assert torch.allclose(
        call(loaded, images=photos[:2], return_maps=True).maps[0], expected.maps[0], atol=1e-5
    )
    monkeypatch.setitem(sys.modules, "kosmos_g_diffusers.maps", None)  # as where it is not installed
    with pytest.raises(ImportError, match="pip install kosmos-g-diffusers"):
        call(loaded, images=photos[:2], return_maps=True)
    assert np.array_equal(call(loaded, images=photos[:2]).images, expected.images)


# Guidance ------------------------------------------------------------------------------------------------------------


def test_binding_needs_two_images_and_leaves_others_as_they_are(pipe, photos):
    one = {"prompt": "<i> in a hat", "images": [photos[0]]}
    assert np.array_equal(call(pipe, **one).images, call(pipe, **one, binding=2.0).images)
    text = {"prompt": "furniture"}
    assert np.array_equal(call(pipe, **text).images, call(pipe, **text, binding=1.0).images)
    assert np.array_equal(
        call(pipe, images=photos[:2]).images, call(pipe, images=photos[:2], binding=0).images
    )
    batch = call(pipe, [PROMPT, "<i> in a hat"], images=[photos[:2], [photos[0]]])
    bound = call(pipe, [PROMPT, "<i> in a hat"], images=[photos[:2], [photos[0]]], binding=1.0)
    difference = np.abs(batch.images - bound.images).max((1, 2, 3))
    assert difference[0] > 1e-3 and difference[1] < 1e-4


def test_binding_works_without_guidance_in_inference_mode_and_with_several_images_of_a_prompt(pipe, photos):
    plain = call(pipe, images=photos[:2], guidance_scale=1.0).images
    with torch.inference_mode():
        bound = call(pipe, images=photos[:2], guidance_scale=1.0, binding=1.0, return_maps=True)
    assert not np.array_equal(bound.images, plain)
    several = call(pipe, images=photos[:2], binding=1.0, num_images_per_prompt=2).images
    first = call(pipe, images=photos[:2], binding=1.0)
    assert len(several) == 2 and np.isfinite(several).all() and first.images.shape[1:] == several.shape[1:]


def test_half_precision_gives_float32_maps_and_finite_images(pipe, photos):
    pipe.to(torch.bfloat16)
    asked = {"binding": 1.0, "regions": [(0, 0, 0.5, 1), None], "return_maps": True}
    output = call(pipe, images=photos[:2], **asked)
    assert np.isfinite(output.images).all() and output.maps[0].dtype == torch.float32
    assert torch.allclose(output.maps[0].sum(0), torch.ones(4, 4), atol=1e-5)


def test_a_free_region_changes_nothing_and_a_box_is_its_mask(pipe, photos):
    plain = call(pipe, images=photos[:2]).images
    assert np.array_equal(call(pipe, images=photos[:2], regions=[None, None]).images, plain)
    box = call(pipe, images=photos[:2], regions=[(0, 0, 0.5, 1), None]).images
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    for same in (mask, torch.from_numpy(mask), PIL.Image.fromarray(mask), mask > 0):
        assert np.array_equal(call(pipe, images=photos[:2], regions=[same, None]).images, box)
    assert np.array_equal(call(pipe, images=photos[:2], regions=[[[0, 0, 0.5, 1], None]]).images, box)
    assert not np.array_equal(box, plain)


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler])
def test_latents_that_were_moved_are_those_that_the_scheduler_goes_on_from(pipe, photos, scheduler):
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    given, gone_on_from, step = [], [], pipe.scheduler.step

    def record(unet, inputs, keywords):
        sample = inputs[0] if inputs else keywords["sample"]
        if not sample.requires_grad and not torch.is_grad_enabled():
            given.append(sample[-1:].clone())

    class Recording(type(pipe.scheduler)):
        def step(self, model_output, timestep, sample, *arguments, **keywords):
            scaled = self.scale_model_input(sample, timestep)
            gone_on_from.append(scaled.clone())
            return super().step(model_output, timestep, sample, *arguments, **keywords)

    assert step
    pipe.scheduler = Recording.from_config(pipe.scheduler.config)
    # behind our own hooks: those of a call are registered later
    original = pipe.unet.forward

    def forward(*inputs, **keywords):
        record(pipe.unet, inputs, keywords)
        return original(*inputs, **keywords)

    pipe.unet.forward = forward
    call(pipe, images=photos[:2], binding=1.0, num_inference_steps=5)
    assert len(given) == len(gone_on_from) == 5
    for before, after in zip(given, gone_on_from, strict=True):
        assert torch.allclose(before, after, atol=1e-4)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"return_maps": "yes"}, "return_maps='yes'.*True or False"),
        ({"binding": -1}, "binding=-1 .*from 0"),
        ({"binding": float("nan")}, "binding=nan"),
        ({"binding": float("inf")}, "binding=inf"),
        ({"binding": True}, "binding=True"),
        ({"binding": "1"}, "binding='1'"),
        ({"binding": None}, "binding=None"),
        ({"regions": [(0, 0, 1, 1)]}, "1 regions were given for prompt 0, which has 2 images"),
        ({"regions": []}, "0 regions were given for prompt 0"),
        ({"regions": (0, 0, 0.5, 1)}, "4 regions|regions"),
        ({"regions": [None, (0.5, 0, 0.5, 1)]}, "image 2 is .*x0 < x1"),
        ({"regions": [None, (0, 0.6, 1, 0.5)]}, "y0 < y1"),
        ({"regions": [None, (0, 0, 1.2, 1)]}, "from 0 to 1"),
        ({"regions": [None, (-0.1, 0, 1, 1)]}, "from 0 to 1"),
        ({"regions": [None, (0, 0, float("nan"), 1)]}, "four numbers"),
        ({"regions": [None, (0, 0, 1)]}, "four numbers"),
        ({"regions": [None, (0, 0, 1, True)]}, "four numbers"),
        ({"regions": [None, ("0", "0", "1", "1")]}, "four numbers"),
        ({"regions": [None, "left"]}, "of type str"),
        ({"regions": [None, 0.5]}, "of type float"),
        ({"regions": "left"}, "of type str"),
        ({"regions": {0: None}}, "of type dict"),
        ({"regions": [None, np.ones((16, 16))]}, "16 x 16 pixels, and the image has 32 x 32"),
        ({"regions": [None, PIL.Image.new("L", (32, 40), 255)]}, "32 x 40 pixels"),
        ({"regions": [None, np.zeros((32, 32))]}, "marks nothing"),
        ({"regions": [None, np.full((32, 32), 0.2)]}, "dark all over"),
        ({"regions": [None, np.full((32, 32), np.nan)]}, "image 2"),
        ({"regions": [[None, None], [None, None]]}, "2 entries was given for 1 prompts"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_a_model_runs(pipe, photos, no_model_runs, asked, match):
    with no_model_runs(pipe), pytest.raises((ValueError, TypeError), match=match) as caught:
        call(pipe, images=photos[:2], **asked)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_regions_of_a_batch_and_ready_embeddings_are_refused_in_one_line(pipe, photos, no_model_runs):
    batch = {"prompt": [PROMPT, "furniture"], "images": [photos[:2], []]}
    right = [[None, (0, 0, 1, 0.5)], []]
    for regions in ([None, (0, 0, 1, 1)], right[:1], [right[0], [None]], [None, None, None]):
        with no_model_runs(pipe), pytest.raises((ValueError, TypeError), match="regions"):
            call(pipe, **batch, regions=regions)
    assert np.isfinite(call(pipe, **batch, regions=right).images).all()
    assert np.isfinite(call(pipe, **batch, regions=[right[0], None]).images).all()
    with torch.no_grad():
        embeds = pipe.encode_prompt(PROMPT, images=photos[:2])
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
    for asked in ({"return_maps": True}, {"binding": 1.0}, {"regions": [None, None]}):
        with no_model_runs(pipe), pytest.raises(ValueError, match="prompt_embeds, which do not say"):
            call(pipe, prompt=None, **given, **asked)


def test_image_words_are_placed_as_images_are(pipe, photos):
    pipe.add_image_word("<dog>", photos[0])
    prompt, box = "<dog> in the suit of <i>", (0, 0, 0.5, 1)
    placed = call(pipe, prompt, images=[photos[1]], regions=[box, None]).images
    assert not np.array_equal(placed, call(pipe, prompt, images=[photos[1]]).images)
    with pytest.raises(ValueError, match="1 regions.*2 images"):
        call(pipe, prompt, images=[photos[1]], regions=[box])
