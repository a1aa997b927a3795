"""`kosmos-g generate` with the parts of others: --unet, --lora, --image-words."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from support.composing import name_in_a_single_file

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.cli import main
from kosmos_g_diffusers.generation.generate import load_unet
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.settings import GenerationSettings, LoraInput
from kosmos_g_diffusers.testing import build_tiny_pipeline

SEED = ("--seed", "1", "--steps", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a picture, and a model in `kosmos-g`."""
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (32, 32), "teal").save("teal.png")
    build_tiny_pipeline().save_pretrained("kosmos-g")
    return tmp_path


@pytest.fixture
def fine_tuned(folder):
    """A U-Net of the model's shape with other weights."""
    torch.manual_seed(5)
    config = UNet2DConditionModel.load_config("kosmos-g/unet")
    return UNet2DConditionModel.from_config(config).eval()


def generate(*arguments):
    """Run the command with the model of the folder; returns the pixels."""
    arguments = ["generate", *arguments, "--model", "kosmos-g", *SEED, "--force"]
    assert main(arguments) == 0
    return np.asarray(PIL.Image.open("out.png"))


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *arguments]) == 2
    assert not Path("out.png").exists()
    return capsys.readouterr().err


def pictured(pipe, prompt="a hat", **arguments):
    """Pixels that a pipeline draws of what `generate` is asked."""
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    return np.asarray(pipe(prompt, num_inference_steps=2, generator=seed, **arguments).images[0])


# U-Nets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "stable-diffusion", ".safetensors", ".ckpt", "hub", "hub-unet"])
def test_unet_takes_the_place_of_the_models(folder, fine_tuned, monkeypatch, kind):
    source = "anime"
    if kind.startswith("."):
        source = f"anime{kind}"
        weights = {
            f"model.diffusion_model.{name_in_a_single_file(name)}": value
            for name, value in fine_tuned.state_dict().items()
        }
        torch.save({"state_dict": weights}, source) if kind == ".ckpt" else save_file(weights, source)
    elif kind == "stable-diffusion":
        fine_tuned.save_pretrained("anime/unet")
    elif kind == "unet":
        fine_tuned.save_pretrained("anime")
    else:
        source = "studio/anime"
        inside = "unet" if kind == "hub" else None

        def from_hub(repo, subfolder=None, **kwargs):
            assert repo == source
            if subfolder != inside:
                raise OSError("Entry not found")
            return fine_tuned

        monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", from_hub)
        unet = load_unet(source, fine_tuned)
        assert unet is fine_tuned
        return
    own = generate("a hat")
    image = generate("a hat", "--unet", source)
    expected = pictured(KosmosGPipeline.from_pretrained("kosmos-g", unet=fine_tuned))
    np.testing.assert_allclose(image.astype(int), expected, atol=1)  # mapped weights may round differently
    assert np.abs(image.astype(int) - own).max() > 10
    assert read_settings("out.png").unet == source
    assert main(["generate", "--from", "out.png", "--output", "again.png"]) == 0
    assert np.array_equal(PIL.Image.open("again.png"), image)


def test_unet_that_does_not_fit_is_refused(folder, fine_tuned, capsys):
    config = dict(fine_tuned.config)
    model = ("a hat", "--model", "kosmos-g")
    assert "no U-Net at 'missing'" in fails(capsys, *model, "--unet", "missing")
    assert "no U-Net at 'missing/unet.safetensors'" in fails(
        capsys, *model, "--unet", "missing/unet.safetensors"
    )
    assert "'nobody/nothing' cannot be loaded" in fails(capsys, *model, "--unet", "nobody/nothing")
    Path("text.safetensors").write_text("no weights")
    assert "'text.safetensors' cannot be loaded" in fails(capsys, *model, "--unet", "text.safetensors")
    Path("empty").mkdir()
    assert "'empty' cannot be loaded" in fails(capsys, *model, "--unet", "empty")
    UNet2DConditionModel.from_config({**config, "cross_attention_dim": 24}).save_pretrained("wide")
    assert "cross_attention_dim 24" in fails(capsys, *model, "--unet", "wide")
    larger = UNet2DConditionModel.from_config({**config, "block_out_channels": (64, 64)})
    names = {
        f"model.diffusion_model.{name_in_a_single_file(name)}": value
        for name, value in larger.state_dict().items()
    }
    save_file(names, "larger.safetensors")
    assert "'larger.safetensors' cannot be loaded" in fails(capsys, *model, "--unet", "larger.safetensors")
    names.popitem()
    missing = {name: value for name, value in names.items() if "time_embed" not in name}
    save_file(missing, "part.safetensors")
    assert "'part.safetensors' cannot be loaded" in fails(capsys, *model, "--unet", "part.safetensors")


# LoRA and image words ------------------------------------------------------------------------------------------------


def make_lora(unet, seed=3):
    """A random LoRA for the attention of a U-Net, in diffusers' spelling."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return {f"unet.{name}": value for name, value in peft.get_peft_model_state_dict(unet).items()}


def test_lora_acts_with_its_scale(folder, fine_tuned):
    save_file(make_lora(fine_tuned), "style.safetensors")
    own, full = generate("a hat"), generate("a hat", "--lora", "style.safetensors")
    half = generate("a hat", "--lora", "style.safetensors", "--lora-scale", "0.5")
    assert np.array_equal(generate("a hat", "--lora", "style.safetensors", "--lora-scale", "0"), own)
    assert len({image.tobytes() for image in (own, half, full)}) == 3
    pipe = KosmosGPipeline.from_pretrained("kosmos-g")
    pipe.load_lora_weights("style.safetensors")
    assert np.array_equal(pictured(pipe), full)
    generate("a hat", "--lora", "style.safetensors", "--lora-scale", "0.5")
    assert (read_settings("out.png").lora, read_settings("out.png").lora_scale) == ("style.safetensors", 0.5)
    assert main(["generate", "--from", "out.png", "--output", "again.png"]) == 0
    assert np.array_equal(PIL.Image.open("again.png"), half)


def test_several_loras_act_together_each_with_the_scale_behind_it(folder, fine_tuned, capsys):
    first, second = (make_lora(UNet2DConditionModel.from_config(fine_tuned.config), seed) for seed in (3, 4))
    save_file(first, "a.safetensors")
    save_file(second, "b.safetensors")
    both = ("--lora", "a.safetensors", "--lora", "b.safetensors")
    image = generate("a hat", *both, "--lora-scale", "0.5")  # of the second
    assert read_settings("out.png").loras == (LoraInput("a.safetensors"), LoraInput("b.safetensors", 0.5))
    assert read_settings("out.png").lora is None
    pipe = KosmosGPipeline.from_pretrained("kosmos-g")
    for name in "ab":
        pipe.load_lora_weights(f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert np.array_equal(pictured(pipe), image)
    assert main(["generate", "--from", "out.png", "--output", "again.png"]) == 0
    assert np.array_equal(PIL.Image.open("again.png"), image)
    each = (
        "--lora",
        "a.safetensors",
        "--lora-scale",
        "0.25",
        "--lora",
        "b.safetensors",
        "--lora-scale",
        "0.75",
    )
    in_order = (*both, "--lora-scale", "0.25", "--lora-scale", "0.75")
    assert np.array_equal(generate("a hat", *each), generate("a hat", *in_order))
    assert [lora.scale for lora in read_settings("out.png").loras] == [0.25, 0.75]
    # others than those of the PNG, and other scales of its own
    assert main(["generate", "--from", "again.png", "--lora", "b.safetensors", "--output", "one.png"]) == 0
    assert (read_settings("one.png").lora, read_settings("one.png").lora_scale) == ("b.safetensors", 1.0)
    scales = ("--lora-scale", "0.1", "--lora-scale", "0.2")
    assert main(["generate", "--from", "again.png", *scales, "--output", "scaled.png"]) == 0
    assert [lora.scale for lora in read_settings("scaled.png").loras] == [0.1, 0.2]
    Path("out.png").unlink()
    for wrong in (("--from", "again.png", "--lora-scale", "0.1"), ("a hat", "--lora-scale", "1", *both)):
        assert "1 --lora-scale and 2 --lora were given" in fails(capsys, *wrong)
    twice = ("--lora-scale", "1", "--lora-scale", "2", "--lora", "b.safetensors", "--lora", "b.safetensors")
    assert "2 --lora-scale and 3 --lora" in fails(capsys, "a hat", "--lora", "a.safetensors", *twice)
    assert "1 --lora-scale and 0 --lora" in fails(capsys, "a hat", "--lora-scale", "1")
    Path("b.safetensors").unlink()
    assert "names the LoRA 'b.safetensors', which is not here" in fails(capsys, "--from", "again.png")


def test_png_of_one_lora_is_as_older_packages_read_it():
    record = json.loads(GenerationSettings("a hat", lora="a.safetensors", lora_scale=0.5).to_json())
    assert record["lora"] == "a.safetensors" and "loras" not in record


def test_lora_that_cannot_be_used_is_refused(folder, capsys):
    model = ("a hat", "--model", "kosmos-g", "--lora")
    assert "LoRA 'missing.safetensors' cannot be loaded (There is no LoRA" in fails(
        capsys, *model, "missing.safetensors"
    )
    Path("text.safetensors").write_text("no weights")
    assert "LoRA 'text.safetensors' cannot be loaded" in fails(capsys, *model, "text.safetensors")
    assert "LoRA 'nobody/nothing' cannot be loaded" in fails(capsys, *model, "nobody/nothing")
    assert "lora_scale is nan" in fails(capsys, *model, "text.safetensors", "--lora-scale", "nan")


def test_image_words_of_files(folder, capsys):
    pipe = KosmosGPipeline.from_pretrained("kosmos-g")
    pipe.add_image_word("<pond>", PIL.Image.open("teal.png"))
    Path("words").mkdir()
    pipe.save_image_words("words/pond.safetensors")
    assert "<pond>" in fails(capsys, "<pond> at night", "--model", "kosmos-g")
    image = generate("<pond> at night", "--image-words", "words/pond.safetensors")
    assert np.array_equal(image, generate("<i> at night", "--image", "teal.png"))
    generate("<pond> at night", "--image-words", "words/pond.safetensors", "--output", "words/out.png")
    assert main(["generate", "--from", "words/out.png", "--output", "again.png"]) == 0
    assert np.array_equal(PIL.Image.open("again.png"), PIL.Image.open("words/out.png"))
    Path("words/pond.safetensors").write_bytes(b"other")
    Path("out.png").unlink()
    message = fails(capsys, "--from", "words/out.png")
    assert "has changed since. Pass --image-words anew" in message


@pytest.mark.parametrize("part", ["unet", "lora"])
def test_what_a_png_names_is_not_downloaded(folder, capsys, part):
    settings = GenerationSettings("a hat", model="kosmos-g", **{part: "stranger/part"})
    write_png(PIL.Image.new("RGB", (8, 8)), "a.png", settings)
    assert f"'stranger/part', which is not here. Pass it with --{part}" in fails(capsys, "--from", "a.png")
