"""KosmosGPipeline: official samples, every form of prompt, the drop-in promise to stock pipelines, image words, bad input."""

import copy
import inspect
import json
import os
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from kosmos_g_diffusers import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
    KosmosGTokenizer,
    pipeline_kosmos_g,
)

OURS = (
    KosmosGPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def shared(build_pipe):
    """A small pipeline that tests here use and do not change."""
    return build_pipe()


@pytest.fixture
def stock(shared):
    """diffusers' own pipeline with the same components."""
    return as_stock(shared)


@pytest.fixture
def worded(pipe, photos):
    """A pipeline with the image words <dog> (one picture), <suit> (another) and <pair> (two)."""
    pipe.add_image_word("<dog>", photos[0])
    pipe.add_image_word("<suit>", photos[1])
    pipe.add_image_word("<pair>", [photos[2], photos[3]])
    return pipe


@pytest.fixture
def precise(worded, photos):
    """`worded` with the encoder in float64: what computes the same function agrees to many digits there."""
    for word in worded.image_words:
        worded.remove_image_word(word)
    worded.text_encoder.double()
    worded.add_image_word("<dog>", photos[0])
    worded.add_image_word("<suit>", photos[1])
    worded.add_image_word("<pair>", [photos[2], photos[3]])
    return worded


def as_stock(pipe):
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def close(given, expected, tolerance=1e-9):
    assert given.shape == expected.shape
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


def differ(first, second):
    return (first - second).abs().max().item() > 1e-2


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


# The official code's conditions and samples ------------------------------------------------------------------------


def test_encode_prompt_gives_the_official_halves(golden_components, real_tokenizer, golden_case):
    pipe = KosmosGPipeline(tokenizer=real_tokenizer, **golden_components)
    number, batch = golden_case.num_images_per_prompt, len(golden_case.prompts)
    condition, negative = pipe.encode_prompt(
        golden_case.prompts,
        num_images_per_prompt=number,
        negative_prompt=golden_case.negative_prompt or None,
        images=golden_case.pictures,
    )
    unconditional, conditional = golden_case.tensors["encode_condition"].chunk(2)
    close(negative, unconditional, 5e-5)
    # the official code tiles c0 c1 c0 c1, diffusers repeats c0 c0 c1 c1
    tiled = conditional.unflatten(0, (number, batch))
    close(condition.unflatten(0, (batch, number)), tiled.transpose(0, 1), 5e-5)


SCHEDULERS = {"dpms": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "pndm": PNDMScheduler}


def golden_diffusion(reference, components, run):
    plan = json.loads((reference / "diffusion.json").read_text(encoding="utf-8"))
    settings = plan["runs"][run]
    scheduler = SCHEDULERS[run.split("_")[1]].from_config(components["scheduler"].config)
    assert type(scheduler).__name__ == settings["scheduler"]
    tensors = load_file(reference / "diffusion.safetensors")
    arguments = {
        "height": plan["height"],
        "width": plan["width"],
        "num_inference_steps": plan["num_inference_steps"],
        "num_images_per_prompt": plan["num_images_per_prompt"],
        "guidance_scale": settings["guidance_scale"],
        "output_type": "latent",
    }
    initial, final = (tensors[run.replace("latents", name)] for name in ("initial_latents", "latents"))
    return components | {"scheduler": scheduler}, arguments, initial, final, tensors


@pytest.mark.parametrize("run", ["latents_dpms_g6.0", "latents_ddim_g6.0", "latents_pndm_g6.0"])
def test_guided_samples_are_the_official_ones(golden_components, load_case, reference, run):
    components, arguments, initial, final, tensors = golden_diffusion(reference, golden_components, run)
    pipe = KosmosGPipeline(tokenizer=None, **components)
    pipe.set_progress_bar_config(disable=True)
    case = load_case("two_images_suit")  # its ids, since the official tokenizer need not be there
    embeds = {
        "prompt_embeds": pipe.text_encoder(**case.inputs)[0],
        "negative_prompt_embeds": pipe.text_encoder(case.tensors["negative_ids"])[0],
    }
    latents = pipe(**embeds, **arguments, latents=initial.clone()).images
    close(latents, final, 5e-4)
    if "dpms" in run:
        images = pipe(**embeds, **arguments | {"output_type": "np"}, latents=initial.clone()).images
        close(torch.from_numpy(images), tensors["decoded_dpms"], 1e-3)


def test_official_sample_from_words_and_pictures(golden_components, real_tokenizer, load_case, reference):
    components, arguments, initial, final, _ = golden_diffusion(
        reference, golden_components, "latents_dpms_g6.0"
    )
    pipe = KosmosGPipeline(tokenizer=real_tokenizer, **components)
    pipe.set_progress_bar_config(disable=True)
    case = load_case("two_images_suit")
    latents = pipe(case.prompts[0], images=case.pictures[0], **arguments, latents=initial.clone()).images
    close(latents, final, 5e-4)


def test_guidance_of_one_gives_as_many_images_as_asked(golden_components, load_case, reference):
    # the official code returns twice as many, the first half unconditional; the second half is what was asked for
    components, arguments, initial, final, _ = golden_diffusion(
        reference, golden_components, "latents_dpms_g1.0"
    )
    pipe = KosmosGPipeline(tokenizer=None, **components)
    pipe.set_progress_bar_config(disable=True)
    condition = pipe.text_encoder(**load_case("two_images_suit").inputs)[0]
    latents = pipe(prompt_embeds=condition, **arguments, latents=initial[2:].clone()).images
    assert len(latents) == arguments["num_images_per_prompt"]
    close(latents, final[2:], 5e-4)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_without_guidance_the_negative_prompt_is_not_encoded(shared, draw, monkeypatch, guidance_scale):
    forward, calls = shared.text_encoder.forward, []
    monkeypatch.setattr(shared.text_encoder, "forward", lambda *a, **k: calls.append(k) or forward(*a, **k))
    images = draw(shared, ["a hat", "a suit"], num_images_per_prompt=2, guidance_scale=guidance_scale)
    assert len(images) == 4 and len(calls) == 1


# Prompts -----------------------------------------------------------------------------------------------------------


def test_all_forms_of_a_prompt_draw_the_same_image(shared, draw, photos):
    dog, suit = photos[:2]
    expected = draw(shared, "<i> in the suit of <i>", images=[dog, suit])
    chat = [
        {"type": "image", "image": dog},
        {"type": "text", "text": "in the suit of"},
        {"type": "image", "image": suit},
    ]
    for prompt, images in (
        ([dog, "in the suit of", suit], None),
        (chat, None),
        (["<i> in the suit of <i>"], [[dog, suit]]),
        ("<i> in the suit of <i>", [np.asarray(dog), suit]),
    ):
        assert np.array_equal(draw(shared, prompt=prompt, images=images), expected)
    assert not np.array_equal(draw(shared, "<i> in the suit of <i>", images=[suit, dog]), expected)


def test_prompt_embeds_give_the_same_image_as_the_prompt(shared, draw, photos):
    prompts, images = ["<i> in a hat", "a suit"], [[photos[0]], []]
    condition, negative = shared.encode_prompt(prompts, negative_prompt="furniture", images=images)
    expected = draw(shared, prompts, negative_prompt="furniture", images=images)
    given = draw(shared, prompt_embeds=condition, negative_prompt_embeds=negative)
    assert np.array_equal(given, expected)
    assert np.array_equal(draw(shared, prompt_embeds=condition, negative_prompt="furniture"), expected)
    assert np.array_equal(draw(shared, prompts, images=images, negative_prompt_embeds=negative), expected)


def test_images_of_a_prompt_stand_next_to_each_other(shared, photos):
    prompts, images = ["<i> in a hat", "a suit"], [[photos[0]], None]
    once, _ = shared.encode_prompt(prompts, images=images)
    repeated, negative = shared.encode_prompt(prompts, num_images_per_prompt=3, images=images)
    assert torch.equal(repeated, once.repeat_interleave(3, dim=0))
    assert negative.shape == repeated.shape and differ(once[0], once[1])


def test_prompt_draws_the_same_alone_and_in_a_batch(shared, draw, photos):
    prompts = ["<i> in a hat", "a suit made of furniture", [photos[1], "and", photos[2]]]
    images, negatives = [[photos[0]], [], None], ["", "a hat by a suit", [photos[3], "eating"]]
    batch = draw(shared, prompts, images=images, negative_prompt=negatives, generator=seeds(5, 6, 7))
    for index, prompt in enumerate(prompts):
        alone = draw(
            shared, prompt, images=images[index] or None, negative_prompt=negatives[index], seed=5 + index
        )
        assert np.abs(alone[0] - batch[index]).max() < 1e-4
    doubled = draw(
        shared, prompts[:2], images=images[:2], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4)
    )
    for index, (prompt, picture) in enumerate(zip(prompts[:2], images[:2], strict=True)):
        for image in range(2):
            alone = draw(shared, prompt, images=picture or None, seed=1 + 2 * index + image)
            assert np.abs(alone[0] - doubled[2 * index + image]).max() < 1e-4


def test_negative_prompts_may_be_one_for_all_or_one_for_each(precise, photos):
    prompts = ["a hat", "a suit", "furniture"]
    null = precise.encode_prompt("")[0]
    _, one = precise.encode_prompt(prompts, negative_prompt="a hat by a suit")
    _, each = precise.encode_prompt(prompts, negative_prompt=["", "a hat by a suit", [photos[0], "in a hat"]])
    _, none = precise.encode_prompt(prompts)
    assert len(one) == len(each) == len(none) == 3
    close(none, null.expand(3, -1, -1))
    close(each[0], null[0])
    close(each[1], one[0])
    close(one, one[:1].expand(3, -1, -1), 0)
    close(each[2], precise.encode_prompt("<i> in a hat", images=[photos[0]])[0][0])


def test_negative_prompts_may_hold_pictures(precise, photos):
    positive, _ = precise.encode_prompt("<i> in a hat", images=[photos[0]])
    for negative_prompt, negative_images in (("<i> in a hat", [photos[0]]), ([photos[0], "in a hat"], None)):
        _, negative = precise.encode_prompt(
            "a suit", negative_prompt=negative_prompt, negative_images=negative_images
        )
        close(negative, positive)
    _, batch = precise.encode_prompt(
        ["a", "b"], negative_prompt=["a hat", "<i> in a hat"], negative_images=[[], [photos[0]]]
    )
    close(batch[1:], positive)


def test_image_drawn_against_a_picture_is_that_of_its_condition(shared, draw, photos):
    arguments = {"negative_prompt": "<i> in a hat", "negative_images": [photos[0]]}
    _, negative = shared.encode_prompt("a suit", **arguments)
    expected = draw(shared, "a suit", negative_prompt_embeds=negative)
    assert np.array_equal(draw(shared, "a suit", **arguments), expected)
    assert np.array_equal(draw(shared, "a suit", negative_prompt=[photos[0], "in a hat"]), expected)


def test_mark_in_a_negative_prompt_without_images_is_text(shared):
    _, negative = shared.encode_prompt("a hat", negative_prompt="a <i> hat")
    ids = shared.tokenizer("a <i> hat", return_tensors="pt").input_ids
    close(negative, shared.text_encoder(ids)[0])


def test_empty_prompt_is_the_null_condition(shared):
    condition, negative = shared.encode_prompt("")
    assert torch.equal(condition, negative)
    close(condition, shared.text_encoder(torch.tensor([[shared.tokenizer.bos_token_id]]))[0], 0)


def test_prompts_and_negatives_are_two_encoder_calls_and_the_null_condition_is_encoded_once(
    shared, draw, monkeypatch
):
    rows = []
    encode = shared.text_encoder.get_condition
    monkeypatch.setattr(
        shared.text_encoder, "get_condition", lambda ids, *rest: rows.append(len(ids)) or encode(ids, *rest)
    )
    draw(shared, ["a hat", "a suit", "furniture"], num_images_per_prompt=2)
    assert rows == [3, 1]
    rows.clear()
    draw(as_stock(shared), ["a hat", "a suit", "furniture"], num_images_per_prompt=2)
    assert rows == [3, 1]


def test_negative_prompt_of_any_length_is_read(shared, logged):
    short, long = "a hat by a suit", " ".join(["a hat by a suit"] * 40)
    conditions = [
        shared.encode_prompt("x", negative_prompt=text)[1] for text in (short, long, long + " furniture")
    ]
    assert differ(conditions[1], conditions[2]) and not logged.records


def test_encode_prompt_needs_only_text_encoder_and_tokenizer(shared, photos):
    parts = dict.fromkeys(shared.components) | {
        "text_encoder": shared.text_encoder,
        "tokenizer": shared.tokenizer,
    }
    small = KosmosGPipeline(**parts, requires_safety_checker=False)
    arguments = {"prompt": ["<i> in a hat", "a"], "images": [[photos[0]], []], "negative_prompt": "furniture"}
    for given, expected in zip(
        small.encode_prompt(**arguments), shared.encode_prompt(**arguments), strict=True
    ):
        assert torch.equal(given, expected)


def test_pipeline_without_text_encoder_draws_from_embeddings(shared, draw):
    condition, negative = shared.encode_prompt("a hat")
    parts = shared.components | {"text_encoder": None, "tokenizer": None}
    small = KosmosGPipeline(**parts, requires_safety_checker=False)
    small.set_progress_bar_config(disable=True)
    given = draw(small, prompt_embeds=condition, negative_prompt_embeds=negative)
    assert np.array_equal(given, draw(shared, "a hat"))


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_query_layers(shared, clip_skip):
    condition, negative = shared.encode_prompt("a hat", clip_skip=clip_skip)
    aligner = shared.text_encoder.aligner
    output = shared.text_encoder(
        shared.tokenizer("a hat", return_tensors="pt").input_ids, output_hidden_states=True
    )
    close(condition, aligner.final_layer_norm(output.hidden_states[len(aligner.query_layers) - clip_skip]), 0)
    expected, null = shared.encode_prompt("a hat")
    assert torch.equal(negative, null)  # as in stock pipelines, the negative is whole
    assert torch.equal(condition, expected) == (clip_skip == 0)


def test_lora_scale_acts_on_layers_of_the_text_encoder(pipe):
    peft = pytest.importorskip("peft")
    plain = pipe.encode_prompt("a hat")[0]
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    full, half, none = (pipe.encode_prompt("a hat", lora_scale=scale)[0] for scale in (1.0, 0.5, 0.0))
    close(none, plain, 0)
    assert differ(full, plain) and differ(half, full) and differ(half, plain)
    close(pipe.encode_prompt("a hat")[0], full, 0)  # the scale was for that call alone


# Stock pipelines ---------------------------------------------------------------------------------------------------

LONG = " ".join(["a hat by a suit"] * 15)  # 76 tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a hat made of furniture"},
        {"prompt": ""},
        {"prompt": ["a hat", "furniture in the style of a painting", "", "a hat"]},
        {"prompt": "a hat", "negative_prompt": "furniture"},
        {"prompt": ["a hat", "a suit"], "negative_prompt": ["furniture", "eating in the hat"]},
        {"prompt": "a suit", "negative_prompt": LONG},
        {"prompt": "a hat", "num_images_per_prompt": 3},
        {"prompt": "a hat", "guidance_scale": 1.0},
        {"prompt": "a hat", "clip_skip": 1},
        {"prompt": ["a hat", "a"], "clip_skip": 2, "negative_prompt": ["b", "c d"]},
        {"prompt": "<dog>"},
        {"prompt": ["<dog> in the suit of <suit>", "<suit>", "a hat"]},
        {"prompt": "<dog> in a hat", "negative_prompt": "<suit> eating"},
        {"prompt": ["<dog> in a hat", "<suit> in a hat"], "negative_prompt": ["<suit>", "<dog>"]},
        {"prompt": "<dog> in a hat", "clip_skip": 1, "num_images_per_prompt": 2},
    ],
    ids=lambda arguments: json.dumps(arguments)[:60],
)
def test_stock_pipeline_draws_the_identical_image(worded, draw, arguments):
    assert len(worded.tokenizer(LONG)["input_ids"]) == 76
    assert np.array_equal(draw(as_stock(worded), **arguments), draw(worded, **arguments))


def test_stock_pipeline_draws_the_identical_image_under_every_other_argument(shared, stock, draw):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})
        return {"latents": tensors["latents"] * 0.9}

    arguments = {
        "prompt": ["a hat", "a suit"],
        "height": 24,
        "width": 16,
        "timesteps": None,
        "sigmas": None,
        "guidance_scale": 4.0,
        "num_images_per_prompt": 2,
        "eta": 0.7,
        "latents": torch.randn(4, 4, 3, 2, generator=torch.Generator().manual_seed(1)),
        "return_dict": True,
        "cross_attention_kwargs": {"scale": 0.5},
        "guidance_rescale": 0.3,
        "callback_on_step_end": note,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"],
    }
    ours, theirs = draw(shared, **arguments), draw(stock, **arguments)
    assert np.array_equal(ours, theirs)
    assert len(seen) == 4
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    images, flags = shared("a hat", num_inference_steps=1, height=16, width=16, return_dict=False)
    assert isinstance(images[0], PIL.Image.Image) and flags is None


def test_conditions_agree_with_stock_where_images_need_not(precise, photos):
    prompts, negatives = ["<pair> in a hat", "<dog> by <pair>", "a hat"], ["<pair>", "", "<dog> <suit>"]
    pictures = [[photos[2], photos[3]], [photos[0], photos[2], photos[3]], []]
    theirs, their_negative = as_stock(precise).encode_prompt(prompts, torch.device("cpu"), 1, True, negatives)
    ours, negative = precise.encode_prompt(prompts, negative_prompt=negatives)
    close(theirs, ours)
    close(their_negative, negative)
    marked = ["<i><i> in a hat", "<i> by <i><i>", "a hat"]
    close(theirs, precise.encode_prompt(marked, images=pictures)[0])


def test_conditions_of_the_golden_weights_agree_with_stock_in_float32(
    golden_components, real_tokenizer, photos, tmp_path
):
    real_tokenizer.save_pretrained(tmp_path)
    parts = golden_components | {
        "tokenizer": KosmosGTokenizer.from_pretrained(tmp_path),
        "text_encoder": copy.deepcopy(golden_components["text_encoder"]),
    }
    pipe = KosmosGPipeline(**parts)
    pipe.add_image_word("<dog>", photos[0])
    pipe.add_image_word("<pair>", photos[1:3])
    prompts = ["a photo of <dog> in the style of <pair>", "<pair> on the beach", "a corgi"]
    theirs, _ = as_stock(pipe).encode_prompt(prompts, torch.device("cpu"), 1, False)
    close(theirs, pipe.encode_prompt(prompts)[0], 1e-5)
    marked = ["a photo of <i> in the style of <i><i>", "<i><i> on the beach", "a corgi"]
    close(theirs, pipe.encode_prompt(marked, images=[photos[:3], photos[1:3], []])[0], 1e-5)


def test_stock_pipeline_warns_when_it_cuts_a_negative_prompt(stock, logged):
    text = LONG + " eating"
    assert len(stock.tokenizer(text)["input_ids"]) == 77
    stock.encode_prompt("a hat", torch.device("cpu"), 1, True, text)
    assert not logged.records
    stock.encode_prompt("a hat", torch.device("cpu"), 1, True, text + " a hat")
    assert "79 tokens long and was cut to 77" in logged.text


def test_call_signature_is_the_stock_one_and_our_keywords():
    for cls in OURS:
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines."))
        theirs = inspect.signature(stock.__call__).parameters
        ours = inspect.signature(cls.__call__).parameters
        named = [name for name in theirs if name != "kwargs"]
        assert list(ours)[: len(named)] == named
        assert all(ours[name].default == theirs[name].default for name in named)
        assert set(ours) - set(theirs) == {"images", "negative_images", "return_maps", "binding", "regions"}
        encode = inspect.signature(cls.encode_prompt).parameters
        required = {"device": None, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        assert list(encode)[: len(inspect.signature(stock.encode_prompt).parameters)] == list(
            inspect.signature(stock.encode_prompt).parameters
        )
        assert all(encode[name].default == value for name, value in required.items())


@pytest.mark.parametrize(
    "cls, last",
    [
        (cls, name)
        for cls in OURS
        for name in ("height", "negative_prompt")
        if name in inspect.signature(cls.__call__).parameters
    ],
)
def test_an_argument_means_the_same_by_position_and_by_keyword(shared, photos, build_controlnet, cls, last):
    parameters = inspect.signature(cls.__call__).parameters
    picture, control, mask = (photo.resize((24, 16)) for photo in photos[1:])
    arguments = {
        "prompt": "<i> in a hat",
        "image": picture,
        "control_image": control,
        "mask_image": mask.convert("L"),
        "height": 16,
        "width": 24,
        "strength": 1.0,
        "num_inference_steps": 1,
        "negative_prompt": "<i>",
    }
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    parts = {"controlnet": build_controlnet(shared.unet)} if "ControlNet" in cls.__name__ else {}
    pipe = cls(**shared.components, **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def draw(*args, **kwargs):
        pictures = {"images": [photos[0]], "negative_images": [photos[3]], "output_type": "np"}
        return pipe(*args, **pictures, **kwargs, generator=torch.Generator().manual_seed(0)).images

    names = list(parameters)[1:]  # without self
    leading = names[: names.index(last) + 1]
    values = [arguments.get(name, parameters[name].default) for name in leading]
    rest = {name: value for name, value in arguments.items() if name not in leading}
    assert np.array_equal(draw(*values, **rest), draw(**arguments))


def test_positional_arguments_are_those_of_the_stock_pipeline(shared, stock, draw):
    arguments = ("a hat", 16, 16, 2, None, None, 3.0, "furniture", 2, 0.0)
    images = [
        pipe(*arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (shared, stock)
    ]
    assert images[0].shape == (2, 16, 16, 3) and np.array_equal(*images)
    condition, negative = shared.encode_prompt("a hat", None, 1, True, "furniture")
    images = shared(
        *(
            None,
            16,
            16,
            2,
            None,
            None,
            3.0,
            None,
            2,
            0.0,
            torch.Generator().manual_seed(0),
            None,
            condition,
            negative,
        ),
        output_type="np",
    ).images
    assert np.array_equal(images, draw(shared, *arguments[:1], negative_prompt="furniture", guidance_scale=3.0, num_images_per_prompt=2))  # fmt: skip


def test_class_derived_from_ours_may_change_the_call(shared, draw):
    class Doubled(KosmosGPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(f"{prompt} {prompt}", **kwargs)

    class Twice(Doubled):
        pass

    pipe = Twice(**shared.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe, "a hat"), draw(shared, "a hat a hat"))


# State ---------------------------------------------------------------------------------------------------------------


def test_call_changes_no_component(worded, draw, photos, snapshot):
    models = ("text_encoder", "unet", "vae")

    def state():
        return (
            {name: snapshot(getattr(worded, name)) for name in models},
            {name: type(processor) for name, processor in worded.unet.attn_processors.items()},
            dict(worded.scheduler.config),
            worded.tokenizer.backend_tokenizer.to_str(),
            worded.tokenizer.init_kwargs,
            dict(worded.config),
            torch.get_rng_state(),
        )

    def flat(value):
        if isinstance(value, dict):
            return {key: flat(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [flat(item) for item in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    # a tokenizer remembers the padding of the last call
    for attempt in range(2):
        draw(worded, "<dog> and <i>", images=[photos[1]], negative_prompt="a <suit>", clip_skip=1)
        if not attempt:
            before = copy.deepcopy(flat(state()))
    assert flat(state()) == before
    worded.encode_prompt(["<pair>", "x"], negative_prompt=["a", "b"])
    assert flat(state()) == before


def test_half_precision_pipeline_gives_half_precision_conditions(pipe, draw, photos):
    expected, _ = pipe.encode_prompt("<i> in a hat", images=[photos[0]])
    pipe.to(torch.bfloat16)
    condition, negative = pipe.encode_prompt("<i> in a hat", images=[photos[0]])
    assert condition.dtype == negative.dtype == torch.bfloat16
    assert (condition.float() - expected).square().mean().sqrt() < 0.15
    assert np.isfinite(draw(pipe, "<i> in a hat", images=[photos[0]])).all()


def test_from_pipe_shares_components_and_keeps_each_dtype(worded, build_controlnet):
    worded.unet.to(torch.bfloat16)
    worded.text_encoder.to(torch.float16)
    controlnet = build_controlnet(worded.unet).to(torch.float16)
    dtypes = {"unet": torch.bfloat16, "text_encoder": torch.float16, "vae": torch.float32}
    others = {
        cls: cls.from_pipe(worded, **({"controlnet": controlnet} if "ControlNet" in cls.__name__ else {}))
        for cls in OURS
    }
    others["back"] = KosmosGPipeline.from_pipe(others[KosmosGControlNetPipeline])
    for cls, other in others.items():
        assert cls == "back" or type(other) is cls
        assert {name: getattr(other, name).dtype for name in dtypes} == dtypes
        for name in (*dtypes, "tokenizer", "scheduler"):
            assert getattr(other, name) is getattr(worded, name)
        assert other.image_words == ["<dog>", "<suit>", "<pair>"]
    assert others[KosmosGControlNetPipeline].controlnet.dtype == torch.float16
    cast = KosmosGImg2ImgPipeline.from_pipe(worded, dtype=torch.float32)
    assert {getattr(cast, name).dtype for name in dtypes} == {torch.float32}


def test_words_are_shared_with_stock_pipelines_made_by_from_pipe(worded, draw, photos, build_controlnet):
    controlnet = build_controlnet(worded.unet)
    theirs = StableDiffusionControlNetPipeline.from_pipe(worded, controlnet=controlnet, dtype=worded.dtype)
    ours = KosmosGControlNetPipeline.from_pipe(worded, controlnet=controlnet)
    arguments = {"image": photos[3].resize((16, 16)), "controlnet_conditioning_scale": 0.7}
    theirs.set_progress_bar_config(disable=True), ours.set_progress_bar_config(disable=True)
    expected = draw(ours, "<dog> in a hat", **arguments)
    assert np.array_equal(draw(theirs, "<dog> in a hat", **arguments), expected)
    marked = draw(ours, "<i> in a hat", images=[photos[0]], **arguments)
    assert np.abs(marked - expected).max() < 1e-3
    ours.remove_image_word("<dog>")  # the components are one and the same
    ours.add_image_word("<new>", photos[1])
    assert worded.image_words == theirs.tokenizer.image_words == ["<suit>", "<pair>", "<new>"]
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(theirs, dtype=worded.dtype)
    image_to_image.set_progress_bar_config(disable=True)
    picture = image_to_image(
        "<new> in a hat", image=photos[3].resize((16, 16)), strength=0.9, num_inference_steps=2
    )
    assert picture.images[0].size == (16, 16)


@pytest.mark.parametrize("cls", OURS[1:])
def test_sibling_draws_what_its_stock_pipeline_draws_from_the_same_conditions(
    shared, photos, build_controlnet, cls
):
    control, picture, mask = (photos[i].resize((16, 16)) for i in (1, 2, 3))
    arguments = {"image": picture, "num_inference_steps": 2, "output_type": "np"}
    parts = {}
    if "ControlNet" in cls.__name__:
        parts["controlnet"] = build_controlnet(shared.unet)
        arguments |= {"control_image": control} if "2Img" in cls.__name__ or "Inpaint" in cls.__name__ else {}
    if "Inpaint" in cls.__name__:
        arguments |= {"mask_image": mask.convert("L"), "height": 16, "width": 16}
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines."))
    ours = cls(**shared.components, **parts, requires_safety_checker=False)
    theirs = stock(**shared.components, **parts, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True), theirs.set_progress_bar_config(disable=True)
    condition, negative = ours.encode_prompt("<i> in a hat", negative_prompt="furniture", images=[photos[0]])
    embeds = {"prompt_embeds": condition, "negative_prompt_embeds": negative}
    expected = theirs(**embeds, **arguments, generator=torch.Generator().manual_seed(0)).images
    prompt = {"prompt": "<i> in a hat", "negative_prompt": "furniture", "images": [photos[0]]}
    given = ours(**prompt, **arguments, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(given, expected)


# Image words -------------------------------------------------------------------------------------------------------


def test_image_word_means_its_pictures(precise, photos):
    dog, suit, *pair = photos
    for word, mark, images in (
        ("<dog> in a hat", "<i> in a hat", [dog]),
        ("a hat by <dog>, eating", "a hat by <i>, eating", [dog]),
        ("<pair> in a hat", "<i><i> in a hat", pair),
        ("<dog><suit>", "<i><i>", [dog, suit]),
        ([dog, "by <pair>"], "<i> by <i><i>", [dog, *pair]),
    ):
        close(precise.encode_prompt(word)[0], precise.encode_prompt(mark, images=images)[0])
    mixed, _ = precise.encode_prompt("<dog> by <i> and <suit>", images=pair[:1])
    close(mixed, precise.encode_prompt("<i> by <i> and <i>", images=[dog, pair[0], suit])[0])


def test_image_word_draws_what_its_picture_draws(worded, draw, photos):
    given, expected = draw(worded, "<dog> in a hat"), draw(worded, "<i> in a hat", images=[photos[0]])
    assert np.abs(given - expected).max() < 1e-3
    assert np.abs(given - draw(worded, "<suit> in a hat")).max() > 1e-2


def test_prompts_of_a_batch_may_differ_in_their_word_alone(precise, photos):
    batch, negatives = precise.encode_prompt(
        ["<dog> in a hat", "<suit> in a hat"], negative_prompt=["<suit>", "<dog>"]
    )
    assert differ(batch[0], batch[1])
    for index, word in enumerate(("<dog>", "<suit>")):
        close(batch[index], precise.encode_prompt("<i> in a hat", images=[photos[index]])[0][0])
        close(negatives[1 - index], precise.encode_prompt(word)[0][0])


def test_image_word_is_encoded_once(pipe, photos, monkeypatch, draw):
    seen, features = [], pipe.text_encoder.get_image_features
    monkeypatch.setattr(
        pipe.text_encoder, "get_image_features", lambda pixels: seen.append(len(pixels)) or features(pixels)
    )
    pipe.add_image_word("<pair>", photos[:2])
    draw(pipe, ["<pair> in a hat", "a <pair>"])
    pipe.encode_prompt("<pair>")
    assert seen == [2]


def test_many_image_words_are_entered_at_once(pipe, build_pipe, tmp_path, monkeypatch):
    """What looks at all words or all weights once for each word takes half a minute for 5,000 words."""
    config, counts = pipe.text_encoder.config, Counter()
    shape = (1, config.latent_query_num, config.text_config.embed_dim)
    for count in (10, 40):
        words = {f"<w{number}>": torch.full(shape, float(number)) for number in range(count)}
        save_file(
            words, tmp_path / "words", {"format": "kosmos_g_image_words_1", "words": json.dumps(list(words))}
        )
        pipe = build_pipe()
        for owner, name in ((pipe.tokenizer, "image_words"), (pipe.text_encoder, "device")):
            looked_up = getattr(type(owner), name).fget

            def counted(self, looked_up=looked_up, count=count):
                counts[count] += 1
                return looked_up(self)

            monkeypatch.setattr(type(owner), name, property(counted))
        pipe.load_image_words(tmp_path / "words")
        pipe.save_image_words(tmp_path / "again")
        assert pipe.image_words == list(words)
        again = load_file(tmp_path / "again")
        assert all(torch.equal(again[word], states) for word, states in words.items())
        monkeypatch.undo()
    assert counts[10] == counts[40] < 20


def test_image_word_files_follow_the_umask_and_leave_no_part(worded, tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        worded.save_image_words(tmp_path / "words.safetensors")
        worded.save_pretrained(tmp_path / "folder")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {
        path.name: 0o640 for path in files
    }
    assert sum(path.suffix == ".safetensors" for path in files) >= 4

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        worded.save_image_words(tmp_path / "more.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "words.safetensors"]


def test_removing_image_words_restores_the_output_exactly(pipe, photos, draw):
    text = "a hat <dog> x"
    before = (
        draw(pipe, "a hat"),
        pipe.tokenizer(text)["input_ids"],
        pipe.encode_prompt("<i> hat", images=photos[:1])[0],
    )
    for index, word in enumerate(("<one>", "<dog>", "<two>")):
        pipe.add_image_word(word, photos[index])
    two = pipe.encode_prompt("<two> in a hat")[0]
    vocabulary = pipe.text_encoder.config.text_config.vocab_size
    pipe.remove_image_word("<dog>")
    assert pipe.image_words == ["<one>", "<two>"]
    assert pipe.tokenizer.convert_tokens_to_ids(pipe.image_words) == [
        vocabulary,
        vocabulary + 1,
    ]  # contiguous
    assert [len(part.states) for part in pipe.text_encoder.image_words] == [1, 1]
    assert torch.equal(pipe.encode_prompt("<two> in a hat")[0], two)
    with pytest.raises(ValueError, match="<dog>"):
        pipe.encode_prompt(text)
    pipe.remove_image_word("<one>")
    pipe.remove_image_word("<two>")
    assert pipe.image_words == [] and pipe.text_encoder.config.image_words == []
    after = (
        draw(pipe, "a hat"),
        pipe.tokenizer(text)["input_ids"],
        pipe.encode_prompt("<i> hat", images=photos[:1])[0],
    )
    assert np.array_equal(before[0], after[0]) and before[1] == after[1] and torch.equal(before[2], after[2])
    assert not [name for name in pipe.text_encoder.state_dict() if "image_words" in name]


def test_image_words_travel_as_a_small_file(worded, build_pipe, tmp_path):
    path = tmp_path / "words.safetensors"
    worded.save_image_words(path)
    assert [file.name for file in tmp_path.iterdir()] == ["words.safetensors"]
    assert {name: tuple(value.shape) for name, value in load_file(path).items()} == {
        "<dog>": (1, 4, 32),
        "<suit>": (1, 4, 32),
        "<pair>": (2, 4, 32),
    }
    other = build_pipe()
    other.load_image_words(path)
    assert other.image_words == worded.image_words
    prompts = ["<dog> in a hat", "<pair> by <suit>"]
    assert torch.equal(other.encode_prompt(prompts)[0], worded.encode_prompt(prompts)[0])


def test_some_image_words_may_be_saved_and_loaded_beside_others(worded, build_pipe, photos, tmp_path):
    path = tmp_path / "words.safetensors"
    worded.save_image_words(path, ["<pair>", "<dog>", "<pair>"])
    other = build_pipe()
    other.add_image_word("<hat>", photos[3])
    other.load_image_words(path)
    assert other.image_words == ["<hat>", "<pair>", "<dog>"]
    for word in ("<pair>", "<dog>"):
        assert torch.equal(other.encode_prompt(f"{word} x")[0], worded.encode_prompt(f"{word} x")[0])


def test_image_words_keep_the_dtype_of_the_encoder(worded, build_pipe, tmp_path):
    half = build_pipe().to(torch.bfloat16)
    worded.save_image_words(tmp_path / "words.safetensors")
    half.load_image_words(tmp_path / "words.safetensors")
    assert half.text_encoder.dtype == half.text_encoder.image_words[0].states.dtype == torch.bfloat16
    half.save_image_words(tmp_path / "half.safetensors")
    assert load_file(tmp_path / "half.safetensors")["<dog>"].dtype == torch.bfloat16
    assert half.encode_prompt("<dog>")[0].isfinite().all()


def test_image_words_work_under_sequential_offloading(worded, build_pipe, photos, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    offloaded = build_pipe()
    offloaded.add_image_word("<dog>", photos[0])
    for model in (offloaded.text_encoder, offloaded.unet, offloaded.vae):
        accelerate.cpu_offload(model, torch.device("cpu"))  # as enable_sequential_cpu_offload does
    assert offloaded.device.type == "meta"
    offloaded.add_image_word("<suit>", photos[1])
    for prompt in ("<dog> in a hat", "<suit> by <dog>"):
        close(offloaded.encode_prompt(prompt)[0], worded.encode_prompt(prompt)[0])
    offloaded.save_image_words(tmp_path / "words.safetensors")
    assert torch.equal(
        load_file(tmp_path / "words.safetensors")["<dog>"], worded.text_encoder.image_words[0].states
    )


def file_of_words(path, tensors, **metadata):
    save_file(tensors, path, metadata={"format": "kosmos_g_image_words_1"} | metadata or None)


GOOD = torch.ones(1, 4, 32)


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"<new>": torch.ones(1, 4, 33)}, {"words": '["<new>"]'}, r"shape \(1, 4, 33\)"),
        ({"<new>": torch.ones(1, 5, 32)}, {"words": '["<new>"]'}, r"shape \(1, 5, 32\)"),
        ({"<new>": torch.ones(4, 32)}, {"words": '["<new>"]'}, r"shape \(4, 32\)"),
        ({"<a>": GOOD, "<new>": torch.ones(1, 4, 33)}, {"words": '["<a>", "<new>"]'}, r"shape \(1, 4, 33\)"),
        ({"<new>": GOOD * torch.nan}, {"words": '["<new>"]'}, "not all finite"),
        ({"<new>": GOOD.long()}, {"words": '["<new>"]'}, "torch.int64"),
        ({"<new>": GOOD}, {"format": "another", "words": '["<new>"]'}, "format 'another'; expected"),
        ({"<new>": GOOD}, {}, "damaged"),
        ({"<new>": GOOD}, {"words": "{"}, "damaged"),
        ({"<new>": GOOD}, {"words": "3"}, "damaged"),
        ({"<new>": GOOD}, {"words": '{"<new>": 1}'}, "damaged"),
        ({"<new>": GOOD}, {"words": '["<new>", 1]'}, "damaged"),
        ({"<new>": GOOD}, {"words": '[["<new>"]]'}, "damaged"),
        ({"<new>": GOOD}, {"words": '["<new>", "<new>"]'}, "damaged"),
        ({"<new>": GOOD}, {"words": "[]"}, "damaged"),
        ({"<new>": GOOD}, {"words": '["<other>"]'}, "damaged"),
        ({"<dog>": GOOD}, {"words": '["<dog>"]'}, "'<dog>' already"),
        ({"<a>": GOOD, "<dog>": GOOD + 1}, {"words": '["<a>", "<dog>"]'}, "'<dog>' already"),
        ({"<i>": GOOD}, {"words": '["<i>"]'}, "cannot name an image word"),
        ({"unet.weight": GOOD}, {"words": '["unet.weight"]'}, "cannot name an image word"),
        ({"1": GOOD}, {"words": "[1]"}, "damaged"),
        ({"<new>": GOOD}, {"words": "[" * 10_000 + "]" * 10_000}, "damaged"),
        ({"<new>": GOOD}, {"words": '["' + "x" * 100_000 + '"]'}, "damaged"),
        ({"<new>": GOOD}, {"words": '["<new>"]', "format": "x" * 100_000}, "format 'xxx"),
        ({"<new>": torch.tensor(1.0)}, {"words": '["<new>"]'}, r"shape \(\)"),
        ({"<new>": GOOD[:0]}, {"words": '["<new>"]'}, r"shape \(0, 4, 32\)"),
    ],
)
def test_file_of_image_words_that_does_not_fit_is_refused_whole(worded, tmp_path, tensors, metadata, message):
    path, before = tmp_path / "words.safetensors", worded.encode_prompt("<dog> by <pair>")[0]
    file_of_words(path, tensors, **metadata)
    with pytest.raises(ValueError, match=message) as caught:
        worded.load_image_words(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    assert worded.image_words == ["<dog>", "<suit>", "<pair>"]
    assert [name for name, _ in worded.text_encoder.config.image_words] == worded.image_words
    assert torch.equal(worded.encode_prompt("<dog> by <pair>")[0], before)


@pytest.mark.parametrize(
    "error", [SafetensorError("Error while serializing: I/O error"), OSError(28, "No space left")]
)
def test_full_disk_leaves_the_file_of_image_words_as_it_was(worded, tmp_path, monkeypatch, error):
    path = tmp_path / "words.safetensors"
    worded.save_image_words(path)
    before = path.read_bytes()

    def full(tensors, part, **kwargs):
        Path(part).write_bytes(b"half")
        raise error

    monkeypatch.setattr(pipeline_kosmos_g, "save_file", full)
    reason = getattr(error, "strerror", None) or "serializing"
    with pytest.raises(OSError, match=f"cannot be written to {path} .*{reason}"):
        worded.save_image_words(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="cannot be written to .*nowhere/words.safetensors"):
        worded.save_image_words(tmp_path / "nowhere" / "words.safetensors")


HUGE_HEADER = (10**17).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100, b"\x80\x04\x95", HUGE_HEADER, "folder"])
def test_file_that_holds_no_image_words_is_refused(worded, tmp_path, content):
    path = tmp_path / "words.safetensors"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"words\.safetensors cannot be read .* Pass a file that save_image_words wrote"
    ):
        worded.load_image_words(path)


def test_file_without_our_metadata_is_refused(worded, tmp_path):
    save_file({"<new>": GOOD}, tmp_path / "words.safetensors")
    with pytest.raises(ValueError, match="format None; expected"):
        worded.load_image_words(tmp_path / "words.safetensors")


@pytest.mark.parametrize("words", [["<nope>"], [], ["<dog>", "<nope>"]])
def test_saving_words_that_are_not_there_is_refused(worded, tmp_path, words):
    with pytest.raises(ValueError, match="Known: <dog>, <suit>, <pair>"):
        worded.save_image_words(tmp_path / "words.safetensors", words)
    assert not list(tmp_path.iterdir())


# Bad input ---------------------------------------------------------------------------------------------------------

ONE = torch.zeros(1, 77, 32)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "Neither prompt nor prompt_embeds"),
        (
            {"prompt": "a", "prompt_embeds": ONE},
            ValueError,
            r"Both prompt and prompt_embeds \(shape \(1, 77, 32\)\)",
        ),
        ({"prompt_embeds": ONE, "images": ["a.png"]}, ValueError, "images were given without a prompt"),
        ({"prompt_embeds": torch.zeros(1, 77, 31)}, ValueError, r"prompt_embeds of shape \(1, 77, 31\).*32"),
        ({"prompt_embeds": torch.zeros(77, 32)}, ValueError, r"prompt_embeds of shape \(77, 32\)"),
        ({"prompt_embeds": torch.zeros(0, 77, 32)}, ValueError, r"prompt_embeds of shape \(0, 77, 32\)"),
        (
            {"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 77, 31)},
            ValueError,
            r"negative_prompt_embeds of shape \(1, 77, 31\)",
        ),
        (
            {"prompt": "a", "negative_prompt_embeds": torch.zeros(2, 77, 32)},
            ValueError,
            "2 rows for 1 prompts",
        ),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": ONE},
            ValueError,
            "negative_prompt",
        ),
        (
            {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3},
            ValueError,
            "3 negative prompts were given for 2 prompts",
        ),
        (
            {"prompt_embeds": ONE, "negative_prompt": ["c", "d"]},
            ValueError,
            "2 negative prompts were given for 1 prompts",
        ),
        ({"prompt": []}, ValueError, "empty list"),
        ({"prompt": "a", "negative_prompt": []}, ValueError, "empty list of negative prompts"),
        ({"prompt": 3}, TypeError, "prompt of type int"),
        ({"prompt": "a", "negative_prompt": 3}, TypeError, "A negative prompt of type int"),
        (
            {"prompt": "a", "negative_prompt": [["x", 3]]},
            TypeError,
            "Image 0 of negative prompt 0 is of type int",
        ),
        ({"prompt": ["a", "<i>"], "images": [[], []]}, ValueError, "Prompt 1 has 1 '<i>' marks but 0 images"),
        (
            {"prompt": "<i>", "images": ["PHOTO", "PHOTO"]},
            ValueError,
            "Prompt 0 has 1 '<i>' marks but 2 images",
        ),
        ({"prompt": ["<i>", "b"], "images": ["PHOTO"]}, TypeError, "list of lists for a batch of 2 prompts"),
        (
            {"prompt": ["<i>", "b"], "images": [["PHOTO"]]},
            ValueError,
            "1 lists of images were given for 2 prompts",
        ),
        (
            {"prompt": "a", "negative_prompt": "<i> <i>", "negative_images": ["PHOTO"]},
            ValueError,
            "Negative prompt 0 has 2 '<i>' marks but 1 images",
        ),
        (
            {"prompt": "a", "negative_images": ["PHOTO"]},
            ValueError,
            "negative_images were given without negative_prompt",
        ),
        (
            {"prompt": "<i>", "images": [PIL.Image.new("RGB", (0, 4))]},
            ValueError,
            "Image 0 of prompt 0 is 0 x 4 pixels",
        ),
        (
            {"prompt": "<i>", "images": ["no/such.png"]},
            ValueError,
            "Image 0 of prompt 0 cannot be read from 'no/such.png'",
        ),
        ({"prompt": "<i>", "images": [__file__]}, ValueError, "Image 0 of prompt 0 cannot be read"),
        ({"prompt": "<i>", "images": [3]}, TypeError, "Image 0 of prompt 0 is of type int"),
        (
            {"prompt": "<i>", "images": [PIL.Image.new("1", (20_000, 10_000))]},
            ValueError,
            "Image 0 of prompt 0 has 20000 x 10000 = 200,000,000 pixels, .*decompression bomb",
        ),
        ({"prompt": ["a", "hat " * 300]}, ValueError, r"Prompt 1 is 301 tokens long .*at most 256"),
        (
            {"prompt": "a", "negative_prompt": "hat " * 300},
            ValueError,
            r"Negative prompt 0 is 301 tokens long .*at most 256",
        ),
        ({"prompt": "<dog> " * 50}, ValueError, r"Prompt 0 is 301 tokens long \(image words .*at most 256"),
        (
            {"prompt": "a", "negative_prompt": "<dog> " * 50},
            ValueError,
            r"Negative prompt 0 is 301 tokens long .*at most 256",
        ),
        (
            {"prompt": ["a", "a <cat>"]},
            ValueError,
            "Prompt 1 uses <cat>, which names no image word. Known words: <dog>",
        ),
        (
            {"prompt": "a", "negative_prompt": "<cat>"},
            ValueError,
            "Negative prompt 0 uses <cat>, which names no",
        ),
        (
            {"prompt": "a", "negative_prompt": ["<i>"], "negative_images": [["no/such.png"]]},
            ValueError,
            "Image 0 of negative prompt 0 cannot be read from 'no/such.png'",
        ),
        ({"prompt": "a", "height": 20}, ValueError, "divisible by 8 but are 20 and 16"),
        ({"prompt": "a", "width": 7}, ValueError, "divisible by 8 but are 16 and 7"),
        ({"prompt": "a", "clip_skip": 3}, ValueError, "clip_skip=3 was given; the AlignerNet has 2"),
        ({"prompt": "a", "clip_skip": -1}, ValueError, "clip_skip=-1 was given"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_any_model_runs(
    pipe, draw, photos, no_model_runs, arguments, error, message
):
    pipe.add_image_word("<dog>", photos[0])

    def with_photos(value):
        if isinstance(value, list):
            return [with_photos(item) for item in value]
        return photos[0] if isinstance(value, str) and value == "PHOTO" else value

    arguments = {name: with_photos(value) for name, value in arguments.items()}
    with no_model_runs(pipe):
        with pytest.raises(error, match=message) as raised:
            draw(pipe, **arguments)
        assert "tensor(" not in str(raised.value) or "negative_prompt_embeds" in arguments
        if not {"height", "width"} & set(arguments):
            with pytest.raises(error):
                pipe.encode_prompt(**({"prompt": None} | arguments))


@pytest.mark.parametrize(
    "word, image, error, message",
    [
        ("dog", "PHOTO", ValueError, "'dog' cannot name an image word"),
        ("<Dog>", "PHOTO", ValueError, "'<Dog>' cannot name"),
        ("<i>", "PHOTO", ValueError, "'<i>' cannot name"),
        (None, "PHOTO", ValueError, "None cannot name"),
        ("<dog>", "PHOTO", ValueError, "'<dog>' already"),
        ("<new>", [], ValueError, "No image was given for <new>"),
        ("<new>", "no/such.png", ValueError, "cannot be read from 'no/such.png'"),
        ("<new>", PIL.Image.new("RGB", (3, 0)), ValueError, "3 x 0 pixels"),
        ("<new>", None, TypeError, "of type NoneType"),
        ("<new>", ["PHOTO", 3], TypeError, "of type int"),
    ],
)
def test_bad_image_word_is_refused_before_the_encoder_runs(
    pipe, photos, no_model_runs, word, image, error, message
):
    pipe.add_image_word("<dog>", photos[0])
    if image == "PHOTO":
        image = photos[1]
    elif isinstance(image, list):
        image = [photos[1] if item == "PHOTO" else item for item in image]
    with no_model_runs(pipe), pytest.raises(error, match=message):
        pipe.add_image_word(word, image)
    assert pipe.image_words == ["<dog>"] and len(pipe.text_encoder.image_words) == 1


def test_removing_an_unknown_word_changes_nothing(worded):
    with pytest.raises(ValueError, match="'<cat>' to remove. Known: <dog>, <suit>, <pair>"):
        worded.remove_image_word("<cat>")
    assert worded.image_words == [name for name, _ in worded.text_encoder.config.image_words]


def test_text_encoder_and_tokenizer_of_different_models_are_refused(worded, build_pipe, draw, no_model_runs):
    other = build_pipe()
    parts = worded.components | {"tokenizer": other.tokenizer}
    mixed = KosmosGPipeline(**parts, requires_safety_checker=False)
    with (
        no_model_runs(mixed),
        pytest.raises(ValueError, match=r"knows the image words .*<dog>.* the tokenizer \[\]"),
    ):
        draw(mixed, "a hat")
    small = KosmosGTokenizer.from_vocabulary([("▁", -1.0)], image_size=32, latent_query_num=4)
    mixed = KosmosGPipeline(**other.components | {"tokenizer": small}, requires_safety_checker=False)
    with (
        no_model_runs(mixed),
        pytest.raises(ValueError, match="The tokenizer has 11 entries, the text encoder's vocabulary"),
    ):
        draw(mixed, "a hat")


def test_foreign_text_encoder_is_refused_and_ready_embeddings_still_work(shared, draw):
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
        )
    )
    condition, negative = shared.encode_prompt("a hat")
    for parts in ({"text_encoder": clip}, {"tokenizer": None}, {"text_encoder": None, "tokenizer": None}):
        pipe = KosmosGPipeline(**shared.components | parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match="it needs a KosmosGTokenizer and a KosmosGTextEncoder"):
            draw(pipe, "a hat")
        given = draw(pipe, prompt_embeds=condition, negative_prompt_embeds=negative)
        assert np.array_equal(given, draw(shared, "a hat"))
