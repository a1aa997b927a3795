"""Images become compositions: end to end with real classes, hostile folders, kills and resumes, several processes."""

import argparse
import io
import json
import os
import random
import signal
import struct
import sys
import zlib
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import pytest
from support.making_models import save_models

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.commands import data as data_command
from kosmos_g_diffusers.data import BadSample, ShardSource, ShardWriter
from kosmos_g_diffusers.data.making import ComposeSettings, compose
from kosmos_g_diffusers.data.making import compose as compose_function
from kosmos_g_diffusers.data.making.compose import Composition
from kosmos_g_diffusers.data.making.entities import EntityFinder
from kosmos_g_diffusers.data.making.inputs import find_images
from kosmos_g_diffusers.data.making.output_folder import OutputFolder
from kosmos_g_diffusers.data.shard_files import index_tar

compose_module = sys.modules[compose_function.__module__]

SMALL = {"size": 32, "min_side": 16, "min_area": 0.001}


def save_image(path, seed=0, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def images(tmp_path):
    """Ten images in several folders and formats."""
    for number in range(10):
        ending = ("jpg", "png", "webp", "PNG")[number % 4]
        folder = tmp_path / "images" / ("", "sub", "sub/deep er")[number % 3]
        save_image(folder / f"image {number}.{ending}", number, (40 + number, 48))
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, data_command))))


class StubComposer:
    """Stands for the three models: what becomes of an image follows from its first pixel."""

    batches = 0

    def __init__(self, settings, **where):
        pass

    def __call__(self, images):
        StubComposer.batches += 1
        return [self._compose(image) for image in images]

    @staticmethod
    def _compose(image):
        shade = image.getpixel((0, 0))[0]
        if shade % 4 == 0:
            return BadSample("entities", "nothing in it")
        return Composition("a dog on a sofa", image, [("dog", image, image)], [0.5])


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(compose_module, "Composer", StubComposer)


def keys_of(folder):
    return sorted(sample.key for shard in sorted(folder.glob("*.tar")) for sample in index_tar(shard))


def skipped_of(folder):
    lines = [
        line for path in sorted(folder.glob("*.skipped.jsonl")) for line in path.read_bytes().splitlines()
    ]
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]


def run_quietly(images, output, **options):
    return compose(images, output, ComposeSettings(**SMALL), **{"workers": 0, "sheet_samples": 0, **options})


# The real classes ------------------------------------------------------------------------------------------------


def test_training_reads_back_what_real_models_made_of_images(models, images, tmp_path, monkeypatch, capsys):
    # at random size the language model only babbles: its answer is the first two words that are in the caption
    monkeypatch.setattr(
        EntityFinder,
        "answers",
        lambda self, captions: [", ".join(caption.split()[:2]) for caption in captions],
    )
    output = tmp_path / "out"
    flags = {**{f"--{name.replace('_', '-')}": folder for name, folder in models.items()}, "--batch-size": 3}
    flags |= {f"--{name.replace('_', '-')}": value for name, value in SMALL.items()}
    flags |= {
        "--images": images,
        "--output": output,
        "--samples-per-shard": 4,
        "--workers": 1,
        "--device": "cpu",
    }

    assert cli.main(["data", "compose", *(str(part) for flag in flags.items() for part in flag)]) == 0

    source = ShardSource(output, word_dropout=0)
    assert 1 < len(source) <= 10
    rng = random.Random(0)
    for index in range(len(source)):
        sample = source.read(index, rng)
        assert sample.target.size == (32, 32)
        shown = [part for part in sample.prompt if not isinstance(part, str)]
        words = "".join(part for part in sample.prompt if isinstance(part, str))
        assert shown
        assert words.replace(" ", "") == sample.caption.replace(" ", "")
        assert all(max(image.size) <= 32 and image.width == image.height for image in shown)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["samples"] == len(source)
    assert manifest["settings"]["model_caption"] == models["model_caption"]
    assert manifest["samples"] + sum(manifest["skipped"].values()) == 10
    assert (output / "contact-sheet.html").read_text().count("<article>") == len(source)
    assert f"{len(source)} samples in" in capsys.readouterr().out


def test_language_model_itself_runs_through_without_a_stub(models, images, tmp_path):
    settings = ComposeSettings(**models, **SMALL, entity_tokens=20)

    try:
        manifest = compose(images, tmp_path / "out", settings, batch_size=5, workers=0)
        counted = manifest["samples"] + sum(manifest["skipped"].values())
    except ValueError as error:  # babble that names nothing in any caption
        assert "Nothing could be made of any input. 10 inputs were skipped" in str(error)
        counted = len(skipped_of(tmp_path / "out"))
    assert counted == 10


# What the folder of images may hold ------------------------------------------------------------------------------


def test_unreadable_images_are_counted_by_cause_and_the_rest_is_made(stub, images, tmp_path):
    (images / "text.jpg").write_text("no image")
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes((images / "sub" / "image 1.png").read_bytes()[:500])
    (images / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (images / "bomb.png").write_bytes(png_that_claims(100_000, 100_000))
    (images / "folder.jpg").mkdir()
    (images / "folder.jpg" / "notes.txt").touch()
    os.mkfifo(images / "pipe.png")
    (images / "nowhere.png").symlink_to(images / "not there")
    save_image(images / "small.png", size=(8, 100))
    (images / "README.md").touch()

    manifest = run_quietly(images, tmp_path / "out", workers=1, batch_size=4)

    assert manifest["skipped"]["image"] == 7
    assert manifest["skipped"]["small"] == 1
    assert manifest["samples"] + manifest["skipped"].get("entities", 0) == 10
    messages = {line["source"]: line["message"] for line in skipped_of(tmp_path / "out")}
    assert "8 x 100, less than 16 pixels" in messages["small.png"]
    assert "not a regular file" in messages["pipe.png"]
    assert "image: 7, such as" in manifest["summary"]
    assert manifest["summary"].count(";") <= 6  # a few examples, not all


def test_names_of_any_bytes_become_plain_keys_that_differ(stub, tmp_path):
    names = [
        b"caf\xe9.png",
        b"caf\xff.png",
        "naïve 図.png".encode(),
        b"<script>alert(1)<.png",
        b"a\nb.png",
        b"a..png",
        b"-.png",
    ]
    for number, name in enumerate(names):
        save_image(tmp_path / "images" / "plain.png", 4 * number + 1)
        os.rename(tmp_path / "images" / "plain.png", os.path.join(os.fsencode(tmp_path / "images"), name))

    manifest = run_quietly(tmp_path / "images", tmp_path / "out", workers=1, sheet_samples=10)

    keys = keys_of(tmp_path / "out") + [line["key"] for line in skipped_of(tmp_path / "out")]
    assert len(set(keys)) == len(names)
    assert all(
        set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for key in keys
    )
    assert "<script>" not in (tmp_path / "out" / "contact-sheet.html").read_text()
    json.dumps(manifest).encode()


def test_images_of_one_name_in_several_folders_are_several_samples(tmp_path):
    for folder in ("a", "b", "a/c"):
        save_image(tmp_path / folder / "same.jpg")

    keys = [item.key for item in find_images(tmp_path)]

    assert len(set(keys)) == 3
    assert all(key.startswith("same-") for key in keys)


def test_image_is_cut_to_its_centre_and_shrunk(tmp_path):
    wide = np.zeros((1100, 1300, 3), np.uint8)
    wide[:, 100:1200] = 200
    tall = wide.transpose(1, 0, 2)
    for name, pixels in (("wide", wide), ("tall", tall)):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    images = compose_module.SquareImages(tmp_path, find_images(tmp_path), min_side=16)

    for item, image in (images[0], images[1]):
        assert item.name in ("wide.png", "tall.png")
        assert image.size == (1024, 1024)
        assert (np.asarray(image) == 200).all()


def test_output_within_the_images_is_not_read_as_images(stub, images):
    output = images / "out"
    run_quietly(images, output)
    save_image(output / "stray.png")

    assert not any("stray" in item.name for item in find_images(images, leave_out=output))


def test_no_folder_and_no_images_are_errors(tmp_path, capsys):
    with pytest.raises(ValueError, match="There is no folder .*missing"):
        run_quietly(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"There is no image in .*texts \(1 other files\)"):
        run_quietly(tmp_path / "texts", tmp_path / "out")
    assert cli.main(["data", "compose", "--images", str(tmp_path / "missing"), "--output", "out"]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_nothing_made_of_any_image_is_an_error_that_says_why(stub, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.jpg").write_text("no image")

    with pytest.raises(
        ValueError,
        match="Nothing could be made of any input. 1 inputs were skipped. image: 1, such as text.jpg",
    ):
        run_quietly(tmp_path / "images", tmp_path / "out")


# Continuing ------------------------------------------------------------------------------------------------------


def test_finished_run_does_nothing_again_and_new_images_are_added(stub, images, tmp_path):
    output = tmp_path / "out"
    run_quietly(images, output, batch_size=3)
    before, StubComposer.batches = {path: path.read_bytes() for path in output.glob("*.tar")}, 0

    run_quietly(images, output)
    assert StubComposer.batches == 0
    assert {path: path.read_bytes() for path in output.glob("*.tar")} == before

    save_image(images / "new.png", 101)
    keys = keys_of(output) + [line["key"] for line in skipped_of(output)]
    run_quietly(images, output)
    new = set(keys_of(output) + [line["key"] for line in skipped_of(output)]) - set(keys)
    assert [key.startswith("new-") for key in new] == [True]
    assert {path: path.read_bytes() for path in before} == before


def test_killed_at_any_moment_and_started_again_it_makes_the_same(stub, tmp_path):
    images = tmp_path / "images"
    for number in range(16):
        save_image(images / f"{number}.png", number)
    (images / "broken.png").write_text("broken")
    run_quietly(images, tmp_path / "whole", samples_per_shard=4, batch_size=3)
    expected, expected_skips = keys_of(tmp_path / "whole"), skipped_of(tmp_path / "whole")
    assert expected_skips
    rng, kills = random.Random(0), 0
    for trial in range(5):
        output = tmp_path / f"killed-{trial}"
        while run_and_kill(images, output, moment=rng.randrange(1, 30)):
            kills += 1
            assert len(set(keys_of(output))) == len(keys_of(output))

        assert keys_of(output) == expected
        assert sorted(line["key"] for line in skipped_of(output)) == sorted(
            line["key"] for line in expected_skips
        )
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["samples"] == len(expected)
        assert sum(manifest["skipped"].values()) == len(expected_skips)
        assert not list(output.glob("*.part*.tar.*"))
    assert kills > 10


def run_and_kill(images, output, moment):
    """Run in a process that kills itself when so many things have happened; whether it came to that."""
    child = os.fork()
    if child == 0:
        moments = iter(range(moment))

        def ticking(function):
            def tick(*args, **options):
                if next(moments, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **options)
                if next(moments, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return tick

        try:
            os.replace = ticking(os.replace)
            ShardWriter._add = ticking(ShardWriter._add)
            OutputFolder.skip = ticking(OutputFolder.skip)
            run_quietly(images, output, samples_per_shard=4, batch_size=3)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_line_cut_off_by_a_kill_costs_that_line_alone(stub, images, tmp_path):
    output = tmp_path / "out"
    for name in ("b1.png", "b2.png"):
        (images / name).write_text("broken")
    run_quietly(images, output)
    path = output / "part-000.skipped.jsonl"
    before = skipped_of(output)
    path.write_bytes(path.read_bytes()[:-20])  # within the last line

    run_quietly(images, output)

    assert sorted(line["key"] for line in skipped_of(output)) == sorted(line["key"] for line in before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory"), SystemExit(143)])
def test_stopped_run_keeps_the_samples_that_wait_for_their_shard(stub, images, tmp_path, monkeypatch, error):
    calls = []

    class Failing(StubComposer):
        def __call__(self, images):
            calls.append(images)
            if len(calls) == 3:
                raise error
            return super().__call__(images)

    monkeypatch.setattr(compose_module, "Composer", Failing)
    with pytest.raises(type(error) if not isinstance(error, type) else error):
        run_quietly(images, tmp_path / "out", batch_size=2)

    assert len(keys_of(tmp_path / "out")) + len(skipped_of(tmp_path / "out")) == 4


def test_sigterm_is_an_orderly_end():
    with pytest.raises(SystemExit) as end, data_command._sigterm_stops():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_full_disk_keeps_what_was_written_and_the_next_run_continues(stub, images, tmp_path, monkeypatch):
    output = tmp_path / "out"
    replace = os.replace

    def full(source, target):
        if str(target).endswith("000001.tar"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run_quietly(images, output, samples_per_shard=2, batch_size=2)
    assert len(keys_of(output)) == 2
    assert not list(output.glob("*.part"))

    run_quietly(images, output, samples_per_shard=2)
    run_quietly(images, tmp_path / "whole")
    assert sorted(keys_of(output)) == sorted(keys_of(tmp_path / "whole"))


# Several processes -----------------------------------------------------------------------------------------------


def test_processes_make_together_what_one_makes(stub, images, tmp_path):
    run_quietly(images, tmp_path / "one")
    for index in (2, 0, 1):
        manifest = run_quietly(images, tmp_path / "three", process_index=index, num_processes=3)

    assert keys_of(tmp_path / "three") == keys_of(tmp_path / "one")
    assert manifest["samples"] == len(keys_of(tmp_path / "one"))
    assert {path.name[:8] for path in (tmp_path / "three").glob("*.tar")} <= {
        "part-000",
        "part-001",
        "part-002",
    }
    assert len(ShardSource(tmp_path / "three")) == manifest["samples"]


def test_number_of_processes_may_change(stub, images, tmp_path):
    run_quietly(images, tmp_path / "one")
    run_quietly(images, tmp_path / "changed", process_index=1, num_processes=4)
    run_quietly(images, tmp_path / "changed", process_index=0, num_processes=2)
    run_quietly(images, tmp_path / "changed", process_index=1, num_processes=2)

    assert keys_of(tmp_path / "changed") == keys_of(tmp_path / "one")


def test_share_of_a_launcher_is_read_from_its_environment(monkeypatch):
    arguments = data_command_arguments()
    assert data_command._share(arguments) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert data_command._share(arguments) == (3, 8)
    assert data_command._share(data_command_arguments("--process-index", "1", "--num-processes", "2")) == (
        1,
        2,
    )
    with pytest.raises(ValueError, match="Pass both"):
        data_command._share(data_command_arguments("--process-index", "1"))


def data_command_arguments(*flags):
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    return parser.parse_args(["compose", "--images", "images", "--output", "out", *flags])


def test_process_that_is_the_first_to_end_with_nothing_made_is_no_error(stub, tmp_path):
    save_image(tmp_path / "images" / "one.png", 1)
    (item,) = find_images(tmp_path / "images")
    owner = zlib.crc32(item.key.encode()) % 2

    first = run_quietly(tmp_path / "images", tmp_path / "out", process_index=1 - owner, num_processes=2)
    last = run_quietly(tmp_path / "images", tmp_path / "out", process_index=owner, num_processes=2)

    assert "samples" not in first
    assert last["samples"] == 1


@pytest.mark.parametrize("share", [(-1, 2), (2, 2), (0, 0)])
def test_share_out_of_range_is_an_error(stub, images, tmp_path, share):
    with pytest.raises(ValueError, match="Expected an index from 0"):
        run_quietly(images, tmp_path / "out", process_index=share[0], num_processes=share[1])


def test_two_processes_of_one_share_are_an_error(stub, images, tmp_path):
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".part-000.lock"):
        with pytest.raises(ValueError, match="Another process is writing part-000"):
            run_quietly(images, tmp_path / "out")
    run_quietly(images, tmp_path / "out")


# The folder ------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_and_named(stub, images, tmp_path):
    run_quietly(images, tmp_path / "out")

    with pytest.raises(
        ValueError, match="other settings: threshold 0.3 there, 0.5 now. Pass the same to continue"
    ):
        compose(images, tmp_path / "out", ComposeSettings(**SMALL, threshold=0.5), workers=0)
    images.rename(images.with_name("other"))
    with pytest.raises(ValueError, match="images 'images' there, 'other' now"):
        run_quietly(images.with_name("other"), tmp_path / "out")


def test_moved_folder_of_images_continues(stub, images, tmp_path):
    run_quietly(images, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    images.rename(tmp_path / "elsewhere" / "images")
    StubComposer.batches = 0

    run_quietly(tmp_path / "elsewhere" / "images", tmp_path / "out")

    assert StubComposer.batches == 0
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "holds shards but no manifest.json"),
        ('{"format": 99}', "is not a manifest of format 1"),
        ("[]", "is not a manifest of format 1"),
        ("{", "is not JSON"),
        (
            '{"format": 1, "command": "instructpix2pix", "settings": {}}',
            "was made by 'instructpix2pix', not 'compose'",
        ),
    ],
)
def test_folder_of_something_else_is_refused(stub, images, tmp_path, manifest, message):
    with ShardWriter(tmp_path / "out") as writer:
        writer.write_caption("a", "a dog")
    if manifest is not None:
        (tmp_path / "out" / "manifest.json").write_text(manifest)

    with pytest.raises(ValueError, match=message):
        run_quietly(images, tmp_path / "out")


def test_damaged_shard_is_named_and_made_again_once_deleted(stub, images, tmp_path):
    output = tmp_path / "out"
    run_quietly(images, output, samples_per_shard=3)
    keys, shard = keys_of(output), output / "part-000-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])

    with pytest.raises(ValueError, match=r"part-000-000000.tar is damaged: .* Delete it"):
        run_quietly(images, output)
    shard.unlink()
    run_quietly(images, output)

    assert keys_of(output) == keys


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 1.5), ("min_area", -1), ("max_entities", 0), ("size", 4), ("entity_tokens", 0)],
)
def test_setting_out_of_range_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected a number from"):
        ComposeSettings(**{name: value})


def png_that_claims(width, height):
    """A PNG of a few bytes whose header names so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    buffer = io.BytesIO(b"")
    buffer.write(b"\x89PNG\r\n\x1a\n")
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        buffer.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return buffer.getvalue()


def test_import_needs_no_model_and_no_cv2():
    # the commands are imported by every kosmos-g call
    source = Path(compose_module.__file__).with_name("cutouts.py").read_text()
    assert "\nimport cv2" not in source
