"""The multimodal language model alone: its logits and answers, the command `kosmos-g caption`, the plugin of lmms-eval."""

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Kosmos2ForConditionalGeneration

from kosmos_g_diffusers import KosmosGProcessor
from kosmos_g_diffusers.captioning import Answerer
from kosmos_g_diffusers.commands import caption
from kosmos_g_diffusers.sprites.reader import read


def run_caption(*arguments):
    """Run `kosmos-g caption` in this process; its errors are raised."""
    parser = argparse.ArgumentParser()
    caption.add_arguments(parser)
    caption.run(parser.parse_args(["--device", "cpu", *map(str, arguments)]))


@pytest.fixture(scope="module")
def talkative(build_pipe):
    """A pipeline whose answers depend on all of the prompt: with tied embeddings a small model repeats one word."""
    pipe = build_pipe()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = pipe.text_encoder.get_input_embeddings().weight
        weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        weight[pipe.tokenizer.pad_token_id] = (
            0  # as in every model: transformers may set it so when it loads one
        )
        text = pipe.text_encoder.language_model.model
        text.layer_norm.bias.zero_()
        for parameter in text.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return pipe


@pytest.fixture(scope="module")
def model(talkative):
    """(text encoder, tokenizer) that several tests read and none changes."""
    return talkative.text_encoder, talkative.tokenizer


@pytest.fixture(scope="module")
def folder(talkative, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    talkative.save_pretrained(path)
    return path


@pytest.fixture
def paths(photos, tmp_path):
    names = [tmp_path / f"{index}.png" for index in range(len(photos))]
    for photo, path in zip(photos, names, strict=True):
        photo.save(path)
    return names


@torch.no_grad()
def reference_logits(text_encoder, batch):
    """Logits by the encoder's own path, which is checked against the official code's outputs elsewhere."""
    images = text_encoder.get_image_features(batch["pixel_values"]) if "pixel_values" in batch else None
    states = text_encoder.get_language_hidden_states(batch["input_ids"], images, batch["image_token_mask"])
    return states @ text_encoder.get_input_embeddings().weight.T


def answer_by_hand(model, prompt, images, steps):
    """Greedy decoding without a cache, a whole pass for each token."""
    text_encoder, tokenizer = model
    batch = KosmosGProcessor(tokenizer)(prompt, images)
    start = batch["input_ids"].shape[1]
    for _ in range(steps):
        logits = reference_logits(text_encoder, batch)[0, -1]
        logits[[tokenizer.image_token_id, tokenizer.end_of_image_token_id]] = -torch.inf
        token = logits.argmax()
        batch["input_ids"] = torch.cat([batch["input_ids"], token[None, None]], dim=1)
        mask = batch["image_token_mask"]
        batch["image_token_mask"] = torch.cat([mask, torch.zeros(1, 1, dtype=torch.bool)], dim=1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(batch["input_ids"][0, start:], skip_special_tokens=True).strip()


# to_causal_lm ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_the_encoders_states_times_its_embeddings(model, photos):
    text_encoder, tokenizer = model
    batch = KosmosGProcessor(tokenizer)(["<i> on a <i>", "<i> is a hat"], [photos[:2], photos[2:3]])
    causal = text_encoder.to_causal_lm()
    assert isinstance(causal, Kosmos2ForConditionalGeneration)
    logits = causal(
        pixel_values=batch["pixel_values"],
        input_ids=batch["input_ids"],
        image_embeds_position_mask=batch["image_token_mask"],
        use_cache=False,
    ).logits
    expected = reference_logits(text_encoder, batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_weights_are_the_encoders_own(model):
    text_encoder, _ = model
    causal = text_encoder.to_causal_lm()
    own = {parameter.data_ptr() for parameter in text_encoder.parameters()}
    assert all(parameter.data_ptr() in own for parameter in causal.parameters())
    assert causal.get_output_embeddings().weight is text_encoder.get_input_embeddings().weight
    assert not any(tensor.is_meta for tensor in [*causal.parameters(), *causal.buffers()])
    assert {parameter.data_ptr() for parameter in text_encoder.parameters()} == own


def test_encoder_is_left_as_it_was(pipe, snapshot):
    before = snapshot(pipe.text_encoder)
    pipe.text_encoder.to_causal_lm()
    after = snapshot(pipe.text_encoder)
    assert before.keys() == after.keys()
    for name, tensor in before.pop("weights").items():
        assert torch.equal(tensor, after["weights"][name])
    for name, tensor in before.pop("buffers").items():
        assert torch.equal(tensor, after["buffers"][name])
    assert all(after[kind] == value for kind, value in before.items())


def test_training_mode_is_the_encoders(pipe):
    assert not any(module.training for module in pipe.text_encoder.to_causal_lm().modules())
    pipe.text_encoder.train()
    assert all(module.training for module in pipe.text_encoder.to_causal_lm().modules())


@torch.no_grad()
def test_saved_and_loaded_by_transformers_it_is_the_same(model, photos, tmp_path):
    text_encoder, tokenizer = model
    causal = text_encoder.to_causal_lm()
    causal.save_pretrained(tmp_path)
    # the SDPA of some releases takes the cross-attention of their own Kosmos-2 for a causal one
    loaded, info = Kosmos2ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = KosmosGProcessor(tokenizer)(["<i> on a hat"], [photos[:1]])
    inputs = {
        "pixel_values": batch["pixel_values"],
        "input_ids": batch["input_ids"],
        "image_embeds_position_mask": batch["image_token_mask"],
    }
    # float32: the mask of transformers' Kosmos-2 overflows in float64
    torch.testing.assert_close(loaded.eval()(**inputs).logits, causal(**inputs).logits, rtol=0, atol=2e-5)


# Answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "n_images"),
    [("<i> Question: what is it? Answer:", 1), ("<i> and <i> in a", 2), ("a hat made of", 0)],
)
def test_answer_is_that_of_greedy_decoding_by_hand(model, photos, prompt, n_images):
    images = photos[:n_images] or None
    expected = answer_by_hand(model, prompt, images, 12)
    assert Answerer(*model)(prompt, images, max_new_tokens=12) == expected != ""


def test_answer_depends_on_picture_and_question(model, photos):
    answer = Answerer(*model)
    answers = {
        answer(f"<i> Question: {question} Answer:", [photo], max_new_tokens=16)
        for question in ("what is it?", "which colour?")
        for photo in photos[:2]
    }
    assert len(answers) == 4


def test_answer_never_names_a_picture(model, photos, monkeypatch):
    text_encoder, tokenizer = model
    answer = Answerer(text_encoder, tokenizer)
    weight = text_encoder.get_input_embeddings().weight
    tempting = weight.detach().clone()
    prompt = answer.processor("<i> is", photos[:1])
    with torch.no_grad():
        state = text_encoder.get_language_hidden_states(
            prompt["input_ids"],
            text_encoder.get_image_features(prompt["pixel_values"]),
            prompt["image_token_mask"],
        )[0, -1]
    tempting[tokenizer.end_of_image_token_id] = 100 * state
    head = torch.nn.Linear(*tempting.T.shape, bias=False)
    head.weight.data = tempting
    monkeypatch.setattr(answer.model.text_model, "lm_head", head)
    ids = answer.model.generate(
        prompt["pixel_values"], prompt["image_token_mask"], prompt["input_ids"], max_new_tokens=1
    )
    assert ids[0, -1] == tokenizer.end_of_image_token_id
    assert answer("<i> is", photos[:1], max_new_tokens=1) != ""


def test_options_of_generate_are_passed_on(model, photos):
    answer = Answerer(*model)
    torch.manual_seed(0)
    sampled = {answer("<i> a", photos[:1], max_new_tokens=6, do_sample=True) for _ in range(3)}
    assert len(sampled) == 3
    assert len({answer("<i> a", photos[:1], max_new_tokens=6) for _ in range(3)}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers(build_pipe, photos, dtype):
    pipe = build_pipe()
    answer = Answerer(pipe.text_encoder.to(dtype), pipe.tokenizer)
    assert answer.model.dtype == dtype
    assert answer("<i> Question: what is it? Answer:", photos[:1], max_new_tokens=4)


def test_answer_ends_where_the_models_positions_do(model):
    text_encoder, tokenizer = model
    answer = Answerer(text_encoder, tokenizer)
    longest = text_encoder.config.text_config.max_position_embeddings
    prompt = "x" * (longest - 5)  # with <s> and the space in front, 3 tokens are left
    assert answer.processor(prompt)["input_ids"].shape[1] == longest - 3
    assert answer(prompt, max_new_tokens=50) == answer(prompt, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"{longest} tokens.*no room for an answer"):
        answer("x" * (longest - 2))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        answer("a hat", max_new_tokens=0)


def test_image_words_and_batches_are_refused(pipe, photos):
    pipe.add_image_word("<my-dog>", photos[0])
    answer = Answerer(pipe.text_encoder, pipe.tokenizer)
    with pytest.raises(ValueError, match="Pass the image itself"):
        answer("<my-dog> is a")
    with pytest.raises(ValueError, match="2 prompts were given"):
        answer(["a hat", "a suit"])


# The command -----------------------------------------------------------------------------------------------------------


def test_command_prints_the_answer(model, folder, photos, paths, capsys):
    run_caption(
        paths[0], "--prompt", "Question: what is it? Answer:", "--model", folder, "--max-new-tokens", 12
    )
    expected = Answerer(*model)("<i> Question: what is it? Answer:", photos[:1], max_new_tokens=12)
    assert capsys.readouterr().out == expected + "\n"


def test_command_answers_for_each_picture_or_for_all_of_one_prompt(model, folder, photos, paths, capsys):
    answer = Answerer(*model)
    run_caption(*paths[:2], "--model", folder, "--max-new-tokens", 6)
    expected = [answer("<i> An image of", [photo], max_new_tokens=6) for photo in photos[:2]]
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: {text}" for path, text in zip(paths, expected, strict=False)
    ]
    run_caption(*paths[:2], "--prompt", "<i> or <i>?", "--model", folder, "--max-new-tokens", 6)
    assert capsys.readouterr().out.strip() == answer("<i> or <i>?", photos[:2], max_new_tokens=6)


def test_command_says_that_the_small_model_knows_nothing(paths, capsys):
    run_caption(paths[0], "--max-new-tokens", 2)
    captured = capsys.readouterr()
    assert captured.out.strip() and "knows nothing but sprites" in captured.err


@pytest.mark.parametrize("name", ["star", "heart", "plain_star", "plain_heart"])
def test_small_model_says_what_the_reader_sees(name, capsys):
    """Of sprites that were held out from all of its training."""
    path = Path(__file__).parents[1] / "examples" / "images" / f"{name}.png"
    run_caption(path)
    assert capsys.readouterr().out.strip() == read(Image.open(path)).caption


def test_command_names_what_is_wrong(folder, paths, tmp_path):
    with pytest.raises(ValueError, match="missing.png"):
        run_caption(tmp_path / "missing.png", "--model", folder)
    with pytest.raises(ValueError, match="2 '<i>' marks but 1 images"):
        run_caption(paths[0], "--prompt", "<i> or <i>?", "--model", folder)
    with pytest.raises(ValueError, match="--num-beams is 0"):
        run_caption(paths[0], "--num-beams", 0, "--model", folder)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(OSError, match="The model '.*nowhere' cannot be loaded .*kosmos-g convert"):
        run_caption(paths[0], "--model", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="The device 'xpu:7' is not there"):
        run_caption(paths[0], "--model", folder, "--device", "xpu:7")


# lmms-eval -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (extra lmms)")
    from kosmos_g_diffusers.evaluation import lmms

    return lmms


def make_request(context, pictures, **options):
    from lmms_eval.api.instance import Instance

    arguments = (context, options, lambda doc: pictures, 0, "task", "test")
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def test_plugin_answers_as_the_answerer_does(plugin, model, folder, photos):
    asked = plugin.KosmosGForLmms(pretrained=str(folder), device="cpu", batch_size=1)
    asked.task_dict = {"task": {"test": [{}]}}
    requests = [
        make_request("what is it?", photos[:1], max_new_tokens=8, temperature=0, do_sample=False),
        make_request("two and two?", [], max_new_tokens=8),
        make_request("is <image> older than <image>?", photos[:2], max_new_tokens=8),
    ]
    answer = Answerer(*model)
    answers = asked.generate_until(requests)
    assert answers == [
        answer("<i>Question: what is it? Answer:", photos[:1], max_new_tokens=8),
        answer("Question: two and two? Answer:", max_new_tokens=8),
        answer("Question: is <i> older than <i>? Answer:", photos[:2], max_new_tokens=8),
    ]
    cut = asked.generate_until(
        [make_request("what is it?", photos[:1], max_new_tokens=8, until=[answers[0][2]])]
    )
    assert cut == [answers[0].split(answers[0][2])[0]]


def test_plugin_reads_marks_of_a_question_as_text(plugin, model, photos):
    processor = KosmosGProcessor(model[1])
    content = plugin.arrange("is <i> or <b-c> in <image>?", photos[:1])
    ids = processor([content])["input_ids"][0]
    assert "<i>or<b-c>in" in model[1].decode(ids, skip_special_tokens=True).replace(" ", "")


def test_plugin_puts_pictures_in_front_if_marks_do_not_match(plugin, photos):
    content = plugin.arrange("which <image> is it?", photos[:2])
    assert [part["type"] for part in content] == ["text", "image", "text", "image", "text"]
    assert [part["text"] for part in content if part["type"] == "text"] == ["", "", "which   is it?"]


def test_plugin_is_found_by_lmms_eval(plugin):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(plugin.MANIFEST)
    assert registry.get_model_class("kosmos_g") is plugin.KosmosGForLmms


def test_plugin_refuses_what_it_cannot_do(plugin, photos):
    with pytest.raises(ValueError, match="batch_size=4"):
        plugin.KosmosGForLmms(device="cpu", batch_size=4)
    with pytest.raises(ValueError, match="has no {}"):
        plugin.KosmosGForLmms(device="cpu", template="Question:")
    asked = plugin.KosmosGForLmms(device="cpu")
    asked.task_dict = {"task": {"test": [{}]}}
    with pytest.raises(ValueError, match="task shows str"):
        asked.generate_until([make_request("what?", ["film.mp4"])])
