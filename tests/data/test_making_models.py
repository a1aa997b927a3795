"""Captions, entities and maps from real model classes of toy size: what is loaded, and that batches change nothing."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from support.making_models import save_language_model, save_models
from transformers import (
    AutoTokenizer,
    BlipImageProcessorPil,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    LlamaForCausalLM,
    ViTImageProcessorPil,
)

from kosmos_g_diffusers.data.making import Captioner, EntityFinder, Segmenter
from kosmos_g_diffusers.data.making.entities import build_chat

ON_CPU = {"device": "cpu", "dtype": torch.float32}
CAPTIONS = ["a dog on the sofa", "a cat in a red hat , and a tree", "none"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(4)]


def test_captions_of_a_batch_are_those_of_each_image(models, images):
    captioner = Captioner(models["model_caption"], **ON_CPU)

    captions = captioner(images)

    assert captions == [captioner([image])[0] for image in images]
    assert len(set(captions)) > 1
    assert not any("<" in caption or "\n" in caption for caption in captions)


def test_caption_has_at_most_the_tokens_asked_for(models, images):
    longest = max(Captioner(models["model_caption"], **ON_CPU, max_new_tokens=3)(images), key=len)

    assert len(longest.split()) <= 3


def test_answers_of_a_batch_are_those_of_the_model_itself(models):
    finder = EntityFinder(models["model_entities"], **ON_CPU, max_new_tokens=8)

    answers = finder.answers(CAPTIONS)

    tokenizer = AutoTokenizer.from_pretrained(models["model_entities"])
    model = LlamaForCausalLM.from_pretrained(models["model_entities"])
    for answer, caption in zip(answers, CAPTIONS, strict=True):
        ids = tokenizer.apply_chat_template(
            build_chat(caption), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.strip() == expected.strip()
    assert any(answers)


def test_entities_are_parsed_from_the_answers(models, monkeypatch):
    finder = EntityFinder(models["model_entities"], **ON_CPU, max_entities=2)
    monkeypatch.setattr(finder, "answers", lambda captions: ["a sofa, dog, cat", "tree, hat, cat", "none"])

    assert finder(CAPTIONS) == [["dog", "sofa"], ["cat", "hat"], []]


def test_language_model_without_a_pad_token_answers_the_same(models, tmp_path):
    folder = save_language_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    finder = EntityFinder(folder, **ON_CPU, max_new_tokens=8)

    assert finder.answers(CAPTIONS) == [finder.answers([caption])[0] for caption in CAPTIONS]


def test_language_model_without_a_chat_template_is_an_error(tmp_path):
    folder = save_language_model(tmp_path / "model", chat_template=None)

    with pytest.raises(
        ValueError, match="has no chat template. Pass one that is tuned to follow instructions"
    ):
        EntityFinder(folder, **ON_CPU)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_maps_are_those_of_the_model_on_each_pair(models, images, batch_size):
    names = [["dog", "red sofa"], [], ["cat"], ["hat", "tree", "dog"]]

    maps = Segmenter(models["model_segment"], **ON_CPU, batch_size=batch_size)(images, names)

    processor = CLIPSegProcessor.from_pretrained(models["model_segment"])
    model = CLIPSegForImageSegmentation.from_pretrained(models["model_segment"])
    assert [len(listed) for listed in maps] == [2, 0, 1, 3]
    for image, listed, rows in zip(images, names, maps, strict=True):
        for name, row in zip(listed, rows, strict=True):
            with torch.no_grad():
                expected = model(**processor(text=[name], images=[image], return_tensors="pt")).logits
            np.testing.assert_allclose(row, expected.reshape(32, 32).numpy(), rtol=1e-3, atol=1e-3)


def test_half_precision_runs(models, images):
    half = {"device": "cpu", "dtype": torch.bfloat16}

    captions = Captioner(models["model_caption"], **half)(images)
    EntityFinder(models["model_entities"], **half, max_new_tokens=4).answers(CAPTIONS)
    maps = Segmenter(models["model_segment"], **half)(images[:1], [["dog"]])

    assert len(captions) == 4
    assert maps[0][0].dtype == np.float32


def test_processors_saved_by_older_versions_load_without_torchvision(models, images, tmp_path):
    # as in the released folders: preprocessor_config.json by the old names, no nested processor_config.json
    captioner = _with_old_config(
        models["model_caption"], tmp_path / "blip", "BlipImageProcessor", "Blip2Processor", 4
    )
    segmenter = _with_old_config(
        models["model_segment"], tmp_path / "clipseg", "ViTImageProcessor", "CLIPSegProcessor"
    )

    captioner, new_captioner = (Captioner(model, **ON_CPU) for model in (captioner, models["model_caption"]))
    segmenter, new_segmenter = (Segmenter(model, **ON_CPU) for model in (segmenter, models["model_segment"]))

    assert captioner(images) == new_captioner(images)
    assert isinstance(captioner.processor.image_processor, BlipImageProcessorPil)
    assert isinstance(segmenter.processor.image_processor, ViTImageProcessorPil)
    old, new = (model(images[:1], [["dog"]])[0][0] for model in (segmenter, new_segmenter))
    np.testing.assert_array_equal(old, new)


def test_missing_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match="no-such-model"):
        Captioner(str(tmp_path / "no-such-model"), **ON_CPU)


def _with_old_config(model, folder, image_processor, processor, queries=None):
    shutil.copytree(model, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    old = {**config["image_processor"], "image_processor_type": image_processor, "processor_class": processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    if queries is not None:
        (folder / "processor_config.json").write_text(
            json.dumps({"num_query_tokens": queries, "processor_class": processor})
        )
    return str(folder)
