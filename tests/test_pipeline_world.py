"""A small model that declares its world warns once a call of what lies outside; no other model says anything."""

import importlib.util
import json
import random
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

from kosmos_g_diffusers import (
    SPRITES,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
    KosmosGProcessor,
    KosmosGTokenizer,
)
from kosmos_g_diffusers.generation.generate import draw_images, prompt_arguments, size_arguments
from kosmos_g_diffusers.generation.settings import GenerationSettings
from kosmos_g_diffusers.processing_kosmos_g import outside_world
from kosmos_g_diffusers.sprites import drawings
from kosmos_g_diffusers.sprites.source import KINDS, SpriteSource
from kosmos_g_diffusers.sprites.world import make_rng
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.model_folder import complete

ROOT = Path(__file__).parents[1]
WORLD = {"words": ["a", "red", "hat", ","], "most_images": 2, "plain_background": True}
FLAT = PIL.Image.new("RGB", (40, 30), "mintcream")
NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
QUICK = {"num_inference_steps": 1, "guidance_scale": 1.5, "output_type": "latent"}


@pytest.fixture
def small(pipe):
    """A pipeline of 64 px whose model declares a world."""
    pipe.tokenizer.init_kwargs["world"] = WORLD
    return pipe


def told(logged):
    """The warnings of our pipelines, and none of them from now on."""
    texts = [record.getMessage() for record in logged.records if "not trained on" in record.getMessage()]
    logged.clear()
    return texts


@pytest.mark.parametrize(
    "prompt, arguments, expected",
    [
        ("a red hat", {}, []),
        ("", {}, []),
        ("<i>, red", {"images": [FLAT]}, []),
        ("a dog", {}, ["the word 'dog';"]),
        ("A red hat!", {}, ["the words 'A', '!';"]),
        ("a red hat", {"negative_prompt": "blurry"}, ["the word 'blurry';"]),
        (["a dog", "a cat"], {"negative_prompt": "dog"}, ["the words 'dog', 'cat';"]),
        ("a \x1b[31m", {}, [r"'\x1b', '[', '31m';"]),
        (" ".join(f"w{number}" for number in range(11)), {}, ["'w7' and 3 more;"]),
        ("<i>", {"images": [NOISE]}, ["photos", "(1 of the images);"]),
        (["<i> a", "<i> <i>"], {"images": [[NOISE], [NOISE, FLAT]]}, ["photos", "(2 of the images);"]),
        ("<i> <i> <i>", {"images": [FLAT] * 3}, ["3 images in a prompt (at most 2);"]),
        ("a red hat", {"height": 64, "width": 64}, []),
        ("a red hat", {"height": 16, "width": 32}, ["images of 32 x 16 pixels (64 x 64 alone);"]),
        (
            [NOISE, "a dog"],
            {"height": 16, "width": 16},
            ["the word 'dog'; photos", "images of 16 x 16 pixels"],
        ),
    ],
)
def test_call_warns_once_in_one_line_of_what_lies_outside(small, logged, prompt, arguments, expected):
    small(prompt, **QUICK, **arguments)
    warnings = told(logged)
    assert len(warnings) == bool(expected)
    for warning in warnings:
        assert "\n" not in warning and "\x1b" not in warning
        assert all(part in warning.replace(". Expect", "; Expect") for part in expected)


def test_every_call_warns_and_a_pipeline_can_be_told_not_to(small, logged):
    for _ in range(2):
        small("a dog", **QUICK)
    assert len(told(logged)) == 2
    small.warns_outside_world = False
    small("a dog", height=16, width=16, images=None, **QUICK)
    small.add_image_word("<noise>", NOISE)
    assert told(logged) == []


def test_other_ways_to_give_a_prompt_warn_as_well(small, logged):
    embeds, negative = small.encode_prompt("a dog")
    assert len(told(logged)) == 1
    small(prompt_embeds=embeds, negative_prompt_embeds=negative, **QUICK)
    assert told(logged) == []
    small(prompt_embeds=embeds, negative_prompt_embeds=negative, height=16, width=16, **QUICK)
    assert ["16 x 16" in text for text in told(logged)] == [True]
    small.blend([("a dog", 1), ("a cat", 1)])
    assert ["'dog', 'cat'" in text for text in told(logged)] == [True]
    small.add_image_word("<noise>", NOISE)
    assert ["photos" in text for text in told(logged)] == [True]
    small("<noise>, red", **QUICK)  # the name of an image word is not a word
    assert told(logged) == []


def test_size_of_a_parsed_prompt_stays_with_its_call(small, logged):
    batch = small.get_processor().parse("a red hat")
    small(batch, height=16, width=16, **QUICK)
    assert len(told(logged)) == 1
    small.encode_prompt(batch)
    assert told(logged) == []


def test_size_is_that_of_the_image_that_is_changed_or_drawn_along(small, build_controlnet, logged):
    large, right = (PIL.Image.new("RGB", (side, side)) for side in (80, 64))
    changed = KosmosGImg2ImgPipeline.from_pipe(small)
    along = KosmosGControlNetPipeline.from_pipe(small, controlnet=build_controlnet(small.unet))
    for pipe, arguments in ((changed, {"strength": 1.0}), (along, {})):
        pipe("a hat", image=right, **arguments, **QUICK)
        assert told(logged) == []
        pipe("a hat", image=large, **arguments, **QUICK)
        assert ["80 x 80" in text for text in told(logged)] == [True]
    changed("a hat", image=torch.zeros(1, 4, 8, 8), strength=1.0, **QUICK)  # latents
    # the image is resized to the model's own size
    KosmosGInpaintPipeline.from_pipe(small)(
        "a hat", image=large, mask_image=PIL.Image.new("L", (80, 80), 255), **QUICK
    )
    assert told(logged) == []


def test_model_without_a_world_says_nothing_and_its_folder_does_not_name_one(pipe, logged, tmp_path):
    pipe(["a photo of <i>, 8k"], images=[[NOISE]], height=16, width=16, negative_prompt="blurry", **QUICK)
    assert told(logged) == [] and pipe.tokenizer.world is None
    pipe.tokenizer.save_pretrained(tmp_path)
    assert "world" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("remote_code", [False, True])
def test_world_is_saved_with_the_model(small, logged, tmp_path, remote_code):
    small.save_pretrained(tmp_path)
    load = DiffusionPipeline if remote_code else KosmosGPipeline
    again = load.from_pretrained(tmp_path, **({"trust_remote_code": True} if remote_code else {}))
    assert again.tokenizer.world == WORLD
    again("a dog", height=16, width=16, **QUICK)
    assert ["'dog'; images of 16 x 16" in text for text in told(logged)] == [True]


@pytest.mark.parametrize(
    "world", ["red", ["red"], {"words": "red"}, {"words": [1]}, {"most_images": "2"}, {"plain_background": 1}]
)
def test_world_of_another_form_is_refused(small, no_model_runs, world):
    small.tokenizer.init_kwargs["world"] = world
    with (
        no_model_runs(small),
        pytest.raises(ValueError, match="`world` is .*Expected words .*take `world` out"),
    ):
        small("a red hat")
    with pytest.raises(ValueError, match="`world` is"):
        KosmosGTokenizer.from_vocabulary([("▁a", -1.0)], world=world)


def test_what_a_world_leaves_out_is_not_limited(small, logged):
    small.tokenizer.init_kwargs["world"] = {"of a later version": 1}
    small("a dog <i> <i> <i>", images=[NOISE] * 3, **QUICK)
    assert told(logged) == []


def test_size_is_told_once_of_all_images_of_a_run(small, logged):
    settings = GenerationSettings("a dog", num_images=3, steps=1, height=16, width=16)
    arguments = {**size_arguments(small, settings), **prompt_arguments(small, settings, None)}
    assert len(list(draw_images(small, settings, arguments))) == 3
    assert [("'dog'" in text, "16 x 16" in text) for text in told(logged)] == [(True, False), (False, True)]
    assert small.warns_outside_world


def test_model_that_is_trained_further_forgets_its_world(small, tmp_path):
    source, trained = tmp_path / "source", tmp_path / "trained"
    small.save_pretrained(source)
    before = (source / "tokenizer" / "tokenizer_config.json").read_bytes()
    trained.mkdir()
    complete(trained, [source], TrainConfig(stage="instruct", output="x"))
    assert KosmosGTokenizer.from_pretrained(trained / "tokenizer").world is None
    assert (source / "tokenizer" / "tokenizer_config.json").read_bytes() == before


# The model that ships ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return KosmosGProcessor.from_pretrained(SPRITES, subfolder="tokenizer")


def notes_of(processor, prompt, images=None):
    batch = processor.parse(prompt, images)
    return outside_world(processor.tokenizer.world, batch, processor(batch).get("pixel_values"))


def test_words_of_the_small_model_are_those_it_was_trained_with(processor):
    spec = importlib.util.spec_from_file_location("base", ROOT / "examples" / "sprites" / "base.py")
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    assert processor.tokenizer.world == base.WORLD == base.build_tokenizer().world
    vocabulary = processor.tokenizer.get_vocab()
    assert all(f"▁{word}" in vocabulary for word in base.WORLD["words"])


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "asked pictures"]
)  # "An image of": a question
def test_nothing_that_the_small_model_was_trained_on_is_warned_of(processor, kind):
    source = SpriteSource(kind)
    for index in range(40):
        assert notes_of(processor, source.read(index, random.Random(index)).prompt) == []


def test_photos_are_told_from_drawings(processor):
    for kind in drawings.KINDS:
        for number in range(4):
            _, drawing = drawings.draw_at_random(kind, make_rng("told", kind, number))
            noise = np.random.default_rng(number).normal(0, 12, (drawing.height, drawing.width, 3))
            scanned = np.clip(np.asarray(drawing) + noise, 0, 255).astype(np.uint8)
            assert notes_of(processor, ["<i> <i>"], [[drawing, scanned]]) == []
    images = ROOT / "examples" / "images"
    for name, is_photo in (("cat.jpg", 1), ("coffee.jpg", 1), ("star.png", 0), ("plain_heart.png", 0)):
        assert len(notes_of(processor, "<i>", [PIL.Image.open(images / name)])) == is_photo


def test_card_of_the_small_model_names_its_words(processor):
    card = (Path(SPRITES) / "README.md").read_text(encoding="utf-8")
    _, _, words = card.partition("its words:\n\n")
    named = re.findall(r"\w+", words.partition("\n\n")[0])
    assert sorted(named) == sorted(word for word in processor.tokenizer.world["words"] if word != ",")
