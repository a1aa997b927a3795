"""diffusers' conventions, for all six pipelines: what its own common pipeline tests check, with a prompt of words and pictures."""

import functools

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
)

from kosmos_g_diffusers import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
)
from kosmos_g_diffusers.testing import build_random_controlnet

OURS = (
    KosmosGPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
)
STOCK = tuple(
    next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines.")) for cls in OURS
)
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
six = pytest.mark.parametrize("cls", OURS)


@pytest.fixture(scope="module")
def base(build_pipe, photos):
    """A text-to-image pipeline whose components all pipelines of this file share; tests change none of them."""
    pipe = build_pipe()
    pipe.add_image_word("<dog>", photos[0])
    return pipe


@pytest.fixture(scope="module")
def controlnet(base):
    return build_random_controlnet(base.unet)


@pytest.fixture(scope="module")
def build(base, controlnet):
    """Function that gives a pipeline of a class, with shared components unless others are given."""
    return functools.partial(assemble, base=base, controlnet=controlnet)


def assemble(cls, *, base, controlnet, **parts):
    if "ControlNet" in cls.__name__:
        parts.setdefault("controlnet", controlnet)
    pipe = cls(**base.components | parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own_copy(build_pipe, photos):
    """Function that gives a pipeline of a class with components of its own."""

    def build_own(cls):
        pipe = build_pipe()
        pipe.add_image_word("<dog>", photos[0])
        return assemble(cls, base=pipe, controlnet=build_random_controlnet(pipe.unet))

    return build_own


@pytest.fixture(scope="module")
def inputs(photos):
    """Function from a class to what it is called with: a picture in the prompt, a picture to change, a control image."""
    squares = np.kron(np.random.default_rng(0).integers(0, 2, (4, 4, 1)) * 255, np.ones((4, 4, 3)))
    control = PIL.Image.fromarray(squares.astype(np.uint8))
    picture, mask = photos[2].resize((16, 16)), PIL.Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))

    def make(cls, seed=0, **changes):
        name = cls.__name__
        arguments = {
            "prompt": "<i> in the suit of <dog>",
            "images": [photos[1]],
            "negative_prompt": "furniture",
            "num_inference_steps": 3,
            "guidance_scale": 5.0,
            "output_type": "np",
            "generator": torch.Generator().manual_seed(seed),
        }
        over_a_picture = "Img2Img" in name or "Inpaint" in name
        if not over_a_picture or "Inpaint" in name:
            arguments |= {"height": 16, "width": 16}
        if over_a_picture:
            arguments |= {"image": picture, "strength": 0.8}
        if "Inpaint" in name:
            arguments["mask_image"] = mask
        if "ControlNet" in name:
            arguments["control_image" if over_a_picture else "image"] = control
        return arguments | changes

    return make


def largest_difference(first, second):
    first, second = np.asarray(first), np.asarray(second)
    assert first.shape == second.shape
    return np.abs(first - second).max()


def without(arguments, *names):
    return {name: value for name, value in arguments.items() if name not in names}


# Saving, components --------------------------------------------------------------------------------------------------


@six
def test_saved_pipeline_draws_the_same(build, inputs, tmp_path, cls):
    pipe = build(cls)
    expected = pipe(**inputs(cls)).images
    pipe.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is cls and loaded.image_words == ["<dog>"]
    for name in cls._optional_components:  # those that are None stay None
        if getattr(pipe, name, None) is None and name != "image_encoder":
            assert getattr(loaded, name) is None
    assert largest_difference(loaded(**inputs(cls)).images, expected) < 1e-4


@six
def test_pipeline_without_optional_components_draws_the_same(build, inputs, cls):
    assert {"safety_checker", "feature_extractor", "image_encoder"} <= set(cls._optional_components)
    expected = build(cls)(**inputs(cls)).images
    pipe = build(cls, safety_checker=None, feature_extractor=None, image_encoder=None)
    assert largest_difference(pipe(**inputs(cls)).images, expected) == 0


@six
def test_encode_prompt_works_in_isolation(build, inputs, cls):
    arguments = inputs(cls)
    expected = build(cls)(**arguments).images
    encoding = {name: arguments[name] for name in ("prompt", "images", "negative_prompt")}
    nothing = dict.fromkeys(
        ("unet", "vae", "scheduler", *(["controlnet"] if "ControlNet" in cls.__name__ else []))
    )
    with torch.no_grad():
        embeds = build(cls, **nothing).encode_prompt(**encoding)
    rest = build(cls, text_encoder=None, tokenizer=None)
    arguments = without(inputs(cls), *encoding) | dict(zip(EMBEDS, embeds, strict=True))
    assert largest_difference(rest(**arguments).images, expected) < 1e-4


@six
def test_call_changes_no_component(build, inputs, snapshot, cls):
    pipe = build(cls)
    models = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    assert len(models) == 3 + ("ControlNet" in cls.__name__)

    def state():
        taken = {name: snapshot(getattr(pipe, name)) for name in models}
        tensors = [taken[name].pop(kind) for name in models for kind in ("weights", "buffers")]
        processors = {name: type(part) for name, part in pipe.unet.attn_processors.items()}
        tokenizer = pipe.tokenizer.init_kwargs, pipe.tokenizer.get_vocab(), pipe.image_words
        rest = taken, processors, tokenizer, dict(pipe.scheduler.config), dict(pipe.config)
        return tensors, torch.get_rng_state(), rest

    tensors, random_state, rest = state()
    pipe(**inputs(cls))
    after_tensors, after_random_state, after_rest = state()
    assert after_rest == rest and torch.equal(after_random_state, random_state)
    for before, after in zip(tensors, after_tensors, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@six
def test_same_seed_draws_the_same_and_another_does_not(build, inputs, cls):
    pipe = build(cls)
    image = pipe(**inputs(cls)).images
    assert np.array_equal(pipe(**inputs(cls)).images, image)
    assert largest_difference(pipe(**inputs(cls, seed=1)).images, image) > 1e-3
    assert largest_difference(pipe(**inputs(cls, images=[PIL.Image.new("RGB", (9, 9))])).images, image) > 1e-3


# Outputs -------------------------------------------------------------------------------------------------------------


@six
def test_output_types_are_one_picture(build, inputs, cls):
    pipe = build(cls)
    array, tensor, pictures, latents = (
        pipe(**inputs(cls, output_type=kind)).images for kind in ("np", "pt", "pil", "latent")
    )
    assert array.shape == (1, 16, 16, 3) and tensor.shape == (1, 3, 16, 16) and latents.shape == (1, 4, 2, 2)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert isinstance(pictures[0], PIL.Image.Image)
    assert np.array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    decoded = pipe.image_processor.postprocess(decoded, output_type="np")
    assert largest_difference(decoded, array) < 1e-4


@six
def test_return_dict_false_gives_a_tuple(build, inputs, cls):
    pipe = build(cls)
    images, flags = pipe(**inputs(cls, return_dict=False))
    assert flags is None and np.array_equal(images, pipe(**inputs(cls)).images)


@six
def test_images_of_a_prompt_stand_together_each_from_its_own_generator(build, inputs, photos, cls):
    pipe = build(cls)
    prompts, images = ["<i> in a hat", "a suit"], [[photos[1]], []]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    changes = {"prompt": prompts, "images": images, "num_images_per_prompt": 2, "generator": generators}
    if (
        "Inpaint" in cls.__name__
    ):  # given one picture, diffusers draws its latents from the first generator alone
        changes["image"] = [inputs(cls)["image"]] * 4
    batch = pipe(**inputs(cls, **changes)).images
    assert len(batch) == 4
    for index, image in enumerate(batch):
        prompt = {"prompt": prompts[index // 2], "images": images[index // 2] or None}
        assert largest_difference(pipe(**inputs(cls, seed=index, **prompt)).images[0], image) < 1e-4
    assert all(largest_difference(batch[0], other) > 1e-3 for other in batch[1:])


@six
def test_number_of_generators_must_be_that_of_images(build, inputs, cls):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with pytest.raises(ValueError, match="list of generators of length 3"):
        build(cls)(**inputs(cls, num_images_per_prompt=2, generator=generators))


# Callbacks -----------------------------------------------------------------------------------------------------------


@six
def test_callback_sees_and_replaces_the_tensors_of_a_step(build, inputs, cls):
    pipe, seen = build(cls), []
    expected = pipe(**inputs(cls)).images

    def note(given, step, timestep, tensors):
        assert given is pipe and set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        seen.append((step, tuple(tensors["latents"].shape), tuple(tensors["prompt_embeds"].shape)))
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    callback = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names}
    assert np.array_equal(pipe(**inputs(cls, **callback)).images, expected)
    n_steps = 2 if "image" in inputs(cls) and "strength" in inputs(cls) else 3
    # negative and positive prompt in one tensor, as diffusers has them under guidance
    assert seen == [(step, (1, 4, 2, 2), (2, 77, 32)) for step in range(n_steps)]

    def forget_the_prompt(given, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    callback["callback_on_step_end"] = forget_the_prompt
    assert largest_difference(pipe(**inputs(cls, **callback)).images, expected) > 1e-3


@six
def test_callback_asks_only_for_tensors_that_there_are(build, inputs, cls):
    pipe = build(cls)
    every = {}
    arguments = {
        "callback_on_step_end": lambda given, step, timestep, tensors: every.update(tensors) or {},
        "callback_on_step_end_tensor_inputs": list(pipe._callback_tensor_inputs),
    }
    pipe(**inputs(cls, **arguments))
    assert set(every) == set(pipe._callback_tensor_inputs) >= {"latents", *EMBEDS}
    arguments["callback_on_step_end_tensor_inputs"] = ["text_embeddings"]
    with pytest.raises(ValueError, match="text_embeddings"):
        pipe(**inputs(cls, **arguments))


@six
def test_interrupt_leaves_the_latents_as_they_are(build, inputs, cls):
    pipe, latents = build(cls), []

    def note(given, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        return {}

    def stop(given, step, timestep, tensors):
        given._interrupt = True
        return note(given, step, timestep, tensors)

    final = pipe(**inputs(cls, callback_on_step_end=note, output_type="latent")).images
    first = latents[0]
    latents.clear()
    stopped = pipe(**inputs(cls, callback_on_step_end=stop, output_type="latent")).images
    assert len(latents) == 1 and torch.equal(stopped, first) and not torch.equal(stopped, final)
    assert torch.equal(pipe(**inputs(cls, output_type="latent")).images, final)  # of that call alone


# Numbers -------------------------------------------------------------------------------------------------------------


@six
def test_half_precision_draws_nearly_the_same(own_copy, inputs, tmp_path, monkeypatch, cls):
    randn = torch.randn
    # torch 2.6 draws other numbers in half precision than in float32
    monkeypatch.setattr(torch, "randn", lambda *args, dtype=None, **kwargs: randn(*args, **kwargs).to(dtype))
    pipe = own_copy(cls)
    expected = pipe(**inputs(cls)).images
    pipe.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.float16)
    loaded.set_progress_bar_config(disable=True)
    pipe.to(torch.float16)
    for half in (pipe, loaded):
        models = [part for part in half.components.values() if isinstance(part, torch.nn.Module)]
        assert {tensor.dtype for model in models for tensor in model.parameters()} == {torch.float16}
        image = half(**inputs(cls)).images
        assert largest_difference(image, expected) < 0.05
    assert largest_difference(image, pipe(**inputs(cls)).images) < 1e-3
    pipe.to(torch.float32)
    assert largest_difference(pipe(**inputs(cls)).images, expected) < 0.05


@six
def test_attention_slicing_makes_no_difference(own_copy, inputs, cls):
    pipe = own_copy(cls)
    expected = pipe(**inputs(cls)).images
    for size in ("auto", "max", 1):
        pipe.enable_attention_slicing(size)
        assert largest_difference(pipe(**inputs(cls)).images, expected) < 1e-4
    pipe.disable_attention_slicing()
    assert np.array_equal(pipe(**inputs(cls)).images, expected)


@six
def test_vae_slicing_makes_no_difference(own_copy, inputs, cls):
    pipe = own_copy(cls)
    expected = pipe(**inputs(cls, num_images_per_prompt=2)).images
    pipe.vae.enable_slicing()
    assert largest_difference(pipe(**inputs(cls, num_images_per_prompt=2)).images, expected) < 1e-4
    pipe.vae.disable_slicing()
    assert np.array_equal(pipe(**inputs(cls, num_images_per_prompt=2)).images, expected)


# One from another ----------------------------------------------------------------------------------------------------

DTYPES = {
    "text_encoder": torch.float16,
    "unet": torch.bfloat16,
    "vae": torch.float32,
    "controlnet": torch.float16,
}


@pytest.fixture(scope="module")
def mixed(build_pipe, photos):
    """(components, ControlNet) of several dtypes, with the image word <dog>. Shared: no test casts them."""
    pipe = build_pipe()
    pipe.add_image_word("<dog>", photos[0])
    controlnet = build_random_controlnet(pipe.unet).to(DTYPES["controlnet"])
    for name in ("text_encoder", "unet"):
        getattr(pipe, name).to(DTYPES[name])
    return pipe, controlnet


def parts_for(cls, source, controlnet):
    """A ControlNet for a class that takes one, unless the source has it."""
    needs = "ControlNet" in cls.__name__ and getattr(source, "controlnet", None) is None
    return {"controlnet": controlnet} if needs else {}


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", OURS + STOCK)
def test_from_pipe_shares_components_and_keeps_each_dtype(mixed, source, target):
    base, controlnet = mixed
    first = assemble(source, base=base, controlnet=controlnet)
    second = target.from_pipe(first, **parts_for(target, first, controlnet))
    assert type(second) is target and second.image_words == ["<dog>"]
    for name, component in second.components.items():
        assert component is (controlnet if name == "controlnet" else getattr(base, name, None)), name
        if name in DTYPES:
            assert component.dtype == DTYPES[name]
    assert not second.config.requires_safety_checker


@pytest.mark.parametrize("source", OURS)
@pytest.mark.parametrize("target", STOCK)
def test_from_pipe_to_stock_keeps_the_dtype_that_it_is_given(base, mixed, controlnet, source, target):
    first = assemble(source, base=base, controlnet=controlnet)
    second = target.from_pipe(first, dtype=first.dtype, **parts_for(target, first, controlnet))
    assert type(second) is target and second.tokenizer.image_words == ["<dog>"]
    for name, component in second.components.items():
        assert component is (controlnet if name == "controlnet" else getattr(base, name, None)), name
        if name in DTYPES:
            assert component.dtype == torch.float32


def test_from_pipe_to_stock_casts_to_float32_unless_told_otherwise(build_pipe):
    # what the documentation warns of; the components are shared, so ours is cast with it
    pipe = build_pipe().to(torch.bfloat16)
    StableDiffusionPipeline.from_pipe(pipe, dtype=pipe.dtype)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    StableDiffusionPipeline.from_pipe(pipe)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32


@six
def test_from_pipe_draws_what_a_pipeline_built_anew_draws(build, inputs, controlnet, cls):
    stock = STOCK[OURS.index(cls)]
    word = {"prompt": "<dog> in the suit of <dog>", "images": None}
    expected = build(cls)(**inputs(cls, **word)).images
    for source in (*OURS, stock):
        first = build(source)
        second = cls.from_pipe(first, **parts_for(cls, first, controlnet))
        there = stock.from_pipe(second, dtype=second.dtype)
        back = cls.from_pipe(there)
        for pipe in (second, back, there):
            pipe.set_progress_bar_config(disable=True)
        assert np.array_equal(second(**inputs(cls, **word)).images, expected)
        assert np.array_equal(back(**inputs(cls, **word)).images, expected)
    assert np.array_equal(there(**without(inputs(cls, **word), "images")).images, expected)


@pytest.mark.parametrize("cls", OURS[3:])
def test_from_pipe_without_a_controlnet_says_so(base, cls):
    with pytest.raises(ValueError, match="controlnet"):
        cls.from_pipe(base)


@pytest.mark.parametrize(
    "auto, ours",
    [
        (AutoPipelineForText2Image, KosmosGPipeline),
        (AutoPipelineForImage2Image, KosmosGImg2ImgPipeline),
        (AutoPipelineForInpainting, KosmosGInpaintPipeline),
    ],
)
def test_auto_pipelines_do_not_know_our_classes_and_our_from_pipe_takes_their_place(
    base, tmp_path, auto, ours
):
    with pytest.raises(ValueError, match="KosmosGPipeline"):
        auto.from_pipe(base)
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="KosmosGPipeline"):
        auto.from_pretrained(tmp_path)
    assert type(ours.from_pipe(base)) is type(ours.from_pretrained(tmp_path)) is ours
    # once in a stock class, diffusers finds the siblings itself
    stock = StableDiffusionPipeline.from_pipe(base, dtype=base.dtype)
    found = auto.from_pipe(stock, dtype=base.dtype)
    assert type(found) is STOCK[OURS.index(ours)] and found.text_encoder is base.text_encoder
