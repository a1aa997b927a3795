import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import SafetensorError

from kosmos_g_diffusers import SPRITES, conversion, environment
from kosmos_g_diffusers.cli import COMMANDS, build_parser, main
from kosmos_g_diffusers.commands import env
from kosmos_g_diffusers.generation import generate as generation
from kosmos_g_diffusers.generation.png import read_settings, write_png
from kosmos_g_diffusers.generation.schedulers import SCHEDULERS, make_scheduler
from kosmos_g_diffusers.generation.settings import GenerationSettings
from kosmos_g_diffusers.sprites import STAR

PHOTOS = Path(__file__).parents[1] / "examples" / "images"
PROMPT = ["<i> in the style of <i>", "--image", "cat.jpg", "--image", "coffee.jpg"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the two example photos in it."""
    for name in ("cat.jpg", "coffee.jpg"):
        (tmp_path / name).write_bytes((PHOTOS / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments, steps=2):
    return main(["generate", *arguments, *(["--steps", str(steps)] if steps else [])])


def pixels(path):
    return PIL.Image.open(path).tobytes()


def fails(capsys, *arguments):
    """Run `kosmos-g` and return its one line of error."""
    capsys.readouterr()
    assert main([*arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "kosmos-g: error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_run_writes_a_file_per_image_and_a_grid(folder, capsys):
    negative = ["--negative", "a hat", "--guidance", "3", "--scheduler", "dpm", "--height", "48"]
    assert generate(*PROMPT, "--num-images", "3", "--seed", "5", *negative) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["out_0.png", "out_1.png", "out_2.png", "out.png", "out_enlarged.png"]
    assert "knows nothing but sprites" in err
    assert PIL.Image.open("out_1.png").size == (64, 48)
    assert PIL.Image.open("out.png").size == (128, 96)
    first, grid = read_settings("out_0.png"), read_settings("out.png")
    assert (first.seed, first.index, first.num_images) == (5, 0, 1)
    assert (grid.seed, grid.index, grid.num_images) == (5, None, 3)
    assert read_settings("out_2.png").seed == 7
    assert [picture.path for picture in first.images] == ["cat.jpg", "coffee.jpg"]
    assert (first.negative_prompt, first.guidance, first.steps, first.scheduler) == ("a hat", 3.0, 2, "dpm")
    assert (first.height, first.width, first.dtype, first.device) == (48, 64, "float32", "cpu")
    assert first.versions["torch"] == torch.__version__


def test_image_is_made_again_from_itself(folder, capsys):
    # an ancestral sampler draws noise at every step
    generate(*PROMPT, "--num-images", "2", "--scheduler", "euler-ancestral")
    assert generate("--from", "out_1.png", "--output", "again.png", steps=None) == 0
    assert pixels("again.png") == pixels("out_1.png") != pixels("out_0.png")
    assert "other versions" not in capsys.readouterr().err


@pytest.mark.parametrize("controlled", [False, True])
def test_image_that_was_changed_is_changed_again_from_itself(folder, controlled):
    hole = PIL.Image.new("L", (64, 64))
    hole.paste(255, (0, 0, 32, 64))
    hole.save("hole.png")
    shutil.copy(STAR, "photo.png")
    change = ["a large red dotted heart on a black background", "--init-image", "photo.png", "--seed", "1"]
    change += ["--control", "canny:photo.png"] if controlled else []
    assert generate(*change, "--strength", "0.5", "--output", "whole.png", steps=4) == 0
    assert generate(*change, "--mask", "hole.png", "--output", "part.png", steps=4) == 0
    for name, strength in (("whole", 0.5), ("part", 1.0)):
        settings = read_settings(f"{name}.png")
        assert (settings.strength, settings.init_image.path) == (strength, "photo.png")
        assert settings.is_composite and (settings.mask is not None) == (name == "part")
        assert generate("--from", f"{name}.png", "--output", "again.png", "--force", steps=None) == 0
        assert pixels("again.png") == pixels(f"{name}.png")
    kept = np.asarray(PIL.Image.open("photo.png").convert("RGB")).astype(int)
    difference = np.abs(np.asarray(PIL.Image.open("part.png")) - kept).mean(axis=(0, 2))
    assert 3 * difference[40:].mean() < difference[:24].mean()  # the VAE alone has changed the right half
    Path("hole.png").write_bytes(Path("photo.png").read_bytes())
    assert generate("--from", "part.png", "--output", "other.png", steps=None) == 2


def test_run_is_made_again_from_its_grid(folder):
    generate(*PROMPT, "--num-images", "2")
    generate("--from", "out.png", "--output", "again.png", steps=None)
    for name in ("{}_0.png", "{}_1.png", "{}.png"):
        assert pixels(name.format("again")) == pixels(name.format("out"))


def test_flags_beside_from_change_what_they_name(folder):
    generate(*PROMPT, "--seed", "1")
    generate("--from", "out.png", "--output", "b.png", "--seed", "2", "--guidance", "1", steps=3)
    a, b = read_settings("out.png"), read_settings("b.png")
    assert (b.seed, b.guidance, b.steps, b.prompt, b.images) == (2, 1.0, 3, a.prompt, a.images)
    generate("--from", "out.png", "a hat", "--output", "c.png", steps=None)
    assert (read_settings("c.png").prompt, read_settings("c.png").images) == ("a hat", ())


def test_seed_is_drawn_and_stored_when_none_is_given(folder):
    generate(*PROMPT)
    generate(*PROMPT, "--output", "b.png")
    assert read_settings("out.png").seed != read_settings("b.png").seed


def test_image_depends_on_pictures_and_their_order(folder):
    generate(*PROMPT, "--seed", "1")
    swapped = [PROMPT[0], "--image", "coffee.jpg", "--image", "cat.jpg"]
    generate(*swapped, "--seed", "1", "--output", "swapped.png")
    generate(*PROMPT, "--seed", "1", "--output", "same.png")
    assert pixels("same.png") == pixels("out.png") != pixels("swapped.png")


def test_changed_or_missing_picture_is_named(folder, capsys):
    generate(*PROMPT, "--seed", "1")
    again = ["generate", "--from", "out.png", "--output", "again.png"]
    cat = Path("cat.jpg").read_bytes()
    Path("cat.jpg").write_bytes(Path("coffee.jpg").read_bytes())
    assert "'cat.jpg' has changed since. Pass --image" in fails(capsys, *again)
    Path("cat.jpg").unlink()
    assert "'cat.jpg' is not there. Pass --image" in fails(capsys, *again)
    Path("moved.jpg").write_bytes(cat)
    assert main([*again, "--image", "moved.jpg", "--image", "coffee.jpg"]) == 0
    assert pixels("again.png") == pixels("out.png")


def test_show_prints_settings_and_runs_nothing(folder, capsys):
    generate(*PROMPT, "--seed", "1")
    Path("cat.jpg").unlink()
    capsys.readouterr()
    assert main(["generate", "--from", "out.png", "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPT[0]


def test_show_cannot_steer_the_terminal(folder, capsys):
    for prompt in ("雪", "\x1b[2J \x9b \u202e"):
        write_png(PIL.Image.new("RGB", (8, 8)), "a.png", GenerationSettings(prompt), overwrite=True)
        assert main(["generate", "--from", "a.png", "--show"]) == 0
        shown = capsys.readouterr().out
        assert json.loads(shown)["prompt"] == prompt
        assert all(character.isprintable() or character == "\n" for character in shown)


def test_files_are_overwritten_only_with_force(folder, capsys, monkeypatch):
    Path("out_1.png").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(generation, "load_pipeline", None)  # refused before it is called
        assert "out_1.png would be overwritten" in fails(capsys, "generate", *PROMPT, "--num-images", "2")
    assert Path("out_1.png").read_bytes() == b"mine"
    assert not Path("out_0.png").exists()
    assert generate(*PROMPT, "--num-images", "2", "--force") == 0
    assert read_settings("out_1.png").index == 1


# Enlarged copies -----------------------------------------------------------------------------------------------------


def test_small_image_gets_an_enlarged_copy_and_stays_as_it_is(folder, capsys):
    assert generate("a hat", "--seed", "1") == 0
    assert capsys.readouterr().out.split() == ["out.png", "out_enlarged.png"]
    image, copy = PIL.Image.open("out.png"), PIL.Image.open("out_enlarged.png")
    assert (image.size, copy.size) == ((64, 64), (256, 256))
    assert copy.resize((64, 64), PIL.Image.Resampling.NEAREST).tobytes() == image.tobytes()
    assert copy.crop((0, 0, 4, 4)).getcolors() == [(16, image.getpixel((0, 0)))]
    assert read_settings("out_enlarged.png") == read_settings("out.png")
    assert generate("a hat", "--seed", "1", "--enlarge", "1", "--output", "plain.png") == 0
    assert capsys.readouterr().out.split() == ["plain.png"] and pixels("plain.png") == image.tobytes()


def test_maps_are_written_next_to_the_images_and_regions_are_stored(folder, capsys):
    where = ["--maps", "--binding", "1", "--region", "0,0,0.5,1", "--region", "none", "--enlarge", "1"]
    assert generate(*PROMPT, *where, "--seed", "3", "--num-images", "2", steps=3) == 0
    out = capsys.readouterr().out.split()
    assert out == ["out_0.png", "out_0_maps.png", "out_1.png", "out_1_maps.png", "out.png"]
    settings = read_settings("out_0.png")
    assert (settings.binding, settings.regions) == (1.0, ((0.0, 0.0, 0.5, 1.0), None))
    # the image and a panel for each source: two images, words, the null token; at least 192 pixels and a label
    assert PIL.Image.open("out_0_maps.png").size == (5 * 192, 192 + 18)
    assert read_settings("out_0_maps.png") == settings
    assert generate("--from", "out_1.png", "--output", "again.png", steps=None) == 0
    assert pixels("again.png") == pixels("out_1.png")
    # maps alone change nothing, and are not stored
    generate(*PROMPT, "--seed", "3", "--output", "plain.png", "--enlarge", "1", steps=3)
    generate(*PROMPT, "--seed", "3", "--output", "seen.png", "--enlarge", "1", "--maps", steps=3)
    assert pixels("seen.png") == pixels("plain.png") != pixels("out_0.png")
    assert read_settings("seen.png") == read_settings("plain.png")
    # a prompt of words alone has no images to place
    assert generate("--from", "out_0.png", "a hat", "--output", "words.png", steps=None) == 0
    # what is there is kept, what is missing is made
    kept = pixels("out_0.png")
    for name in ("out_0_maps.png", "out_1.png"):
        Path(name).unlink()
    same = [*PROMPT, *where, "--seed", "3", "--num-images", "2"]
    assert "would be overwritten" in fails(capsys, "generate", *same, "--steps", "3")
    assert generate(*same, "--resume", steps=3) == 0
    assert pixels("out_0.png") == kept and Path("out_0_maps.png").is_file() and Path("out_1.png").is_file()


def test_other_models_get_an_enlarged_copy_when_it_is_asked_for(folder, capsys):
    assert generate("a hat", "--model", SPRITES) == 0
    assert capsys.readouterr().out.split() == ["out.png"]
    assert generate("a hat", "--model", SPRITES, "--enlarge", "2", "--output", "b.png") == 0
    assert capsys.readouterr().out.split() == ["b.png", "b_enlarged.png"]
    assert PIL.Image.open("b_enlarged.png").size == (128, 128)
    assert "--enlarge is 0" in fails(capsys, "generate", "a hat", "--enlarge", "0")
    Path("b.png").unlink()
    assert "b_enlarged.png would be overwritten" in fails(
        capsys, "generate", "a hat", "--model", SPRITES, "--enlarge", "2", "--output", "b.png"
    )


# Runs that were stopped ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(folder, monkeypatch):
    """A run of three images that Ctrl-C ended while it drew the second; returns its arguments."""
    arguments = [*PROMPT, "--num-images", "3", "--scheduler", "euler-ancestral"]
    draw = generation.draw_images

    def draw_one(*args, **kwargs):
        yield next(draw(*args, **kwargs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation, "draw_images", draw_one)
        assert generate(*arguments) == 130
    assert sorted(path.name for path in folder.glob("*.png")) == ["out_0.png"]
    return arguments


def test_stopped_run_keeps_what_is_there_and_draws_the_rest(stopped, capsys):
    first = Path("out_0.png").read_bytes()
    assert "Pass --force, --resume to keep" in fails(capsys, "generate", *stopped, "--steps", "2")
    assert generate(*stopped, "--resume") == 0
    assert capsys.readouterr().out.split() == [
        "out_0.png",
        "out_1.png",
        "out_2.png",
        "out.png",
        "out_enlarged.png",
    ]
    assert Path("out_0.png").read_bytes() == first
    seed = read_settings("out_0.png").seed
    assert [read_settings(f"out_{index}.png").seed for index in range(3)] == [seed, seed + 1, seed + 2]
    assert generate(*stopped, "--seed", str(seed), "--output", "whole.png") == 0
    for name in ("{}_0.png", "{}_1.png", "{}_2.png", "{}.png", "{}_enlarged.png"):
        assert pixels(name.format("out")) == pixels(name.format("whole"))
        assert read_settings(name.format("out")) == read_settings(name.format("whole"))


def test_seed_of_a_resumed_run_is_told_by_any_image_that_is_there(stopped):
    generate(*stopped, "--seed", "7", "--output", "whole.png")
    Path("out_0.png").unlink()
    for name in ("_2", ""):  # the last image, and then the grid alone
        shutil.copy(f"whole{name}.png", f"out{name}.png")
        assert generate(*stopped, "--resume") == 0
        assert read_settings("out_0.png").seed == 7 and pixels("out_1.png") == pixels("whole_1.png")
        for path in Path().glob("out*"):
            path.unlink()


def test_resumed_run_that_is_complete_draws_nothing(stopped, monkeypatch, capsys):
    generate(*stopped, "--resume")
    before = {path: path.read_bytes() for path in Path().glob("out*")}
    capsys.readouterr()
    monkeypatch.setattr(generation, "prompt_arguments", None)
    assert generate(*stopped, "--resume") == 0
    assert {path: path.read_bytes() for path in Path().glob("out*")} == before
    assert len(capsys.readouterr().out.split()) == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--guidance", "3"], "out_0.png was made with other settings: guidance is 7.5 in it and 3.0 now"),
        (["--seed", "1"], "seed is "),
        (["--scheduler", "ddim"], "scheduler is 'euler-ancestral' in it and 'ddim' now"),
        (["--negative", "a hat", "--guidance", "3"], "negative_prompt is None in it and 'a hat' now"),
        (["--dtype", "bfloat16"], "dtype is 'float32' in it"),
        (["--height", "48"], "height is 64 in it and 48 now"),
        (["--lora", "a.safetensors"], "lora is None in it and 'a.safetensors' now"),
        (["--model", SPRITES], "model is None in it"),
    ],
)
def test_image_of_other_settings_is_not_kept(stopped, capsys, monkeypatch, changed, message):
    monkeypatch.setattr(generation, "load_pipeline", None)  # refused before it is called
    assert message in fails(capsys, "generate", *stopped, "--resume", *changed, "--steps", "2")
    assert not Path("out_1.png").exists()


def test_image_of_another_size_is_not_kept_when_the_model_decides_the_size(folder, capsys):
    generate("a hat", "--seed", "1", "--height", "48")
    message = fails(capsys, "generate", "a hat", "--seed", "1", "--steps", "2", "--resume")
    assert "height is 48 in it and 64 now" in message


def test_device_versions_and_place_in_the_run_do_not_count(stopped):
    settings = replace(read_settings("out_0.png"), device="cuda:1", versions={"torch": "1.0"}, index=None)
    write_png(PIL.Image.open("out_0.png"), "out_0.png", settings, overwrite=True)
    assert generate(*stopped, "--resume") == 0
    assert read_settings("out_0.png").versions == {"torch": "1.0"}


def test_what_cannot_be_kept_is_named(stopped, capsys):
    command = ("generate", *stopped, "--steps", "2", "--resume")
    Path("cat.jpg").write_bytes(Path("coffee.jpg").read_bytes())
    assert "the contents of its images have changed since" in fails(capsys, *command)
    Path("cat.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes())
    whole = Path("out_0.png").read_bytes()
    Path("out_0.png").write_bytes(whole[:-3000])
    assert "out_0.png cannot be read" in fails(capsys, *command)
    PIL.Image.new("RGB", (64, 64)).save("out_0.png")
    assert "'out_0.png' carries no settings" in fails(capsys, *command)
    with pytest.raises(SystemExit):
        generate(*stopped, "--resume", "--force")


def test_part_file_of_a_killed_run_is_removed_by_the_next(folder):
    (folder / ".out_1.png.0123abcd.part").write_bytes(b"half")
    (folder / ".mine.png.0123abcd.part").write_bytes(b"half")
    generate("a hat", "--num-images", "2", "--enlarge", "1", steps=1)
    names = {path.name for path in folder.iterdir()} - {"cat.jpg", "coffee.jpg"}
    assert names == {"out.png", "out_0.png", "out_1.png", ".mine.png.0123abcd.part"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Neither a prompt nor --from"),
        (["<i> in the snow"], "1 '<i>' marks but 0 images"),
        (["a hat", "--image", "cat.jpg"], "0 '<i>' marks but 1 images"),
        (["<i>", "--image", "missing.png"], "no file at 'missing.png'"),
        (["<i>", "--image", "https://example.org/a.png"], "download URLs first"),
        (["<i>", "--image", "text.png"], "Image 0 of prompt 0 cannot be read from 'text.png'"),
        (["a hat", "--output", "out.jpg"], "does not end in .png"),
        (["a hat", "--output", "missing/out.png"], "no folder 'missing'"),
        (["a hat", "--output", "."], "'.' is a folder"),
        (["a hat", "--output", "out.png/"], "'out.png/' is a folder"),
        (["a hat", "--output", f"{'a' * 300}.png"], "File name too long"),
        (
            ["a hat", "--num-images", "2", "--output", f"{'a' * 250}.png"],
            "cannot be written: File name too long",
        ),
        (["a hat", "--model", ""], "model is ''"),
        (["a hat", "--height", "65"], "multiple of 8"),
        (["a hat", "--steps", "0"], "steps is 0"),
        (["a hat", "--guidance", "nan"], "guidance is nan"),
        (["a hat", "--binding", "nan"], "binding is nan"),
        (["a hat", "--binding", "-1"], "binding is -1"),
        (["a hat", "--region", "0,0,1,1"], "1 regions were given for a prompt of 0 '<i>' marks"),
        (["<i>", "--image", "cat.jpg", "--region", "left"], "--region 'left' was given. Expected left,top"),
        (["<i>", "--image", "cat.jpg", "--region", "0,0,0,1"], "--region is (0.0, 0.0, 0.0, 1.0)"),
        (["a hat", "--device", "tpu"], "device is 'tpu'"),
        (["a hat", "--device", "cpu", "--offload", "model"], "the device is the CPU"),
        (["a <missing-word>"], "<missing-word>"),
        (["a hat", "--model", "./missing"], "missing"),
        (["--from", "cat.jpg"], "cannot be read as PNG"),
        (["--from", "missing.png"], "no file at 'missing.png'"),
    ],
)
def test_mistakes_give_one_line_and_no_file(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("text.png").write_text("no picture")
    assert message in fails(capsys, "generate", *arguments)
    assert not list(folder.glob("out*"))


def test_device_that_is_not_there_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(environment, "default_device", lambda: "cpu")
    assert "'cuda' is not there; 'cpu' is" in fails(capsys, "generate", "a hat", "--device", "cuda")


def test_traceback_is_shown_when_asked(folder):
    with pytest.raises(ValueError, match="marks"):
        main(["--traceback", "generate", "<i>"])


@pytest.mark.parametrize("flag", ["-v", "--verbose", "--traceback"])
def test_traceback_is_shown_wherever_its_flag_stands(monkeypatch, flag):
    monkeypatch.setattr("kosmos_g_diffusers.commands.compare.run", fail(KeyError("x")))
    words = ["compare", "a", "b"]
    for place in range(4):
        with pytest.raises(KeyError):
            main([*words[:place], flag, *words[place:]])
    with pytest.raises(ValueError, match="marks"):
        main(["generate", "<i>", flag])


def test_flags_of_all_commands_stand_behind_a_command_of_a_command():
    for words in (["train", "-v", "align"], ["train", "align", "-v"], ["-v", "train", "align"]):
        arguments = build_parser().parse_args(words)
        assert (arguments.verbose, arguments.traceback) == (True, False)
    arguments = build_parser().parse_args(["train", "align"])
    assert (arguments.verbose, arguments.traceback) == (False, False)


def fail(error):
    def run(*args):
        raise error

    return run


def test_verbosity_is_that_of_the_flag_while_the_command_runs_and_of_the_variable(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "kosmos_g_diffusers.commands.compare.run", lambda arguments: seen.append(environment.verbose())
    )
    monkeypatch.delenv(environment.VERBOSITY, raising=False)
    for arguments in (["compare", "a", "b"], ["-v", "compare", "a", "b"], ["compare", "a", "b"]):
        assert main(arguments) == 0
    for value in ("verbose", "quiet", ""):
        monkeypatch.setenv(environment.VERBOSITY, value)
        assert main(["compare", "a", "b"]) == 0
    assert seen == [False, True, False, True, False, False]
    assert os.environ[environment.VERBOSITY] == ""
    monkeypatch.setenv(environment.VERBOSITY, "loud")
    message = "KOSMOS_G_VERBOSITY is 'loud'; expected quiet or verbose."
    assert message in fails(capsys, "compare", "a", "b")
    monkeypatch.setattr("kosmos_g_diffusers.commands.compare.run", fail(OSError("no disk")))
    monkeypatch.setenv(environment.VERBOSITY, "verbose")
    with pytest.raises(OSError, match="no disk"):
        main(["compare", "a", "b"])


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("shapes\ndiffer"), "RuntimeError: shapes differ ("),
        (KeyError("vae"), "KeyError: 'vae' ("),
        (SafetensorError("header too large"), "SafetensorError: header too large ("),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion"),
        (MemoryError(), "kosmos-g: error: MemoryError ("),
        (AssertionError(), "kosmos-g: error: AssertionError ("),
    ],
)
def test_error_that_nobody_expects_is_one_line_with_a_hint(monkeypatch, capsys, error, named):
    monkeypatch.setattr("kosmos_g_diffusers.commands.compare.run", fail(error))
    assert main(["compare", "a", "b"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err and "--traceback" in err and "kosmos-g env" in err


def test_error_is_never_long(monkeypatch, capsys):
    monkeypatch.setattr("kosmos_g_diffusers.commands.compare.run", fail(ValueError("k" * 10**6)))
    assert len(fails(capsys, "compare", "a", "b")) < 1100
    long, words = "k" * 10**6, "k " * 10**5
    quoted = words + "it's"
    for arguments in (
        [long],
        [words],
        [quoted],
        ["compare", "a", "b", words],
        ["compare", "a", "b", long, long],
        ["compare", "a", "b", f"--{long}"],
        ["generate", "a", "--steps", quoted],
        ["generate", "a", "--steps", f'{quoted} "'],
        ["generate", "a", "--scheduler", words],
        ["generate", "a", f"--force={words}"],
        ["generate", "a", f"--control-={long}"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err.partition("error: ")[2]
        assert error.count("k") < 130, error


@pytest.mark.skipif(os.name != "posix", reason="needs a shell and pipes of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away_ends_the_command_without_a_word(unbuffered):
    command = f"{shlex.quote(sys.executable)} -m kosmos_g_diffusers"
    for arguments in ("control --list", "--help", "generate --help"):
        result = subprocess.run(
            ["bash", "-c", f"{command} {arguments} | true; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
        assert (result.stderr, result.stdout) == ("", "")
        assert result.returncode == (141 if "--list" in arguments else 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kosmos_g_diffusers", "control", "--list"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("kosmos-g: error: What the command prints cannot be written (No space")


class FullDiskError(Exception):
    """Of a library whose errors are neither OSError nor anything else that mistakes raise, as SafetensorError."""


def test_full_disk_is_an_error_that_explains_itself_whatever_library_raised_it(monkeypatch, capsys):
    def save(arguments):
        raise FullDiskError("Error while serializing: I/O error: (os error 28)")

    monkeypatch.setattr("kosmos_g_diffusers.commands.compare.run", save)
    assert main(["compare", "a", "b"]) == 2
    assert capsys.readouterr().err == (
        "kosmos-g: error: No space left on device: Error while serializing: I/O error: (os error 28)\n"
    )


# Completion ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_choices_and_files(folder, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    script, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    Path("notes").mkdir()
    script += '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_kosmos_g; printf "%s\\n" "${COMPREPLY[@]}"'

    def complete(*words):
        """What bash offers where the last of `words` is being typed."""
        command = ["bash", "-c", script, "bash", "kosmos-g", *words]
        return set(subprocess.run(command, capture_output=True, text=True).stdout.split())

    assert complete("gen") == {"generate"}
    assert complete("train", "al") == {"align"}
    assert {"--train-vision", "--tracker", "--traceback"} <= complete("train", "align", "--tr")
    assert complete("generate", "--scheduler", "dpm") == {"dpm", "dpm-karras", "dpm-sde"}
    assert complete("generate", "--image", "c") == {"cat.jpg", "coffee.jpg"}
    assert complete("control", "canny", "c") == {"cat.jpg", "coffee.jpg"}
    assert complete("convert", "--output", "") == {"notes"}
    assert complete("compare", "n") == {"notes"}


def test_completion_of_zsh_names_the_program(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        main(["--print-completion", "zsh"])
    assert capsys.readouterr().out.startswith("#compdef kosmos-g\n")


def test_completion_without_shtab_names_the_install_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 2
    assert "pip install 'kosmos-g-diffusers[completion]'" in capsys.readouterr().err


# Models and settings ---------------------------------------------------------------------------------------------


def test_model_folder_gives_the_image_of_its_pipeline(folder, capsys):
    shutil.copytree(SPRITES, "copy")
    generate(*PROMPT, "--seed", "1", "--output", "built.png")
    capsys.readouterr()
    generate(*PROMPT, "--seed", "1", "--model", "./copy")
    assert "sprites" not in capsys.readouterr().err
    assert pixels("out.png") == pixels("built.png")
    assert generate("--from", "out.png", "--output", "again.png", steps=None) == 0
    assert pixels("again.png") == pixels("built.png")


def test_model_named_by_a_png_is_not_downloaded(folder, capsys):
    write_png(PIL.Image.new("RGB", (8, 8)), "a.png", GenerationSettings("a hat", model="stranger/model"))
    message = fails(capsys, "generate", "--from", "a.png")
    assert "'stranger/model', which is not here. Pass it with --model" in message


def test_other_versions_are_told(folder, capsys):
    settings = GenerationSettings("a hat", steps=1, versions={"torch": "1.0"})
    write_png(PIL.Image.new("RGB", (8, 8)), "a.png", settings)
    assert main(["generate", "--from", "a.png"]) == 0
    assert "'torch' '1.0'" in capsys.readouterr().err
    assert read_settings("out.png").versions["torch"] == torch.__version__


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws(folder, name):
    assert generate("a hat", "--scheduler", name, "--seed", "1", steps=3) == 0
    assert read_settings("out.png").scheduler == name


def test_unknown_scheduler_is_named():
    with pytest.raises(ValueError, match="no scheduler 'magic'. Known: ddim"):
        make_scheduler("magic", {})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_draws(folder, dtype):
    assert generate(*PROMPT, "--dtype", dtype) == 0
    assert read_settings("out.png").dtype == dtype
    assert len(set(pixels("out.png"))) > 50  # NaN would be black


def test_convert_passes_its_flags_on(monkeypatch, capsys):
    calls = []

    def convert_checkpoint(*args, **kwargs):
        calls.append((args, kwargs))
        return args[1]

    monkeypatch.setattr(conversion, "convert_checkpoint", convert_checkpoint)
    flags = "--checkpoint a.pt --tokenizer b.model --base sd --output ./folder".split()
    assert main(["convert", *flags, "--dtype", "float16", "--seed", "3"]) == 0
    assert main(["convert", *flags]) == 0
    expected = {"tokenizer": "b.model", "base": "sd"}
    assert calls == [
        (("a.pt", "./folder"), {**expected, "dtype": torch.float16, "seed": 3}),
        (("a.pt", "./folder"), {**expected, "dtype": None, "seed": 0}),
    ]
    assert capsys.readouterr().out.split() == ["./folder", "./folder"]


def test_convert_of_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    flags = ["--checkpoint", str(tmp_path / "a.pt"), "--tokenizer", "b", "--base", "c", "--output"]
    assert "a.pt" in fails(capsys, "convert", *flags, str(tmp_path / "folder"))


@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_each_command_has_examples(module, capsys):
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([name, "--help"])
    assert stop.value.code == 0
    assert f"  kosmos-g {name} " in capsys.readouterr().out.partition("examples:")[2]


def test_package_runs_as_a_module():
    command = [sys.executable, "-m", "kosmos_g_diffusers", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("kosmos-g ")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_output_cannot_encode_is_escaped(encoding, monkeypatch, tmp_path):
    """A path in another script, and one whose bytes are not UTF-8."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    path = tmp_path / "画像-\udcff.png"
    monkeypatch.setattr(env, "run", lambda arguments: print(path))
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        assert main(["env"]) == 0
        assert main(["show", str(path)]) == 2
    for stream in streams.values():
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert ("画像" if encoding == "utf-8" else r"\u753b\u50cf") in text and r"\udcff.png" in text
