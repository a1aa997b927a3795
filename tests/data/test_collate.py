"""Samples to the tensors of each stage: the processor's tokens and pixels, labels, targets, noise."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch

from kosmos_g_diffusers import KosmosGProcessor, KosmosGTokenizer
from kosmos_g_diffusers.data import (
    AlignCollate,
    BadSample,
    FilteredSample,
    InstructCollate,
    PretrainCollate,
    Sample,
    preprocess_target,
)


@pytest.fixture(scope="module")
def processor():
    pieces = [(f"▁{word}", -2.0) for word in ("a", "dog", "in", "the", "suit", "of")]
    pieces += [("▁", -5.0)] + [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = KosmosGTokenizer.from_vocabulary(
        pieces, image_size=28, latent_query_num=3, model_max_length=48
    )
    return KosmosGProcessor(tokenizer)


@pytest.fixture(scope="module")
def target_tokenizer():
    """Stands for CLIP's: pads to its full length and begins with one token."""
    pieces = [("▁a", -2.0), ("▁dog", -2.0), ("▁", -5.0)] + [(chr(code), -6.0) for code in range(33, 127)]
    return KosmosGTokenizer.from_vocabulary(pieces, model_max_length=11)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def collate_all(collate, samples):
    return collate([collate.prepare(sample, generator(number)) for number, sample in enumerate(samples)])


@pytest.fixture(scope="module")
def samples(photos):
    dog, suit, drawn, _ = photos
    return [
        Sample("one", (dog, "in the suit of", suit), drawn),
        Sample("two", ("a dog",), drawn, "a dog"),
        Sample("three", ("the dog", dog, "a dog"), suit, "a dog"),
    ]


def test_tokens_and_pixels_are_the_processor_s(processor, samples):
    batch = collate_all(InstructCollate(processor, 32), samples)
    expected = processor([list(sample.prompt) for sample in samples])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"].bool())
    assert torch.equal(batch["image_token_mask"], expected["image_token_mask"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert {name: batch[name].dtype for name in ("input_ids", "attention_mask", "pixel_values")} == {
        "input_ids": torch.int64,
        "attention_mask": torch.bool,
        "pixel_values": torch.float32,
    }


def test_a_prompt_of_several_texts_is_one_prompt(processor):
    """The processor's call takes a list of strings for a batch; a sample's prompt never is one."""
    row = PretrainCollate(processor).prepare(Sample("k", ("a dog", "in the suit")), generator())
    separate = [
        processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a dog", "in the suit")
    ]
    assert row["ids"] == [0, *separate[0], *separate[1]]


def test_angle_brackets_in_collected_text_are_text(processor):
    row = PretrainCollate(processor).prepare(Sample("k", ("a <b> dog <i>",)), generator())
    assert row["ids"] == processor.tokenizer("a <b> dog <i>")["input_ids"]


def test_text_alone_brings_no_image_tensors(processor):
    batch = collate_all(PretrainCollate(processor), [Sample("k", ("a dog",))])
    assert "pixel_values" not in batch and "image_token_mask" not in batch


def test_pretraining_predicts_text_marks_and_end_but_no_image(processor, photos):
    tokenizer = processor.tokenizer
    batch = collate_all(
        PretrainCollate(processor), [Sample("k", ("a dog", photos[0], "in")), Sample("k", ("the",))]
    )
    (a, dog), (within,), (the,) = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a dog", "in", "the")
    )
    image, end_of_image, end = (
        tokenizer.image_token_id,
        tokenizer.end_of_image_token_id,
        tokenizer.eos_token_id,
    )
    assert batch["input_ids"].tolist() == [
        [0, a, dog, image, image, image, image, end_of_image, within],
        [0, the] + [tokenizer.pad_token_id] * 7,
    ]
    assert batch["labels"].tolist() == [
        [a, dog, image, -100, -100, -100, -100, within, end],
        [the, end] + [-100] * 7,
    ]


def test_a_captioned_image_is_pretrained_on_as_image_and_caption(processor, photos):
    collate = PretrainCollate(processor)
    row = collate.prepare(Sample("k", ("a dog",), photos[0], "a dog"), generator())
    expected = processor([[photos[0], "a dog"]])
    assert row["ids"] == expected["input_ids"][0].tolist()


def test_alignment_reads_the_caption_with_both_tokenizers(processor, target_tokenizer, samples):
    collate = AlignCollate(processor, target_tokenizer)
    batch = collate_all(collate, samples[1:])
    assert torch.equal(batch["input_ids"], processor(["a dog", "a dog"])["input_ids"])
    expected = target_tokenizer(["a dog"] * 2, padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(batch["clip_input_ids"], expected)
    assert batch["clip_input_ids"].shape == (2, 11)
    assert "pixel_values" not in batch


def test_alignment_leaves_out_captions_that_the_target_would_cut(processor, target_tokenizer):
    collate = AlignCollate(processor, target_tokenizer)
    fits = collate.prepare(Sample("k", ("x",), caption="a dog " * 5), generator())
    assert len(fits["clip_input_ids"]) == 11
    with pytest.raises(FilteredSample, match="12 tokens for the target text encoder, which reads 11"):
        collate.prepare(Sample("k", ("x",), caption="a dog " * 5 + "a"), generator())


@pytest.mark.parametrize("caption", [None, "", "  \t"])
def test_alignment_refuses_an_empty_caption(processor, target_tokenizer, caption):
    with pytest.raises(BadSample, match="here.tsv:3 has no caption") as caught:
        AlignCollate(processor, target_tokenizer).prepare(
            Sample("here.tsv:3", ("x",), caption=caption), generator()
        )
    assert caught.value.cause == "caption"


def test_an_empty_prompt_is_refused(processor, photos):
    with pytest.raises(BadSample, match="here.tsv:3 has an empty prompt"):
        InstructCollate(processor, 32).prepare(Sample("here.tsv:3", (" ",), photos[0]), generator())


def test_prompts_that_are_too_long_are_filtered(processor, photos):
    with pytest.raises(FilteredSample, match="4 tokens of text, more than 3"):
        PretrainCollate(processor, max_text_tokens=3).prepare(
            Sample("k", ("a dog", photos[0], "a dog")), generator()
        )
    with pytest.raises(FilteredSample, match="here.tsv:3: .* is 61 tokens long"):
        PretrainCollate(processor).prepare(Sample("here.tsv:3", ("a dog " * 30,)), generator())


def test_instruction_needs_an_image_to_draw(processor):
    with pytest.raises(BadSample, match="has no image to draw") as caught:
        InstructCollate(processor, 32).prepare(Sample("k", ("a dog",)), generator())
    assert caught.value.cause == "target"


def test_targets_are_as_torchvision_makes_them():
    transforms = pytest.importorskip("torchvision.transforms")
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, height, resolution = (int(size) for size in rng.integers(8, 90, 3))
        image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        cropped = transforms.CenterCrop(resolution)(transforms.Resize(resolution)(image))
        expected = (np.array(cropped).transpose(2, 0, 1) / 255.0 - 0.5) / 0.5
        assert np.array_equal(preprocess_target(image, resolution), expected.astype(np.float32))


def test_a_target_of_the_right_size_keeps_its_pixels_and_a_wide_one_its_middle():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 49, 3), dtype=np.uint8)
    square = preprocess_target(PIL.Image.fromarray(pixels[:, :32]), 32)
    assert torch.equal(
        ((square + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels[:, :32]).permute(2, 0, 1)
    )
    assert square.min() >= -1 and square.max() <= 1
    wide = preprocess_target(PIL.Image.fromarray(pixels), 32)
    middle = torch.from_numpy(pixels[:, 8:40]).permute(2, 0, 1)  # margins of 17: 8.5 rounds to the even 8
    assert torch.equal(((wide + 1) * 127.5).round().to(torch.uint8), middle)


def test_targets_of_another_size_are_an_error_when_they_are_not_resized(processor):
    collate = InstructCollate(processor, 32, resize=False)
    collate.prepare(Sample("k", ("a",), PIL.Image.new("RGB", (32, 32))), generator())
    with pytest.raises(
        ValueError, match="target of b.tar:7 is 40 x 32 pixels, but every target must be 32 x 32"
    ):
        collate.prepare(Sample("b.tar:7", ("a",), PIL.Image.new("RGB", (40, 32))), generator())


@pytest.mark.parametrize("where", ["prompt", "target"])
def test_a_strip_is_a_bad_image(processor, where):
    strip = PIL.Image.new("RGB", (1, 3000))
    sample = Sample("k", (strip, "a"), strip) if where == "prompt" else Sample("k", ("a",), strip)
    with pytest.raises(BadSample, match="1 x 3000 pixels, too narrow") as caught:
        InstructCollate(processor, 32).prepare(sample, generator())
    assert caught.value.cause == "image"


def test_random_numbers_come_from_the_sample_s_generator(processor, samples):
    collate = InstructCollate(processor, 64, num_train_timesteps=10, condition_dropout=0.3)
    first, again, other = (collate.prepare(samples[0], generator(seed)) for seed in (5, 5, 6))
    for name in ("noise", "latent_noise", "timesteps", "drop_condition"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["noise"], other["noise"])
    assert not torch.equal(first["noise"], first["latent_noise"])


def test_noise_timesteps_and_dropped_conditions_have_their_distributions(processor):
    collate = InstructCollate(
        processor, 32, num_train_timesteps=7, latent_channels=5, vae_scale_factor=4, condition_dropout=0.25
    )
    sample = Sample("k", ("a",), PIL.Image.new("RGB", (32, 32)))
    batch = collate_all(collate, [sample] * 400)
    assert batch["noise"].shape == batch["latent_noise"].shape == (400, 5, 8, 8)
    assert batch["noise"].mean().abs() < 0.01 and abs(batch["noise"].std() - 1) < 0.01
    assert batch["timesteps"].dtype == torch.int64 and set(batch["timesteps"].tolist()) == set(range(7))
    assert batch["drop_condition"].dtype == torch.bool
    assert batch["drop_condition"].float().mean() == pytest.approx(0.25, abs=0.07)
    assert batch["target_pixel_values"].shape == (400, 3, 32, 32)


def test_collates_can_be_sent_to_workers(processor, target_tokenizer, samples):
    for collate in (
        PretrainCollate(processor),
        AlignCollate(processor, target_tokenizer),
        InstructCollate(processor, 32),
    ):
        sent = pickle.loads(pickle.dumps(collate))
        assert torch.equal(
            collate_all(sent, samples[1:])["input_ids"], collate_all(collate, samples[1:])["input_ids"]
        )


@pytest.mark.parametrize(
    "options, message", [({"resolution": 30}, "multiple"), ({"condition_dropout": 2}, "probability")]
)
def test_sizes_and_probabilities_that_cannot_be_are_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        InstructCollate(processor, **options)
