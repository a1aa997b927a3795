import importlib.util
import re
import runpy
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from support.marks import COMPOSITE, DRAWN, term_of

from kosmos_g_diffusers.sprites.pretrained import SPRITES_NOTE
from kosmos_g_diffusers.sprites.reader import read
from kosmos_g_diffusers.sprites.world import HELD_OUT_TRIPLES, Scene, is_held_out, make_rng, render

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMOS = (
    "app_client.py",
    "common.py",
    "demo.py",
    "serve_ray.py",
)  # what the others share, and what other tests run
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.name not in DEMOS)
TILE = 256  # pixels: images of 64 are written four times as large
CAPTION = 40  # pixels below each tile
FEW = ("--steps", "2")


@pytest.fixture
def examples_path(monkeypatch):
    """Examples import each other, as with `python examples/x.py`, and anew in every test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    sys.modules.pop("common", None)


@pytest.fixture
def common(examples_path):
    """The module that the examples share."""
    return importlib.import_module("common")


@pytest.fixture
def run_example(examples_path, monkeypatch):
    """Function that runs an example in this process, with the given arguments."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def test_the_examples_are_those_that_were_promised():
    names = "text_to_image interleaved_prompt image_words controlnet multi_controlnet lora inpaint image_to_image "
    assert NAMES == sorted((names + "animate few_steps batch").split())


@pytest.mark.parametrize("name", NAMES)
def test_example_runs_as_its_first_command_says(name, run_example, tmp_path, capsys):
    if name == "lora":
        pytest.importorskip("peft")
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    commands = re.findall(r"^    (python .*)$", text, re.MULTILINE)
    assert commands == [f"python examples/{name}.py", f"python examples/{name}.py --model ./kosmos-g"]
    assert len(text.splitlines()) < 80
    run_example(name, *FEW, "--output", str(tmp_path / "out"))
    path = tmp_path / "out" / f"{name}.{'gif' if name == 'animate' else 'png'}"
    out = capsys.readouterr().out
    assert str(path) in out and SPRITES_NOTE in out
    with PIL.Image.open(path) as image:
        height = TILE if name == "animate" else TILE + CAPTION
        assert image.width % TILE == 0 and image.height % height == 0
        assert getattr(image, "n_frames", 1) == (16 if name == "animate" else 1)
        assert any(low != high for low, high in image.convert("RGB").getextrema())
    if name != "animate":  # a GIF carries no mark
        drawn_alone = ("batch", "few_steps", "interleaved_prompt", "lora", "text_to_image")
        assert term_of(path) == (DRAWN if name in drawn_alone else COMPOSITE)


def tiles(path, count):
    """The images of a row that an example has written, at the size in which they were drawn."""
    row = PIL.Image.open(path)
    assert row.size == (TILE * count, TILE + CAPTION)
    images = [row.crop((TILE * index, 0, TILE * (index + 1), TILE)) for index in range(count)]
    return [image.resize((64, 64), PIL.Image.Resampling.NEAREST) for image in images]


def distinct(path, count):
    return len({image.tobytes() for image in tiles(path, count)})


def test_three_ways_to_write_a_prompt_give_one_image(run_example, tmp_path):
    run_example("interleaved_prompt", *FEW, "--output", str(tmp_path))
    assert distinct(tmp_path / "interleaved_prompt.png", 3) == 1


def test_lora_of_the_example_changes_the_image(run_example, tmp_path, capsys):
    pytest.importorskip("peft")
    run_example("lora", *FEW, "--output", str(tmp_path))
    assert distinct(tmp_path / "lora.png", 4) == 4
    assert "The LoRAs have random weights" in capsys.readouterr().out


def test_two_loras_of_the_example_look_different(run_example, tmp_path):
    pytest.importorskip("peft")
    run_example("lora", "--steps", "8", "--output", str(tmp_path))
    images = [np.asarray(tile, float) for tile in tiles(tmp_path / "lora.png", 4)[:3]]
    for one, other in combinations(images, 2):  # to the eye: a part of the sprite, by much
        assert (np.abs(one - other).max(axis=-1) > 60).mean() > 0.02


def test_every_tile_has_its_caption(run_example, tmp_path):
    run_example("interleaved_prompt", *FEW, "--output", str(tmp_path))
    sheet = np.asarray(PIL.Image.open(tmp_path / "interleaved_prompt.png").convert("L"))
    for column in range(3):
        caption = sheet[TILE:, TILE * column : TILE * (column + 1)]
        assert caption.shape == (CAPTION, TILE) and caption.min() < 100 and (caption == 255).mean() > 0.7


def test_long_caption_stays_below_its_tile(common):
    tile = common.with_caption(
        PIL.Image.new("RGB", (TILE, TILE), "teal"), "a large yellow striped star " * 20
    )
    assert tile.size == (TILE, TILE + CAPTION)
    strip = np.asarray(tile.convert("L"))[TILE:]
    assert strip.min() < 100 and (strip[[0, -1]] == 255).all() and (strip[:, [0, -1]] == 255).all()


def test_frames_of_the_animation_belong_together(run_example, tmp_path, capsys):
    run_example("animate", "--steps", "6", "--output", str(tmp_path))
    assert "No motion was learned" in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "animate.gif") as film:
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB"), float))
    neighbours = [np.abs(frames[number] - frames[number - 1]).mean() for number in range(16)]
    opposites = [np.abs(frames[number] - frames[number - 8]).mean() for number in range(16)]
    assert 0 < np.mean(neighbours) < 0.5 * np.mean(opposites)


def test_hole_of_the_inpainted_sprite_is_beside_it_and_what_is_around_the_hole_stays(run_example, tmp_path):
    run_example("inpaint", *FEW, "--output", str(tmp_path))
    before, mask, after = tiles(tmp_path / "inpaint.png", 3)
    (heart,) = read(before).sprites
    assert heart.triple == ("heart", "red", "dotted")
    before, mask, after = (np.asarray(image, float) for image in (before, mask, after))
    cover = np.linalg.norm(before - before[0, 0], axis=-1) > 20
    hole = mask[..., 0] > 127
    assert hole.any() and not (cover & hole).any()
    assert not np.array_equal(before[hole], after[hole])
    # the VAE of the small model changes an image a little
    assert np.abs(before - after)[cover].mean() < 0.5 * np.abs(before - before[0, 0])[cover].mean()


def test_edges_of_two_controlnets_lie_in_halves_of_the_image(run_example, tmp_path):
    if importlib.util.find_spec("controlnet_aux") is None:
        pytest.skip("controlnet_aux is not installed (extra `control`)")
    pytest.importorskip("cv2", reason="controlnet_aux needs opencv-python-headless")
    run_example("multi_controlnet", *FEW, "--output", str(tmp_path))
    star, heart, _ = (np.asarray(tile)[..., 0] > 127 for tile in tiles(tmp_path / "multi_controlnet.png", 3))
    assert star[:, :32].any() and not star[:, 33:].any()
    assert heart[:, 32:].any() and not heart[:, :31].any()


def test_sprite_that_is_moved_stays_whole(common):
    for name, right, down in (("plain_star", -17, -6), ("plain_heart", 17, 6), ("heart", -18, 0)):
        image = PIL.Image.open(EXAMPLES / "images" / f"{name}.png")
        assert read(common.move(image, right, down)) == read(image)


@pytest.mark.parametrize("name", ["controlnet", "multi_controlnet"])
def test_without_controlnet_aux_other_edges_stand_in_and_that_is_said(
    name, run_example, tmp_path, monkeypatch, capsys
):
    def is_missing(*args, **kwargs):
        raise ImportError("controlnet_aux is not installed.")

    monkeypatch.setattr("kosmos_g_diffusers.control.controls.control_image", is_missing)
    run_example(name, *FEW, "--output", str(tmp_path))
    assert "controlnet_aux is not installed. Here plain differences" in capsys.readouterr().out
    tile = tiles(tmp_path / f"{name}.png", 2 if name == "controlnet" else 3)[0]
    edges = np.asarray(tile)[..., 0] > 127
    assert 0 < edges.sum() < 64 * 64 / 8 and not edges[[0, -1]].any() and not edges[:, [0, -1]].any()


def test_flag_that_earlier_documents_gave_changes_nothing(run_example, tmp_path, capsys):
    for folder, flags in (("with", ["--tiny"]), ("without", [])):
        run_example("text_to_image", *flags, *FEW, "--output", str(tmp_path / folder))
        assert ("no model was given" in capsys.readouterr().out) == (folder == "without")
    with_it, without = (tmp_path / folder / "text_to_image.png" for folder in ("with", "without"))
    assert with_it.read_bytes() == without.read_bytes()
    with pytest.raises(SystemExit):
        run_example("text_to_image", "--help")
    assert "--tiny" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["text_to_image", "interleaved_prompt", "inpaint", "animate", "few_steps"])
def test_example_takes_a_model_from_a_folder(name, run_example, tmp_path, monkeypatch, capsys, pipe):
    from diffusers import MotionAdapter, StableDiffusionPipeline

    pipe.save_pretrained(tmp_path / "kosmos-g")
    sizes = {"motion_layers_per_block": 1, "motion_num_attention_heads": 4, "motion_norm_num_groups": 8}
    adapter = MotionAdapter(block_out_channels=(16, 32), **sizes)
    monkeypatch.setattr(MotionAdapter, "from_pretrained", lambda repo, **kwargs: adapter)
    if name == "few_steps":
        pytest.importorskip("peft")
        random_lora = importlib.import_module("common").random_lora
        load = StableDiffusionPipeline.load_lora_weights
        monkeypatch.setattr(
            StableDiffusionPipeline,
            "load_lora_weights",
            lambda pipe, repo, name=None, **kwargs: load(pipe, random_lora(pipe.unet), name, **kwargs),
        )
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    arguments = ("--model", str(tmp_path / "kosmos-g"), "--output", str(tmp_path / "out"))
    run_example(name, *arguments, *FEW)
    assert [path.stem for path in (tmp_path / "out").iterdir()] == [name]
    assert SPRITES_NOTE not in capsys.readouterr().out


def test_frames_of_the_small_model_are_drawings_of_their_own(common, build_pipe):
    from diffusers import UNetMotionModel

    unet = build_pipe().unet
    motion = UNetMotionModel.from_unet2d(unet, common.resting_adapter(unet))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 8, 8, generator=generator)  # of three frames
    states = torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        together = motion(latents, 500, states.repeat_interleave(3, 0)).sample[0]
        alone = unet(latents[0].transpose(0, 1), 500, states.expand(3, -1, -1)).sample
    assert torch.allclose(together.transpose(0, 1), alone, atol=1e-5)


def demo(run_example, tmp_path, *arguments):
    """Run the demo; the files that it writes, by name."""
    run_example("demo", "--output", str(tmp_path / "out"), "--steps", "1", *arguments)
    return {path.name: path for path in (tmp_path / "out").iterdir()}


def test_demo_writes_a_sheet_of_prompts_with_held_out_sprites_and_says_what_draws(
    run_example, tmp_path, capsys
):
    files = demo(run_example, tmp_path)
    out = capsys.readouterr().out
    prompts = re.findall(r'^"(.*)"(.*)$', out, re.MULTILINE)
    assert ("<i> on a mint background", " star.png") in prompts
    assert sorted(files) == sorted(
        ["demo.png", *(f"demo_{row}_{seed}.png" for row in range(len(prompts)) for seed in range(4))]
    )
    assert str(files["demo.png"]) in out and SPRITES_NOTE in out
    assert all(prompt.count("<i>") == len(names.split()) for prompt, names in prompts)
    named = [re.findall(r"a (?:large|small) (\w+) (\w+) (\w+)", prompt) for prompt, _ in prompts]
    assert any(named)
    for colour, pattern, shape in sum(named, []):
        assert (shape, colour, pattern) in HELD_OUT_TRIPLES
    assert PIL.Image.open(files["demo_0_0.png"]).size == (64, 64)
    assert term_of(files["demo_0_0.png"]) == DRAWN and term_of(files["demo.png"]) == COMPOSITE
    sheet = PIL.Image.open(files["demo.png"])
    assert sheet.height >= 128 * len(prompts) and sheet.width >= 128 * 6
    star = np.asarray(PIL.Image.open(EXAMPLES / "images" / "star.png").resize((128, 128), 0))
    windows = np.asarray(sheet)[8:136]  # the first row shows the image of its prompt
    assert any((windows[:, left : left + 128] == star).all() for left in range(sheet.width - 128))


def test_demo_draws_photos_with_a_model_from_a_folder(run_example, tmp_path, monkeypatch, capsys, pipe):
    pipe.save_pretrained(tmp_path / "kosmos-g")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    files = demo(run_example, tmp_path, "--model", str(tmp_path / "kosmos-g"))
    out = capsys.readouterr().out
    assert '"<i> in the style of <i>" cat.jpg coffee.jpg' in out and SPRITES_NOTE not in out
    assert sorted(files) == ["demo.png", *(f"demo_0_{seed}.png" for seed in range(4))]


def test_photos_are_small_and_their_provenance_is_told():
    text = (EXAMPLES / "images" / "PROVENANCE.txt").read_text()
    for photo in (EXAMPLES / "images").glob("*.jpg"):
        assert photo.name in text
        assert photo.stat().st_size < 150_000
        assert PIL.Image.open(photo).mode == "RGB"


def test_sprites_are_held_out_and_their_provenance_tells_how_to_draw_them_again():
    text = (EXAMPLES / "images" / "PROVENANCE.txt").read_text()
    told = dict(re.findall(r"^(\w+)\.png +(a .*)$", text, re.MULTILINE))
    assert sorted(told) == sorted(path.stem for path in (EXAMPLES / "images").glob("*.png"))
    for name, words in told.items():
        caption, number = words.split(", number ")
        image = PIL.Image.open(EXAMPLES / "images" / f"{name}.png")
        scene = read(image)
        assert scene.caption == caption
        assert is_held_out(scene.sprites[0])
        again = render(Scene(scene.sprites, scene.background), make_rng(name, number))
        assert np.abs(np.asarray(image, float) - np.asarray(again, float)).mean() < 1
