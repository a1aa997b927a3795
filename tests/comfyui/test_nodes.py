"""ComfyUI's nodes, each against the pipeline, with a stand-in of ComfyUI's types."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from support.comfyui_standin import install_standin, run_node

from kosmos_g_diffusers import SPRITES, KosmosGPipeline
from kosmos_g_diffusers.comfyui.installing import SOURCE
from kosmos_g_diffusers.testing import build_tiny_pipeline

IDS = (
    "KosmosGLoader KosmosGPrompt KosmosGNegative KosmosGImageWord KosmosGLoadImageWords KosmosGSaveImageWords "
    "KosmosGBlend KosmosGSprites"
).split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What stands for ComfyUI's folder; a model of toy size is under models/kosmos_g."""
    root = tmp_path_factory.mktemp("ComfyUI")
    build_tiny_pipeline().save_pretrained(root / "models" / "kosmos_g" / "tiny")
    return root


@pytest.fixture(scope="module")
def nodes(root):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield install_standin(monkeypatch, root)


@pytest.fixture(scope="module")
def folder(root):
    return root / "models" / "kosmos_g" / "tiny"


@pytest.fixture(scope="module")
def encoder(nodes):
    """What Load Kosmos-G gives for it. No node changes it, so all tests may share it."""
    return run_node(nodes.KosmosGLoader, model_name="tiny")


@pytest.fixture(scope="module")
def pipe():
    return build_tiny_pipeline()


def picture(seed, mode="RGB"):
    noise = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(seed))
    return PIL.Image.fromarray(noise.to(torch.uint8).numpy()).convert(mode)


def as_image(*pictures):
    """PIL images -> IMAGE, as ComfyUI's Load Image makes it."""
    return torch.stack([torch.from_numpy(np.array(one).astype(np.float32) / 255.0) for one in pictures])


def states(conditioning):
    ((states, options),) = conditioning
    assert options == {}
    return states


@torch.no_grad()
def expected(pipe, prompt, images=None, **settings):
    return pipe.encode_prompt(prompt, images=images, **settings)


def model_of_width(width):
    config = {} if width is None else {"context_dim": width}
    return SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)))


# What the page shows ---------------------------------------------------------------------------------------------------


def test_nodes_have_the_ids_that_workflows_name_and_each_input_a_tooltip_and_each_node_a_help_page(nodes):
    listed = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    schemas = [node.define_schema() for node in listed]
    assert [schema.node_id for schema in schemas] == IDS
    for schema in schemas:
        assert schema.display_name and schema.category == nodes.CATEGORY and schema.description.endswith(".")
        assert all(part.options.get("tooltip") for part in [*schema.inputs, *schema.outputs])
        names = [part.id for part in schema.inputs]
        assert len(set(names)) == len(names)
        page = (SOURCE / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")


def test_demo_is_last_and_the_default_only_where_there_is_no_folder(monkeypatch, tmp_path):
    nodes = install_standin(monkeypatch, tmp_path)

    def offered():
        part = nodes.KosmosGLoader.define_schema().inputs[0]
        return part.options["options"], part.options["default"]

    assert offered() == ([nodes.DEMO], nodes.DEMO)
    for name in ("zebra", "kosmos-g"):
        (tmp_path / "models" / "kosmos_g" / name).mkdir(parents=True)
    assert offered() == (["kosmos-g", "zebra", nodes.DEMO], "kosmos-g")


# Prompts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a hat", "<i> in a hat", "<i> in the suit of <i>", "<i><i> and <i>"])
def test_condition_is_that_of_encode_prompt_to_the_bit(nodes, encoder, pipe, text):
    pictures = [picture(seed) for seed in range(text.count("<i>"))]
    inputs = {f"image{number}": as_image(one) for number, one in enumerate(pictures, 1)}
    given = states(run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text=text, **inputs))
    assert torch.equal(given, expected(pipe, text, pictures or None)[0])
    assert given.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_image_has_the_pixels_of_its_file(nodes, encoder, mode):
    from kosmos_g_diffusers.comfyui.encoder import as_images

    one = picture(3, mode)
    tensor = as_image(one) if mode != "L" else as_image(one)[..., None]
    (again,) = as_images(tensor)
    assert (again.mode, again.tobytes()) == (mode, one.tobytes())


def test_every_value_of_a_pixel_survives(nodes):
    from kosmos_g_diffusers.comfyui.encoder import as_images

    values = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert as_images(as_image(values))[0].tobytes() == values.tobytes()
    assert as_images(torch.tensor([-1.0, 2.0, 0.5]).expand(1, 1, 1, 3))[0].tobytes() == bytes([0, 255, 128])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_that_is_not_finite_is_refused(nodes, encoder, value):
    broken = as_image(picture(0))
    broken[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="<i>", image1=broken)


def test_batch_is_several_images_in_the_place_of_its_mark(nodes, encoder, pipe):
    a, b, c = (picture(seed) for seed in range(3))
    given = run_node(
        nodes.KosmosGPrompt, kosmos_g=encoder, text="<i> and <i>", image1=as_image(a, b), image2=as_image(c)
    )
    assert torch.equal(states(given), expected(pipe, "<i><i> and <i>", [a, b, c])[0])


def test_images_are_in_the_order_of_their_numbers_whatever_the_order_of_links(nodes, encoder, pipe):
    pictures = [picture(seed) for seed in range(11)]
    text = " ".join(["<i>"] * 11)
    inputs = {
        f"image{number}": as_image(pictures[number - 1]) for number in (11, 2, 1, 10, 9, 3, 4, 5, 6, 8, 7)
    }
    given = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text=text, **inputs)
    assert torch.equal(states(given), expected(pipe, text, pictures)[0])


@pytest.mark.parametrize("text, count", [("<i> and <i>", 1), ("a hat", 1), ("<i>", 0), ("<i>", 3)])
def test_marks_and_images_are_counted_before_anything_runs(nodes, text, count):
    links = {f"image{number + 1}": None for number in range(count)}
    answer = nodes.KosmosGPrompt.validate_inputs(kosmos_g=None, text=text, **links)
    assert answer == (
        f"The text has {text.count('<i>')} <i> marks, and {count} images are connected. Write one <i> for each image, in the "
        "order of the inputs."
    )


def test_text_that_comes_by_a_link_is_counted_when_it_is_there(nodes, encoder):
    assert nodes.KosmosGPrompt.validate_inputs(kosmos_g=None, text=None, image1=None) is True
    with pytest.raises(ValueError, match="The text has 0 <i> marks, and 1 images"):
        nodes.KosmosGPrompt.execute(kosmos_g=encoder, text="none", image1=as_image(picture(0)))


def test_unknown_word_names_the_nodes_that_add_one(nodes, encoder):
    with pytest.raises(
        ValueError, match="<dog>, which names no image word.*Connect Image Word or Load Image Words"
    ):
        run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="<dog> in a hat")


def test_encoder_is_loaded_by_the_memory_management_before_it_runs(nodes, encoder):
    import comfy.model_management as memory

    memory.loaded.clear()
    run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a hat")
    assert memory.loaded == [encoder.patcher]
    assert encoder.patcher.model.text_encoder is encoder.pipe.text_encoder


def test_two_prompts_on_one_picture_compute_its_states_once(nodes, encoder, pipe):
    passes = []
    embeddings = encoder.pipe.text_encoder.vision_model.model.embeddings
    handle = embeddings.register_forward_hook(lambda *_: passes.append(1))
    encoder.pipe.vision_cache.clear()
    for text in ("<i> in a hat", "a painting of <i>"):
        given = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text=text, image1=as_image(picture(5)))
        assert torch.equal(states(given), expected(pipe, text, [picture(5)])[0])
    handle.remove()
    assert len(passes) == 1


# Negative prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a hat", "a <i> hat"])
def test_negative_is_that_of_encode_prompt(nodes, encoder, pipe, text):
    given = states(run_node(nodes.KosmosGNegative, kosmos_g=encoder, text=text))
    assert torch.equal(given, expected(pipe, "a", negative_prompt=text or None)[1])


def test_negative_with_images(nodes, encoder, pipe):
    given = run_node(nodes.KosmosGNegative, kosmos_g=encoder, text="<i> hat", image1=as_image(picture(1)))
    wanted = expected(pipe, "a", negative_prompt="<i> hat", negative_images=[picture(1)])[1]
    assert torch.equal(states(given), wanted)


def test_negative_image_without_a_mark_is_refused(nodes):
    answer = nodes.KosmosGNegative.validate_inputs(kosmos_g=None, text="", image1=None)
    assert answer.startswith("The text has 0 <i> marks, and 1 images are connected.")
    assert nodes.KosmosGNegative.validate_inputs(kosmos_g=None, text="<i>") is True


# Models ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["KosmosGPrompt", "KosmosGNegative"])
@pytest.mark.parametrize("width", [768, 2048, None])
def test_model_of_another_width_is_stopped(nodes, encoder, node, width):
    takes = "reads no states of this kind" if width is None else f"takes {width}"
    with pytest.raises(ValueError, match=f"This encoder gives 32-wide states, this model {takes}"):
        run_node(getattr(nodes, node), kosmos_g=encoder, text="a", model=model_of_width(width))


def test_model_of_the_same_width_changes_nothing(nodes, encoder):
    plain = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a")
    checked = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a", model=model_of_width(32))
    assert torch.equal(states(plain), states(checked))


def test_folder_that_is_no_kosmos_g_is_refused(nodes, root):
    (root / "models" / "kosmos_g" / "other").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="other' is not a Kosmos-G model that can be loaded: .*kosmos-g convert"
    ):
        run_node(nodes.KosmosGLoader, model_name="other")


def test_stable_diffusion_folder_is_no_kosmos_g(nodes, root, folder):
    place = root / "models" / "kosmos_g" / "sd"
    shutil.copytree(folder, place)
    index = json.loads((place / "model_index.json").read_text())
    index |= {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (place / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a Kosmos-G model that can be loaded"):
        run_node(nodes.KosmosGLoader, model_name="sd")


@pytest.mark.parametrize("name", ["../../etc", "/etc", "nothing", ""])
def test_only_what_is_offered_is_loaded(nodes, name):
    with pytest.raises(
        ValueError, match="There is no model .* Put a folder that kosmos-g convert wrote into "
    ):
        run_node(nodes.KosmosGLoader, model_name=name)


def test_hub_id_is_no_way_to_a_folder(nodes, tmp_path, monkeypatch):
    (tmp_path / "some" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for hub_id in ("/etc", "../x", "some/folder", "./some", "https://example.org/x", "a/b/c"):
        with pytest.raises(ValueError, match="Expected OWNER/NAME"):
            run_node(nodes.KosmosGLoader, model_name=nodes.DEMO, hub_id=hub_id)


def test_dtype_is_the_one_that_was_chosen(nodes, encoder):
    other = run_node(nodes.KosmosGLoader, model_name="tiny", dtype="bfloat16")
    assert (encoder.pipe.text_encoder.dtype, other.pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16)
    given = states(run_node(nodes.KosmosGPrompt, kosmos_g=other, text="a hat"))
    assert given.dtype == torch.float32  # what ComfyUI's own nodes hand on


# Image words -----------------------------------------------------------------------------------------------------------


def test_image_word_is_read_behind_its_node_and_nowhere_else(nodes, encoder, folder):
    with_word = run_node(
        nodes.KosmosGImageWord, kosmos_g=encoder, name=" <my-dog> ", images=as_image(picture(1)), strength=0.7
    )
    pipe = KosmosGPipeline.from_pretrained(folder)
    pipe.add_image_word("<my-dog>", picture(1), strength=0.7)
    for _ in range(2):
        given = run_node(nodes.KosmosGPrompt, kosmos_g=with_word, text="<my-dog> in a hat")
        assert torch.equal(states(given), expected(pipe, "<my-dog> in a hat")[0])
        with pytest.raises(ValueError, match="Known words: none"):
            run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="<my-dog> in a hat")


def test_image_words_are_chained_and_a_batch_is_one_word(nodes, encoder, folder):
    chain = encoder
    for name, seeds in (("<a>", (1,)), ("<b>", (2, 3))):
        images = as_image(*map(picture, seeds))
        chain = run_node(nodes.KosmosGImageWord, kosmos_g=chain, name=name, images=images, strength=1.0)
    pipe = KosmosGPipeline.from_pretrained(folder)
    pipe.add_image_word("<a>", picture(1))
    pipe.add_image_word("<b>", [picture(2), picture(3)])
    given = run_node(nodes.KosmosGPrompt, kosmos_g=chain, text="<b> with <a>")
    assert torch.equal(states(given), expected(pipe, "<b> with <a>")[0])


@pytest.mark.parametrize("name", ["dog", "<Dog>", "<i>", ""])
def test_ill_formed_word_is_refused_and_leaves_nothing(nodes, encoder, name):
    with pytest.raises(ValueError, match="cannot name an image word"):
        run_node(
            nodes.KosmosGImageWord, kosmos_g=encoder, name=name, images=as_image(picture(1)), strength=1.0
        )
    assert encoder.pipe.image_words == [] and not encoder.words


def test_word_that_is_there_is_refused(nodes, encoder):
    word = {"name": "<a>", "images": as_image(picture(1)), "strength": 1.0}
    chain = run_node(nodes.KosmosGImageWord, kosmos_g=encoder, **word)
    with pytest.raises(ValueError, match="There is an image word '<a>' already"):
        run_node(nodes.KosmosGImageWord, kosmos_g=chain, **word)


def test_words_are_saved_and_loaded(nodes, encoder, root):
    chain = run_node(
        nodes.KosmosGImageWord, kosmos_g=encoder, name="<a>", images=as_image(picture(1)), strength=1.0
    )
    assert run_node(nodes.KosmosGSaveImageWords, kosmos_g=chain, filename_prefix="kosmos_g_words/mine") == ()
    assert nodes.KosmosGSaveImageWords.define_schema().is_output_node
    (name,) = nodes.KosmosGLoadImageWords.define_schema().inputs[1].options["options"]
    assert name == "mine_00001_.safetensors"
    loaded = run_node(nodes.KosmosGLoadImageWords, kosmos_g=encoder, words_name=name)
    given = [run_node(nodes.KosmosGPrompt, kosmos_g=one, text="<a> in a hat") for one in (chain, loaded)]
    assert torch.equal(*map(states, given))
    before = nodes.KosmosGLoadImageWords.fingerprint_inputs(words_name=name)
    Path(root, "output", "kosmos_g_words", name).write_bytes(b"other")
    assert nodes.KosmosGLoadImageWords.fingerprint_inputs(words_name=name) != before
    with pytest.raises(ValueError, match="cannot be read"):
        run_node(nodes.KosmosGLoadImageWords, kosmos_g=encoder, words_name=name)


def test_no_words_cannot_be_saved(nodes, encoder):
    with pytest.raises(ValueError, match="Image words to save"):
        run_node(nodes.KosmosGSaveImageWords, kosmos_g=encoder, filename_prefix="words")


def test_words_of_the_folder_itself_stay(nodes, root):
    pipe = build_tiny_pipeline()
    pipe.add_image_word("<own>", picture(4))
    pipe.save_pretrained(root / "models" / "kosmos_g" / "own")
    encoder = run_node(nodes.KosmosGLoader, model_name="own")
    wanted = expected(pipe, "<own> in a hat")[0]
    for _ in range(2):
        given = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="<own> in a hat")
        assert torch.equal(states(given), wanted)


# Blend -----------------------------------------------------------------------------------------------------------------


def test_blend_is_that_of_the_pipeline(nodes, encoder, pipe):
    prompts = [("a hat", 1.0), ("the suit", -0.25), ("a painting", 0.5)]
    inputs = {
        f"conditioning{number}": run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text=text)
        for number, (text, _) in enumerate(prompts, 1)
    }
    given = run_node(nodes.KosmosGBlend, weights="1, -0.25, .5", **inputs)
    # prompts of a batch are padded, which may round otherwise
    torch.testing.assert_close(states(given), pipe.blend(prompts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", ["1", "1, 2, 3", "", "one, two", "1;2"])
def test_weights_are_counted_before_anything_runs(nodes, weights):
    answer = nodes.KosmosGBlend.validate_inputs(weights=weights, conditioning1=None, conditioning2=None)
    assert answer == (
        f"The weights {weights!r} were given for 2 conditionings. Write one number for each, with commas between them."
    )


@pytest.mark.parametrize("weights", ["1, -1", "nan, 1", "inf, 1"])
def test_weights_that_make_no_mean_are_refused(nodes, encoder, weights):
    one = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a")
    with pytest.raises(ValueError, match="finite weights that do not sum to 0"):
        run_node(nodes.KosmosGBlend, weights=weights, conditioning1=one, conditioning2=one)


def test_conditionings_of_different_lengths_are_not_blended(nodes, encoder):
    one = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a")
    twice = [[torch.cat([one[0][0]] * 2, dim=1), {}]]
    with pytest.raises(ValueError, match="Give all the same shape"):
        run_node(nodes.KosmosGBlend, weights="1, 1", conditioning1=one, conditioning2=twice)


def test_combined_conditionings_are_not_blended(nodes, encoder):
    one = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a")
    with pytest.raises(ValueError, match="of 2 parts cannot be blended"):
        run_node(nodes.KosmosGBlend, weights="1, 1", conditioning1=one, conditioning2=[*one, *one])


def test_blend_keeps_the_options_of_the_first_conditioning(nodes, encoder):
    one = run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a")
    with_options = [[one[0][0], {"strength": 0.5}]]
    ((_, options),) = run_node(
        nodes.KosmosGBlend, weights="1, 1", conditioning1=with_options, conditioning2=one
    )
    assert options == {"strength": 0.5}


# The small model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sprites_compute_what_diffusers_computes(nodes):
    model, vae, control = run_node(nodes.KosmosGSprites)
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(SPRITES, subfolder="unet", dtype=torch.float32)
    config = model.model.model_config
    assert config.unet_config["context_dim"] == unet.config.cross_attention_dim
    x, timesteps = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([900.0, 900.0])
    context = torch.randn(2, 24, unet.config.cross_attention_dim, generator=generator)
    ours = model.model.diffusion_model
    assert torch.equal(
        ours(x, timesteps, context=context, control=None, transformer_options={}),
        unet(x, timesteps, context).sample,
    )
    hint = torch.rand(2, 3, 64, 64, generator=generator)
    net = ControlNetModel.from_pretrained(f"{SPRITES}/controlnet", dtype=torch.float32)
    down, middle = net(x, timesteps, context, hint, return_dict=False)
    given = control.control_model(x=x, hint=hint, timesteps=timesteps, context=context)
    wanted = unet(
        x, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    assert torch.equal(ours(x, timesteps, context=context, control={"input": [], **given}), wanted)
    plain = AutoencoderKL.from_pretrained(SPRITES, subfolder="vae", dtype=torch.float32)
    latents = vae.first_stage_model.encode(hint * 2 - 1)
    assert torch.equal(latents, plain.encode(hint * 2 - 1).latent_dist.mode())
    assert torch.equal(vae.first_stage_model.decode(latents), plain.decode(latents).sample)
    assert config.latent_format.scale_factor == plain.config.scaling_factor
    assert vae.downscale_ratio == vae.upscale_ratio == control.compression_ratio == 64 // latents.shape[-1]


def test_small_encoder_fits_its_own_model_alone(nodes):
    encoder = run_node(nodes.KosmosGLoader, model_name=nodes.DEMO)
    model, *_ = run_node(nodes.KosmosGSprites)
    width = encoder.pipe.text_encoder.config.aligner_hidden_size
    assert (
        states(run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a star", model=model)).shape[-1] == width
    )
    with pytest.raises(ValueError, match=f"This encoder gives {width}-wide states, this model takes 768"):
        run_node(nodes.KosmosGPrompt, kosmos_g=encoder, text="a star", model=model_of_width(768))
