"""Arithmetic on the condition: blends, the strength of a picture, CLIP's own states; and what has no meaning here."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from support.composing import borrow
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kosmos_g_diffusers import KosmosGPipeline


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def exact_pipe(pipe):
    """In double precision, where rounding is far from any difference that counts, on every CPU."""
    return pipe.to(torch.float64)


def close(given, expected, tolerance=1e-9):
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


def differ(first, second):
    return np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


# Blends ------------------------------------------------------------------------------------------------------------


def test_blend_is_the_weighted_mean_of_the_conditions(exact_pipe, photos):
    dog, hat = (
        exact_pipe.encode_prompt(prompt, images=images, do_classifier_free_guidance=False)[0]
        for prompt, images in (("<i> eating", photos[:1]), ("a hat", None))
    )
    blended = exact_pipe.blend([("<i> eating", 3, photos[:1]), ("a hat", 1)])
    assert blended.shape == (1, 77, 32)
    close(blended, 0.75 * dog + 0.25 * hat)
    close(
        exact_pipe.blend([("<i> eating", 0.3, photos[:1]), ("a hat", 0.1)]), blended
    )  # only their ratio counts
    close(exact_pipe.blend([([photos[0], "eating"], 0), ("a hat", 2)]), hat)
    close(exact_pipe.blend([("<i> eating", 2, photos[:1]), ("a hat", -1)]), 2 * dog - hat)


@pytest.mark.parametrize("weight", [1, 0.2, -3, 1e4])
def test_prompt_blended_with_itself_is_its_own_condition(exact_pipe, weight):
    condition = exact_pipe.encode_prompt("a hat")[0]
    close(exact_pipe.blend([("a hat", weight)]), condition, 0)
    close(exact_pipe.blend([("a hat", weight), ("a hat", 2 * weight)]), condition)


def test_blend_is_linear_in_the_weights(exact_pipe, photos):
    def blend(weight):
        return exact_pipe.blend([("<i>", 1 - weight, photos[:1]), ("a suit", weight)])

    start, end = blend(0.0), blend(1.0)
    for weight in (0.25, 0.5, 0.75):
        close(blend(weight), torch.lerp(start, end, weight))


def test_blend_draws_between_its_prompts_in_ours_and_in_stock(pipe, draw, photos):
    pipe.add_image_word("<dog>", photos[0])
    ends = draw(pipe, "<dog>"), draw(pipe, "a suit")
    embeds = {"prompt_embeds": pipe.blend([("<dog>", 1), ("a suit", 1)])}
    embeds["negative_prompt_embeds"] = pipe.encode_prompt("")[0]
    images = [draw(other, **embeds) for other in (pipe, borrow(StableDiffusionPipeline, pipe))]
    assert np.array_equal(*images)
    assert all(differ(images[0], end) for end in ends)


def test_blend_keeps_the_dtype_of_the_encoder(pipe):
    expected = pipe.blend([("a hat", 1), ("a suit", 2)])
    pipe.to(torch.bfloat16)
    blended = pipe.blend([("a hat", 1), ("a suit", 2)])
    assert blended.dtype == torch.bfloat16
    assert (blended.float() - expected).square().mean().sqrt() < 0.1


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "blend was given 0 prompts"),
        ("a hat", r"blend takes a list with \(prompt, weight\)"),
        (["a hat", "a suit"], r"blend takes a list with \(prompt, weight\)"),
        ([("a hat",)], r"blend takes a list with \(prompt, weight\)"),
        ([("a hat", 1), ("a suit", -1)], r"weights \[1.0, -1.0\].*do not sum to 0"),
        ([("a hat", 0)], "do not sum to 0"),
        ([("a hat", float("nan"))], "finite"),
        ([("a hat", float("inf")), ("a suit", 1)], "finite"),
        ([(["a hat", "a suit"], 1), ("a", 1)], "3 prompts for 2 weights.*a list of strings is a batch"),
        ([("<i>", 1), ("a", 1)], "Prompt 0 has 1 '<i>' marks but 0 images"),
        ([("a <cat>", 1)], "<cat>, which names no image word"),
    ],
)
def test_blend_that_has_no_meaning_is_refused(pipe, no_model_runs, prompts, message):
    with no_model_runs(pipe), pytest.raises(ValueError, match=message):
        pipe.blend(prompts)


# Strength of a picture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0, 1.5])
def test_strength_scales_the_states_of_the_picture(exact_pipe, photos, strength):
    exact_pipe.add_image_word("<dog>", photos[0], strength=strength)
    processor = exact_pipe.get_processor()
    states = exact_pipe.text_encoder.get_image_features(
        torch.from_numpy(processor.preprocess(photos[0]))[None].double()
    )
    word = exact_pipe.text_encoder.image_words[0]()
    close(word, strength * states, 0)
    # what the encoder makes of it: the picture's states, scaled, in the place of the picture
    inputs = processor("<i> in a hat", images=[photos[0]])
    expected = exact_pipe.text_encoder.get_condition(
        inputs["input_ids"], strength * states, inputs["image_token_mask"]
    )
    close(exact_pipe.encode_prompt("<dog> in a hat")[0], expected)


def test_strength_one_is_the_picture_and_zero_is_no_picture(pipe, draw, photos):
    for word, index, strength in (("<dog>", 0, 1.0), ("<no-dog>", 0, 0.0), ("<no-cat>", 1, 0.0)):
        pipe.add_image_word(word, photos[index], strength=strength)
    pipe.add_image_word("<half-dog>", photos[0], strength=0.5)
    whole, none, half = (draw(pipe, f"{word} in a hat") for word in ("<dog>", "<no-dog>", "<half-dog>"))
    assert np.array_equal(whole, draw(pipe, "<i> in a hat", images=[photos[0]]))
    assert np.array_equal(none, draw(pipe, "<no-cat> in a hat"))
    assert differ(whole, none) and differ(half, whole) and differ(half, none)
    assert np.array_equal(draw(borrow(StableDiffusionPipeline, pipe), "<half-dog> in a hat"), half)


def test_strength_of_several_pictures_and_after_saving(pipe, build_pipe, photos, tmp_path):
    pipe.add_image_word("<pair>", photos[:2], strength=0.6)
    pipe.add_image_word("<whole>", photos[:2])
    close(pipe.text_encoder.image_words[0](), 0.6 * pipe.text_encoder.image_words[1](), 0)
    pipe.save_image_words(tmp_path / "words.safetensors")
    other = build_pipe()
    other.load_image_words(tmp_path / "words.safetensors")
    close(other.encode_prompt("<pair>")[0], pipe.encode_prompt("<pair>")[0], 0)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strength_that_has_no_meaning_is_refused(pipe, photos, no_model_runs, strength):
    with no_model_runs(pipe), pytest.raises(ValueError, match=f"strength={strength} was given for <dog>"):
        pipe.add_image_word("<dog>", photos[0], strength=strength)
    assert not pipe.image_words


# CLIP's own states -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP text encoder of the tiny pipeline's width, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    text_encoder = CLIPTextModel(config).eval()
    return {
        "text_encoder": text_encoder,
        "tokenizer": CLIPTokenizer.from_pretrained(folder, model_max_length=77),
    }


def test_clip_states_are_those_of_the_stock_pipeline(pipe, clip):
    stock = borrow(StableDiffusionPipeline, pipe, **clip)
    for prompt in ("ugly blurry", ["ugly", "a hat made of tin"], "", "hat " * 40):
        expected = stock.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]
        given = pipe.encode_with_clip(prompt, **clip)
        assert torch.equal(given, expected) and given.shape[1:] == (77, 32)


def test_clip_states_may_be_the_negative_of_words_and_pictures(pipe, clip, draw, photos):
    prompt = {"prompt": "<i> in a hat", "images": [photos[0]]}
    before = torch.get_rng_state()
    negative = pipe.encode_with_clip("ugly", **clip)
    assert torch.equal(torch.get_rng_state(), before)
    image = draw(pipe, **prompt, negative_prompt_embeds=negative)
    other = pipe.encode_with_clip("blurry", **clip)
    assert differ(image, draw(pipe, **prompt, negative_prompt="ugly"))
    assert differ(image, draw(pipe, **prompt, negative_prompt_embeds=other))
    assert differ(image, draw(pipe, "<i> in a hat", images=[photos[1]], negative_prompt_embeds=negative))
    condition = pipe.encode_prompt(**prompt)[0]
    stock = borrow(StableDiffusionPipeline, pipe)
    embeds = {"prompt_embeds": condition, "negative_prompt_embeds": negative}
    assert np.array_equal(draw(stock, **embeds), image)
    # ... and beside the encoder it was made from
    theirs = borrow(StableDiffusionPipeline, pipe, **clip)
    mixed = draw(theirs, prompt_embeds=condition, negative_prompt="ugly")
    assert np.array_equal(mixed, image)


# Ready embeddings ----------------------------------------------------------------------------------------------------


def test_conditions_of_pictures_go_into_a_stock_pipeline_without_our_encoder(
    pipe, clip, draw, photos, build_controlnet
):
    condition, negative = pipe.encode_prompt("<i> in a hat", images=[photos[0]])
    other = pipe.encode_prompt("<i> in a hat", images=[photos[1]])[0]
    controlnet = build_controlnet(pipe.unet)
    for parts in (clip, {"text_encoder": None, "tokenizer": None}):
        stock = borrow(StableDiffusionControlNetPipeline, pipe, controlnet=controlnet, **parts)
        arguments = {"image": photos[2].resize((16, 16)), "negative_prompt_embeds": negative}
        image = draw(stock, prompt_embeds=condition, **arguments)
        assert differ(image, draw(stock, prompt_embeds=other, **arguments))


# Textual inversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "dict", "hub"])
def test_textual_inversion_is_refused_and_image_words_are_named(pipe, draw, tmp_path, source):
    before = draw(pipe, "a hat")
    embedding = {"<cat-toy>": torch.zeros(768)}
    save_file(embedding, tmp_path / "learned_embeds.safetensors")
    source = {
        "file": str(tmp_path / "learned_embeds.safetensors"),
        "dict": embedding,
        "hub": "sd-concepts-library/cat-toy",
    }[source]
    with pytest.raises(TypeError, match="image word instead.*add_image_word.*load_image_words"):
        pipe.load_textual_inversion(source)
    assert np.array_equal(draw(pipe, "a hat"), before)


def test_textual_inversion_is_refused_by_a_stock_pipeline_with_our_encoder_too(pipe, draw):
    before = draw(pipe, "a hat")
    stock = borrow(StableDiffusionPipeline, pipe)
    with pytest.raises(ValueError, match="incorrect shape"):
        stock.load_textual_inversion({"<cat-toy>": torch.zeros(768)}, token="<cat-toy>")
    assert np.array_equal(draw(pipe, "a hat"), before)
    assert isinstance(pipe, KosmosGPipeline) and not pipe.image_words
