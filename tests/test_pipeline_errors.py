"""What people mistype or do at the same time: each gives one clear sentence before a model runs, or works."""

import copy
import pickle
import threading

import pytest
import torch
from diffusers import DDIMScheduler

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGImg2ImgPipeline, KosmosGInpaintPipeline


@pytest.fixture
def worded(pipe, photos):
    pipe.add_image_word("<dog>", photos[0])
    return pipe


# Image words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        "<Dog>",
        "<DOG>",
        "< dog >",
        "<dog_2>",
        "<dog-2>",
        "<my dog>",
        "<dog:1.2>",
        "<dog!>",
        "<dogs>",
        "＜dog＞",
        "&lt;dog&gt;",
    ],
)
def test_near_miss_of_an_image_word_is_refused_with_the_word_that_is_meant(
    worded, draw, no_model_runs, written
):
    with no_model_runs(worded):
        with pytest.raises(ValueError, match="image word <dog>"):
            draw(worded, f"a painting of {written}")
        with pytest.raises(ValueError, match="image word <dog>"):
            draw(worded, "a suit", negative_prompt=f"by {written}")


@pytest.mark.parametrize(
    "text", ["<3 a suit", "a < b > c", "<lora:dog:0.8> a hat", "<B>a</B>", "<Chair>", "<>"]
)
def test_text_in_brackets_that_is_near_no_word_stays_text(worded, draw, text):
    assert draw(worded, text).shape == (1, 16, 16, 3)


def test_bare_tokenizer_warns_of_a_near_miss_once(worded, logged):
    for _ in range(3):
        worded.tokenizer(["a <Dog> in the suit", "a hat"])
    assert [record.message for record in logged.records if "near the image word <dog>" in record.message] == [
        "'<Dog>' is near the image word <dog> and is read as text. Write <dog> for the image."
    ]


@pytest.mark.parametrize("loads", [False, True])
def test_words_made_in_inference_mode_are_normal_tensors(pipe, build_pipe, photos, draw, tmp_path, loads):
    with torch.inference_mode():
        if loads:
            other = build_pipe()
            other.add_image_word("<dog>", photos[0])
            other.save_image_words(tmp_path / "words.safetensors")
            pipe.load_image_words(tmp_path / "words.safetensors")
        else:
            pipe.add_image_word("<dog>", photos[0])
    assert not any(tensor.is_inference() for tensor in pipe.text_encoder.state_dict().values())
    condition, _ = pipe.encode_prompt("a <dog>")
    draw(pipe, "a <dog>")
    pipe.to(torch.float64)
    torch.testing.assert_close(pipe.encode_prompt("a <dog>")[0].float(), condition, rtol=0, atol=1e-4)
    draw(pipe, "a <dog>")
    pipe.text_encoder.requires_grad_(True)
    pipe.remove_image_word("<dog>")


def test_words_may_change_while_other_threads_encode(worded, photos, draw):
    expected = draw(worded, "a <dog> in the suit")
    errors, done = [], threading.Event()

    def change():
        number = 0
        while not done.is_set():
            number += 1
            worded.add_image_word(f"<cat-{number}>", photos[1])
            worded.remove_image_word(f"<cat-{number}>")

    def encode():
        try:
            for _ in range(12):
                condition, _ = worded.encode_prompt("a <dog> in the suit")
                results.append(condition)
        except Exception as error:
            errors.append(error)

    results = []
    changer = threading.Thread(target=change, daemon=True)
    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in (changer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changer.join()
    assert not errors and len(results) == 24
    assert all(torch.equal(result, results[0]) for result in results)
    assert worded.image_words == ["<dog>"] and (draw(worded, "a <dog> in the suit") == expected).all()


# Two calls at once -------------------------------------------------------------------------------------------------


def test_second_call_on_a_scheduler_is_refused_and_the_first_draws_what_it_would_draw_alone(pipe, draw):
    expected = draw(pipe, "a suit")
    sibling = type(pipe).from_pipe(pipe)  # shares the scheduler
    sibling.set_progress_bar_config(disable=True)
    refused = []

    def interrupt(pipeline, step, timestep, tensors):
        for other in (pipe, sibling):
            with pytest.raises(RuntimeError, match="scheduler of its own"):
                draw(other, "a hat")
            refused.append(other)
        pipe.encode_prompt("a hat")  # reads no scheduler
        pipe.blend([("a hat", 1.0), ("a suit", 2.0)])
        return tensors

    assert (draw(pipe, "a suit", callback_on_step_end=interrupt) == expected).all()
    assert len(refused) == 4
    assert (draw(sibling, "a suit") == expected).all()  # free again


def test_pipelines_with_schedulers_of_their_own_may_draw_at_once(pipe, draw):
    prompts = ["a suit", "a hat", "an eating", "a wearing"]
    expected = [draw(pipe, prompt) for prompt in prompts]
    images = [None] * len(prompts)

    def work(index):
        own = type(pipe).from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
        own.set_progress_bar_config(disable=True)
        images[index] = draw(own, prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((image == one).all() for image, one in zip(images, expected, strict=True))


def test_failed_call_leaves_the_scheduler_free_and_a_copy_of_a_busy_one_is_free(pipe, draw):
    copies = []

    def stop(pipeline, step, timestep, tensors):
        copies.append(copy.deepcopy(pipe.scheduler))
        copies.append(pickle.loads(pickle.dumps(pipe.scheduler)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, "a suit", callback_on_step_end=stop)
    expected = draw(pipe, "a suit")
    for scheduler in copies:
        pipe.scheduler = scheduler
        assert (draw(pipe, "a suit") == expected).all()


# Numbers and keywords ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 .*whole number from 1"),
        ({"num_inference_steps": -1}, ValueError, "num_inference_steps=-1 "),
        ({"num_inference_steps": 2.5}, ValueError, "num_inference_steps=2.5 "),
        ({"num_inference_steps": "20"}, ValueError, "num_inference_steps='20' "),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt=0 "),
        ({"num_images_per_prompt": -2}, ValueError, "num_images_per_prompt=-2 "),
        ({"height": -8, "width": 16}, ValueError, "height=-8 "),
        ({"height": 16, "width": 0}, ValueError, "width=0 "),
        ({"height": 16, "width": None}, ValueError, "Pass both"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale=nan .*finite"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale=inf "),
        ({"guidance_scale": "high"}, ValueError, "guidance_scale='high' "),
        ({"eta": float("nan")}, ValueError, "eta=nan "),
        ({"generator": 0}, TypeError, "generator=0 .*manual_seed"),
        ({"generator": [0, 1]}, TypeError, r"generator=\[0, 1\] .*manual_seed"),
        ({"num_steps": 3}, TypeError, "does not take 'num_steps'. Did you mean 'num_inference_steps'"),
        ({"negative_promt": "x"}, TypeError, "Did you mean 'negative_prompt'"),
        ({"seed": 3}, TypeError, "does not take 'seed'"),
        ({"ip_adapter_image": object()}, ValueError, "none is loaded"),
        ({"prompt": "a \ud800 suit"}, ValueError, "lone surrogate .* at position 2"),
        ({"negative_prompt": ["a \udfff"]}, ValueError, "Negative prompt 0 has the lone surrogate"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_a_model_runs(pipe, no_model_runs, arguments, error, message):
    with no_model_runs(pipe), pytest.raises(error, match=message) as raised:
        pipe(**{"prompt": "a suit", "num_inference_steps": 2, **arguments})
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("cls", [KosmosGImg2ImgPipeline, KosmosGInpaintPipeline])
@pytest.mark.parametrize(
    "strength, message", [(0, "leaves no step"), (0.3, "leaves no step"), (float("nan"), "nan")]
)
def test_strength_that_leaves_no_step_is_refused(pipe, photos, no_model_runs, cls, strength, message):
    other = cls.from_pipe(pipe)
    masks = {"mask_image": photos[3].convert("L")} if cls is KosmosGInpaintPipeline else {}
    with no_model_runs(other), pytest.raises(ValueError, match=f"strength={strength} .*{message}|{message}"):
        other("a suit", image=photos[3], strength=strength, num_inference_steps=3, **masks)


def test_long_things_are_not_repeated(pipe):
    with pytest.raises(TypeError) as raised:
        pipe("a suit", generator=list(range(100_000)))
    assert len(str(raised.value)) < 300


# Conditions and parts ----------------------------------------------------------------------------------------------


def test_conditions_of_different_lengths_are_refused(pipe, no_model_runs):
    condition, negative = pipe.encode_prompt("a suit")
    cases = [
        {"prompt_embeds": condition[:, :-3], "negative_prompt_embeds": negative},
        {"prompt_embeds": condition[:, :-3]},
        {"prompt": "a suit", "negative_prompt_embeds": negative[:, :-3]},
    ]
    for arguments in cases:
        with no_model_runs(pipe), pytest.raises(ValueError, match="different lengths.* 77 .*74|74 .*77"):
            pipe(num_inference_steps=1, **arguments)


def test_tuple_in_the_place_of_a_condition_is_refused(pipe, no_model_runs):
    pair = pipe.encode_prompt("a suit")
    with no_model_runs(pipe), pytest.raises(TypeError, match="prompt_embeds is of type tuple"):
        pipe(prompt_embeds=pair, num_inference_steps=1)
    with no_model_runs(pipe), pytest.raises(TypeError, match="prompt_embeds is of type list"):
        pipe(prompt_embeds=[pair[0]], negative_prompt_embeds=pair[1], num_inference_steps=1)


@pytest.mark.parametrize("part, name", [("text_encoder", "text encoder"), ("unet", "U-Net"), ("vae", "VAE")])
def test_parts_of_different_dtypes_are_named(pipe, no_model_runs, part, name):
    getattr(pipe, part).to(torch.float64)
    with no_model_runs(pipe), pytest.raises(ValueError, match=f"{name} float64.*|float32.*{name} float64"):
        pipe("a suit", num_inference_steps=1)


def test_controlnet_of_another_dtype_is_named(pipe, photos, build_controlnet):
    controlnet = build_controlnet(pipe.unet).to(torch.float64)
    other = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    with pytest.raises(ValueError, match="ControlNet float64"):
        other("a suit", image=photos[3], num_inference_steps=1)


def test_vae_of_another_dtype_is_no_matter_when_latents_are_asked_for(pipe, draw):
    pipe.vae.to(torch.float64)
    assert torch.isfinite(draw(pipe, "a suit", output_type="latent")).all()


def test_encoder_in_training_mode_draws_as_it_stands_and_says_so_once(pipe, draw, logged):
    pipe.text_encoder.train()
    for _ in range(2):
        draw(pipe, "a suit")
    assert pipe.text_encoder.training
    assert sum("training mode" in record.message for record in logged.records) == 1


def test_tool_that_weights_words_for_clip_is_sent_to_blend(pipe):
    """What compel 2 gives an encoder: <s>, the words, </s>, padding up to the tokenizer's length, all of it attended to."""
    words = pipe.tokenizer("a suit", add_special_tokens=False)["input_ids"]
    ids = [pipe.tokenizer.bos_token_id, *words, pipe.tokenizer.eos_token_id]
    ids += [pipe.tokenizer.pad_token_id] * (pipe.tokenizer.model_max_length - len(ids))
    ids = torch.tensor([ids], dtype=torch.int)
    with pytest.raises(ValueError, match="compel.*pipe.blend"):
        pipe.text_encoder(
            ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, return_dict=True
        )
