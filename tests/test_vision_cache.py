"""States of images that come again: the same bits as without the cache, and nothing old after any change of the weights."""

import copy
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import set_seed

from kosmos_g_diffusers import SPRITES, KosmosGControlNetPipeline, KosmosGPipeline, VisionCache
from kosmos_g_diffusers.generation.generate import (
    draw_images,
    generate_files,
    load_pipeline,
    prompt_arguments,
    size_arguments,
)
from kosmos_g_diffusers.generation.settings import GenerationSettings, InputImage
from kosmos_g_diffusers.provenance import UNMARKED
from kosmos_g_diffusers.sprites import HEART, STAR
from kosmos_g_diffusers.testing import build_random_controlnet, build_tiny_pipeline


@pytest.fixture
def pipe():
    pipe = build_tiny_pipeline()
    pipe.vision_cache = VisionCache(2**20)
    return pipe


@pytest.fixture
def vision_passes(pipe):
    """Numbers of images that went through the vision tower, pass by pass."""
    passes = []
    pipe.text_encoder.vision_model.model.embeddings.register_forward_hook(
        lambda module, args, output: passes.append(len(output))
    )
    return passes


def picture(seed):
    noise = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@torch.no_grad()
def encode(pipe, prompt="a <i>", images=None, **settings):
    images = [picture(0)] if images is None else images
    return pipe.encode_prompt(prompt, images=images, do_classifier_free_guidance=False, **settings)[0]


def uncached(pipe, *args, **kwargs):
    cache, pipe.vision_cache = pipe.vision_cache, None
    try:
        return encode(pipe, *args, **kwargs)
    finally:
        pipe.vision_cache = cache


def test_no_pipeline_has_a_cache_unless_it_is_given_one(pipe):
    assert build_tiny_pipeline().vision_cache is None


def test_an_image_that_comes_again_is_not_computed_again_and_the_condition_is_the_same(pipe, vision_passes):
    expected = [uncached(pipe), uncached(pipe, "two of <i>")]
    vision_passes.clear()
    assert torch.equal(encode(pipe), expected[0])
    assert torch.equal(encode(pipe, "two of <i>"), expected[1])
    assert torch.equal(encode(pipe), expected[0])
    assert vision_passes == [1]
    assert (pipe.vision_cache.hits, pipe.vision_cache.misses, len(pipe.vision_cache)) == (2, 1, 1)


def test_the_small_model_draws_the_same_image_with_and_without():
    pipe = KosmosGPipeline.from_pretrained(SPRITES)
    settings = {"images": [STAR, HEART], "num_inference_steps": 2, "output_type": "np"}

    def draw():
        generator = torch.Generator().manual_seed(0)
        return torch.tensor(pipe("<i> and <i>", generator=generator, **settings).images)

    expected = draw()
    pipe.vision_cache = VisionCache(2**20)
    assert torch.equal(draw(), expected) and torch.equal(draw(), expected)
    assert (pipe.vision_cache.hits, pipe.vision_cache.misses) == (2, 2)


def test_images_of_a_batch_are_computed_once_each_in_one_pass(pipe, vision_passes):
    prompts, images = ["<i>", "<i> and <i>"], [[picture(0)], [picture(1), picture(0)]]
    expected = uncached(pipe, prompts, images)
    vision_passes.clear()
    torch.testing.assert_close(encode(pipe, prompts, images), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(encode(pipe, prompts, images), expected, atol=1e-6, rtol=0)
    assert vision_passes == [2]


def test_a_new_image_next_to_a_known_one_is_computed_alone(pipe, vision_passes):
    encode(pipe)
    both = encode(pipe, "<i> and <i>", [picture(1), picture(0)])
    assert vision_passes == [1, 1]
    torch.testing.assert_close(
        both, uncached(pipe, "<i> and <i>", [picture(1), picture(0)]), atol=1e-6, rtol=0
    )


def test_one_pixel_makes_another_image(pipe, vision_passes):
    other = picture(0)
    encode(pipe)
    other.putpixel((0, 0), (0, 0, 0))
    assert torch.equal(encode(pipe, images=[other]), uncached(pipe, images=[other]))
    assert vision_passes == [1, 1, 1]


def weight_of(pipe):
    return pipe.text_encoder.vision_model.model.encoder.layers[0].self_attn.q_proj.weight


def change_one_number(pipe):
    with torch.no_grad():
        weight_of(pipe)[1, 2] += 0.5


def change_behind_torch(pipe):
    weight_of(pipe).data[1, 2] += 0.5  # no version counter of torch counts this


def negate(pipe):
    weight_of(pipe).data.neg_()


def swap_rows(pipe):
    weight_of(pipe).data.copy_(weight_of(pipe).data.flip(0))


def swap_two_rows(pipe):
    weight_of(pipe).data[[0, 1]] = weight_of(pipe).data[[1, 0]]


def swap_columns(pipe):
    weight_of(pipe).data[:, :4] = weight_of(pipe).data[:, [2, 3, 0, 1]]


def flip_two_signs(pipe):
    weight_of(pipe).data[0, 1] *= -1
    weight_of(pipe).data[0, 3] *= -1


def swap_layers(pipe):
    layers = pipe.text_encoder.vision_model.model.encoder.layers
    first, second = layers[0].mlp.fc1.weight, layers[1].mlp.fc1.weight
    first.data, second.data = second.data, first.data


def change_the_projection(pipe):
    pipe.text_encoder.image_to_text_projection.latent_query.data.mul_(1.5)


def change_a_bias(pipe):
    pipe.text_encoder.vision_model.model.post_layernorm.bias.data[0] += 0.5


def drop_a_layer(pipe):
    encoder = pipe.text_encoder.vision_model.model.encoder
    encoder.layers = encoder.layers[:-1]


def load_weights(pipe):
    other = build_tiny_pipeline(seed=7).text_encoder
    pipe.text_encoder.load_state_dict(other.state_dict())


def replace_the_encoder(pipe):
    pipe.register_modules(text_encoder=build_tiny_pipeline(seed=7).text_encoder)


def round_the_weights(pipe):
    pipe.text_encoder.to(torch.bfloat16).to(torch.float32)


CHANGES = (
    *(change_one_number, change_behind_torch, negate, swap_rows, swap_layers, change_the_projection),
    *(change_a_bias, drop_a_layer, load_weights, replace_the_encoder, round_the_weights),
    *(swap_two_rows, swap_columns, flip_two_signs),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_a_change_of_the_weights_images_are_computed_again(pipe, change):
    before = encode(pipe)
    change(pipe)
    after = encode(pipe)
    assert torch.equal(after, uncached(pipe))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_is_noticed_and_casting_back_finds_the_states_of_the_same_weights(pipe, vision_passes, dtype):
    encode(pipe)
    pipe.text_encoder.to(dtype)
    assert torch.equal(encode(pipe), uncached(pipe))
    vision_passes.clear()
    pipe.text_encoder.to(torch.float32)
    encode(pipe)
    assert vision_passes == ([] if dtype == torch.float64 else [1])


def test_adapters_are_noticed_when_they_come_change_merge_and_go(pipe):
    peft = pytest.importorskip("peft")
    encoder = pipe.text_encoder
    plain = encode(pipe)
    set_seed(0)
    encoder.add_adapter(
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "one"
    )
    encoder.eval()
    seen = [plain]

    def expect_change():
        now = encode(pipe)
        assert torch.equal(now, uncached(pipe))
        assert not any(torch.equal(now, then) for then in seen)
        seen.append(now)

    expect_change()
    layers = [layer for layer in encoder.vision_model.modules() if hasattr(layer, "lora_A")]
    assert layers
    for layer in layers:
        layer.scaling["one"] *= 2
    expect_change()
    encoder.disable_adapters()
    assert torch.equal(encode(pipe), plain)
    encoder.enable_adapters()
    for layer in layers:
        layer.merge()
    merged = encode(pipe)
    assert torch.equal(merged, uncached(pipe))
    assert not torch.equal(merged, plain)


def test_a_lora_that_is_merged_and_unloaded_between_two_calls_is_noticed(pipe):
    peft = pytest.importorskip("peft")
    before = encode(pipe)
    wrapped = peft.get_peft_model(
        pipe.text_encoder, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    pipe.register_modules(text_encoder=wrapped.merge_and_unload().eval())
    after = encode(pipe)
    assert torch.equal(after, uncached(pipe))
    assert not torch.equal(after, before)


def test_layers_offloaded_one_by_one_are_known_by_their_values(pipe, vision_passes):
    accelerate = pytest.importorskip("accelerate")
    expected = encode(pipe)
    for name in ("text_encoder", "unet", "vae"):  # what enable_sequential_cpu_offload does
        accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"))
    assert weight_of(pipe).is_meta
    assert torch.equal(encode(pipe), expected)
    assert vision_passes == [1]


def test_weights_that_cannot_be_read_are_computed_with_as_ever(pipe, vision_passes):
    encode(pipe)
    cache, encoder = pipe.vision_cache, copy.deepcopy(pipe.text_encoder).to("meta")
    encoder.get_image_features = lambda pixel_values, **kwargs: torch.zeros(
        len(pixel_values), encoder.config.latent_query_num, encoder.config.text_config.embed_dim
    )
    size = encoder.config.vision_config.image_size
    for _ in range(2):
        assert not cache.encode(encoder, torch.zeros(1, 3, size, size)).any()
    assert len(cache) == 1


def test_nothing_is_kept_in_training_mode_or_with_gradients(pipe):
    pipe.text_encoder.requires_grad_(True)
    condition = pipe.encode_prompt("<i>", images=[picture(0)], do_classifier_free_guidance=False)[0]
    condition.sum().backward()
    assert weight_of(pipe).grad.any()
    pipe.text_encoder.train()
    encode(pipe)
    assert len(pipe.vision_cache) == 0


def test_states_kept_in_inference_mode_are_of_use_outside(pipe):
    with torch.inference_mode():
        expected = encode(pipe).clone()
    pipe.text_encoder.vision_model.requires_grad_(False)
    pipe.text_encoder.image_to_text_projection.requires_grad_(False)
    condition = pipe.encode_prompt("a <i>", images=[picture(0)], do_classifier_free_guidance=False)[0]
    assert pipe.vision_cache.hits == 1
    condition.sum().backward()
    assert torch.equal(condition, expected)


def test_autocast_has_states_of_its_own(pipe):
    encode(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(pipe), uncached(pipe))


def test_the_cache_stays_within_its_bytes_and_the_longest_unused_image_goes(pipe, vision_passes):
    encode(pipe)
    size = pipe.vision_cache.nbytes
    pipe.vision_cache = VisionCache(2 * size)
    for seed in (0, 1, 0, 2):  # 1 was not used for the longest time
        encode(pipe, images=[picture(seed)])
    assert (len(pipe.vision_cache), pipe.vision_cache.nbytes) == (2, 2 * size)
    vision_passes.clear()
    encode(pipe, images=[picture(0)])
    encode(pipe, images=[picture(2)])
    assert vision_passes == []
    encode(pipe, images=[picture(1)])
    assert vision_passes == [1]


def test_a_cache_without_room_and_an_emptied_one_keep_nothing(pipe, vision_passes):
    encode(pipe)
    pipe.vision_cache.clear()
    assert (len(pipe.vision_cache), pipe.vision_cache.nbytes) == (0, 0)
    pipe.vision_cache = VisionCache(0)
    encode(pipe)
    encode(pipe)
    assert vision_passes == [1, 1, 1] and len(pipe.vision_cache) == 0


@pytest.mark.parametrize("max_bytes", [-1, 1.5, True, "1 MB", None])
def test_a_size_that_is_none_is_refused(max_bytes):
    with pytest.raises(ValueError, match="max_bytes=.* whole number"):
        VisionCache(max_bytes)


def test_pipelines_of_the_same_components_share_it_and_a_copy_is_empty(pipe):
    encode(pipe)
    other = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=build_random_controlnet(pipe.unet))
    assert other.vision_cache is pipe.vision_cache
    copied = copy.deepcopy(pipe.vision_cache)
    assert (len(copied), copied.max_bytes) == (0, pipe.vision_cache.max_bytes)


def test_image_words_are_made_of_states_that_are_known(pipe, vision_passes):
    expected = uncached(pipe)
    encode(pipe)
    vision_passes.clear()
    pipe.add_image_word("<dog>", picture(0))
    assert vision_passes == []
    assert torch.equal(encode(pipe, "a <dog>", []), expected)


def test_what_is_returned_is_not_what_is_kept(pipe):
    pixels = torch.zeros(1, 3, *[pipe.text_encoder.config.vision_config.image_size] * 2)
    with torch.no_grad():
        first = pipe.vision_cache.encode(pipe.text_encoder, pixels)
        expected = first.clone()
        first.zero_()
        assert torch.equal(pipe.vision_cache.encode(pipe.text_encoder, pixels), expected)


def test_many_threads_get_each_its_own_image(pipe):
    expected = [uncached(pipe, images=[picture(seed)]) for seed in range(4)]
    encode(pipe)
    pipe.vision_cache = VisionCache(2 * pipe.vision_cache.nbytes)  # images push each other out
    wrong = []

    def work(offset):
        for number in range(12):
            seed = (number + offset) % 4
            if not torch.equal(encode(pipe, images=[picture(seed)]), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pipe.vision_cache.nbytes <= pipe.vision_cache.max_bytes


def test_weights_changed_while_an_image_is_computed_leave_nothing_behind(pipe):
    def change(*_):
        weight_of(pipe).data.mul_(1.5)

    pipe.text_encoder.vision_model.model.embeddings.register_forward_hook(change)
    encode(pipe)
    assert len(pipe.vision_cache) == 0


def test_a_saved_folder_brings_its_own_cache(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    module = sys.modules[type(loaded.text_encoder).__module__]
    loaded.vision_cache = module.VisionCache(2**20)
    assert torch.equal(encode(loaded), encode(pipe)) and torch.equal(encode(loaded), encode(pipe))
    assert loaded.vision_cache.hits == 1


def test_states_and_pixels_of_an_image_are_not_given_together(pipe):
    inputs = pipe.get_processor()(["<i>"], [[picture(0)]])
    encoder = pipe.text_encoder
    states = encoder(pixel_values=inputs["pixel_values"]).image_embeds
    with pytest.raises(ValueError, match="Both pixel_values and image_embeds"):
        encoder(**inputs, image_embeds=states)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"image_embeds of shape .* Expected \(images, "):
        encoder(**inputs, image_embeds=states[0])
    with pytest.raises(ValueError, match="but 2 images of"):
        encoder(**inputs, image_embeds=states.repeat(2, 1, 1))


def test_a_number_of_a_quantised_weight_is_noticed(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    pipe.text_encoder.to(torch.bfloat16)
    quantization.quantize_(pipe.text_encoder, quantization.Int8WeightOnlyConfig(version=2))
    assert torch.equal(encode(pipe), uncached(pipe))
    assert torch.equal(encode(pipe), uncached(pipe))
    weight_of(pipe).qdata[0, 0] += 1
    assert torch.equal(encode(pipe), uncached(pipe))
    assert (pipe.vision_cache.hits, pipe.vision_cache.misses) == (1, 2)


def test_scales_that_a_library_keeps_beside_its_weights_count(pipe, vision_passes):
    state2 = SimpleNamespace(absmax=torch.ones(2))
    state = SimpleNamespace(absmax=torch.ones(3, dtype=torch.uint8), offset=torch.tensor(0.5), state2=state2)
    weight_of(pipe).quant_state = state  # as bitsandbytes has it in 4 bits, and as it has it in 8
    layer = pipe.text_encoder.vision_model.model.encoder.layers[0].mlp.fc1
    layer.state, layer.weight.SCB = SimpleNamespace(SCB=torch.ones(4)), torch.ones(4)
    for number, scale in enumerate(
        (state.absmax, state.offset, state2.absmax, layer.state.SCB, layer.weight.SCB)
    ):
        encode(pipe)
        encode(pipe)
        assert len(vision_passes) == number + 1
        scale.mul_(2)
    encode(pipe)
    assert len(vision_passes) == 6


def test_a_run_with_maps_computes_its_image_and_the_null_condition_once_and_draws_the_same(tmp_path):
    star = (InputImage("star.png", "0" * 64),)
    settings = GenerationSettings(
        "a <i>", images=star, model=str(SPRITES), num_images=2, steps=1, device="cpu"
    )
    pictures = []
    for name in ("ours", "plain"):
        pipe = load_pipeline(settings)
        lengths = []
        pipe.text_encoder.register_forward_hook(
            lambda module, args, given, output, lengths=lengths: lengths.append(
                given["input_ids"].shape[1] if "input_ids" in given else 0
            ),
            with_kwargs=True,
        )
        if name == "plain":
            pipe.vision_cache = None
            arguments = prompt_arguments(pipe, settings, [STAR], return_maps=True)
            del arguments["negative_prompt_embeds"]
            lengths.clear()
            size = size_arguments(pipe, settings)
            for image, _ in draw_images(pipe, settings, size | arguments):
                pictures.append(image)
            assert lengths.count(1) == 2
            continue
        paths = [tmp_path / f"{number}.png" for number in range(2)]
        for path in generate_files(
            pipe, settings, [*paths, tmp_path / "grid.png"], [STAR], maps=True, marker=UNMARKED
        ):
            pictures += [Image.open(path)] if path in paths else []
        assert lengths.count(1) == 1 and lengths.count(0) == 1  # the null condition, the image
    for ours, plain in zip(pictures[:2], pictures[2:], strict=True):
        assert ours.tobytes() == plain.tobytes()
