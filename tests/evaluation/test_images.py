"""DreamBench in miniature, end to end: killed, split over processes, damaged, mixed up."""

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.evaluating import (
    MINIATURE,
    assert_same_files,
    die_at_call,
    draw_image,
    files_of,
    make_dreambench,
    run_evaluate,
    run_in_child,
    save_scorers,
)
from support.marks import DRAWN, mark_of, term_of
from support.without_package import fake_hub

from kosmos_g_diffusers import KosmosGTextEncoder
from kosmos_g_diffusers.cli import build_parser
from kosmos_g_diffusers.evaluation import images as engine
from kosmos_g_diffusers.evaluation import scoring
from kosmos_g_diffusers.evaluation.benchmarks import BENCHMARKS
from kosmos_g_diffusers.evaluation.manifest import Manifest
from kosmos_g_diffusers.generation import generate as generation
from kosmos_g_diffusers.generation.png import read_settings
from kosmos_g_diffusers.sprites.pretrained import SPRITES, with_small_model
from kosmos_g_diffusers.testing import build_tiny_pipeline

accelerate = pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")

REPORT = ("report.json", "report.md", "plots", "sheets")
RESULTS = ("manifest.jsonl", "images", "scores", *REPORT)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dreambench(tmp_path_factory.mktemp("dreambench"))


@pytest.fixture(scope="module", autouse=True)
def toy():
    """A toy in the place of the small model: built, not loaded, as copies of this process load too, next to its threads."""
    load_model = generation.load_model

    def load(model, dtype, *arguments, **keywords):
        return build_tiny_pipeline() if model == SPRITES else load_model(model, dtype, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_model", load)
        yield


@pytest.fixture(scope="module")
def run(data, scorers):
    """Function that runs the command into a folder."""

    def run(folder, *arguments):
        given = () if "--scorer" in arguments else scorers
        run_evaluate("dreambench", "--data", data, "--output", folder, *MINIATURE, *given, *arguments)

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A run that nothing disturbed, and how many images its vision tower saw. Shared: tests copy it."""
    seen = []
    original = KosmosGTextEncoder.get_image_features

    def count(self, pixel_values):
        seen.append(len(pixel_values))
        return original(self, pixel_values)

    def count_nulls(self, input_ids, *arguments):
        nulls.append(int(input_ids.shape == (1, 1)))
        return encode(self, input_ids, *arguments)

    nulls, encode = [], KosmosGTextEncoder.get_condition
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KosmosGTextEncoder, "get_image_features", count)
        patch.setattr(KosmosGTextEncoder, "get_condition", count_nulls)
        run(folder)
    return SimpleNamespace(folder=folder, n_encoded=sum(seen), n_nulls=sum(nulls))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished.folder, tmp_path / "copy")


def test_report_counts_what_was_run_and_says_it(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    expected = {"units": 3, "prompts": 6, "images": 24, "pictures": 3, "pictures encoded": 3}
    assert report["counts"] == expected
    assert set(report["by unit"]) == {"backpack", "can", "cat"}
    assert set(report["by prompt"]) == {"<i> in the jungle", "<i>, red"}
    assert report["settings"]["scheduler"] == "dpm" and report["settings"]["guidance"] == 7.5
    text = (finished.folder / "report.md").read_text()
    for part in ("0.694", "0.847", "0.287", "protocol paper", "this run is of others", "24 images"):
        assert part in text
    assert list(report["metrics"]) == ["dino", "clip_i", "clip_t"]  # as the published tables have them
    sheet = (finished.folder / "sheets" / "cat.html").read_text()
    assert sheet.count("../images/cat/") == 8 and sheet.count("data:image/") == 1
    assert PIL.Image.open(finished.folder / "plots" / "dino.png").width > 100


def test_every_image_is_marked_and_inputs_are_not(finished, copy, run):
    images = sorted((copy / "images").rglob("*.png"))
    assert len(images) == 24 and {term_of(path) for path in images} == {DRAWN}
    sheet = (copy / "sheets" / "cat.html").read_text()
    (shown,) = re.findall("data:image/[a-z]+;base64,([^']+)'", sheet)
    assert mark_of(base64.b64decode(shown)) is None
    pixels = PIL.Image.open(images[0]).tobytes()
    images[0].unlink()
    run(copy, "--no-mark")
    assert PIL.Image.open(images[0]).tobytes() == pixels
    assert [term_of(path) for path in images[:2]] == [None, DRAWN]


def test_each_subject_is_encoded_once(finished):
    assert finished.n_encoded == 3 and finished.n_nulls == 1


def test_every_image_carries_what_makes_it_alone(finished):
    path = finished.folder / "images" / "can" / "20_3.png"
    settings = read_settings(path)
    assert (settings.prompt, settings.steps, settings.guidance, settings.scheduler) == (
        "<i>, red",
        2,
        7.5,
        "dpm",
    )
    pipe = engine.load_pipeline(with_small_model(settings))
    pipe.set_progress_bar_config(disable=True)
    again = pipe(
        settings.prompt,
        images=[settings.images[0].path],
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(settings.seed),
    ).images[0]
    # alone and with the image itself, instead of in a batch and with a word: the same to rounding
    difference = PIL.ImageChops.difference(again, PIL.Image.open(path))
    assert max(high for _, high in difference.getextrema()) <= 2


def test_seeds_belong_to_subject_prompt_and_index(finished):
    seeds = {path: read_settings(path).seed for path in (finished.folder / "images").rglob("*.png")}
    assert len(set(seeds.values())) == 24


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a copy of this process is killed")
def test_run_that_is_killed_twice_gives_the_identical_report(run, finished, tmp_path):
    folder = tmp_path / "killed"

    def generate_and_die():
        die_at_call(engine, "write_png", 6)  # in the middle of a batch
        run(folder)

    def score_and_die():
        die_at_call(scoring, "write_records", 2)
        run(folder)

    assert run_in_child(generate_and_die) == -9
    assert len(list((folder / "images").rglob("*.png"))) == 5
    assert run_in_child(score_and_die) == -9
    assert len(list((folder / "images").rglob("*.png"))) == 24 and not (folder / "report.json").exists()
    run(folder)
    assert_same_files(files_of(folder, *RESULTS), files_of(finished.folder, *RESULTS))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="accelerate starts copies of this process")
def test_two_processes_give_the_identical_report(run, finished, tmp_path):
    accelerate.PartialState._reset_state()
    folder = tmp_path / "two"
    try:
        accelerate.debug_launcher(run, (folder,), num_processes=2)
    finally:
        accelerate.PartialState._reset_state()
    assert_same_files(files_of(folder, *RESULTS), files_of(finished.folder, *RESULTS))


def test_batch_size_changes_images_by_rounding_at_most(run, finished, tmp_path):
    run(tmp_path / "run", "--batch-size", "3")
    for path in (finished.folder / "images").rglob("*.png"):
        other = tmp_path / "run" / path.relative_to(finished.folder)
        difference = PIL.ImageChops.difference(PIL.Image.open(path), PIL.Image.open(other))
        assert max(high for _, high in difference.getextrema()) <= 2


def test_finished_run_makes_nothing_again(run, copy, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("was called")

    monkeypatch.setattr(engine, "load_pipeline", forbidden)
    monkeypatch.setattr(scoring.FeatureScorer, "load", forbidden)
    before = files_of(copy, *RESULTS)
    run(copy)
    assert files_of(copy, *RESULTS) == before


def test_run_of_other_settings_is_refused_and_left_alone(run, copy):
    before = files_of(copy, *RESULTS)
    for arguments, named in (
        (["--steps", "3"], "settings.steps: 2 there, 3 now"),
        (["--seed", "1"], "settings.seed: 0 there, 1 now"),
        (["--protocol", "standard"], "options.protocol: 'paper' there, 'standard' now"),
        (["--images-per-prompt", "2"], "number of images: 24 there, 12 now"),
        (["--prompts", "0,21"], "24 images differ, such as backpack/20_0, which is only there"),
        (["--protocol", "standard", "--subjects", "can"], "which is only there"),
    ):
        with pytest.raises(ValueError, match="never mixed") as error:
            run(copy, *arguments)
        assert named in str(error.value)
    assert files_of(copy, *RESULTS) == before


def test_batch_size_and_versions_are_kept_while_images_are_made(run, copy):
    run(copy, "--batch-size", "2")  # all images are there
    (copy / "images" / "can" / "00_0.png").unlink()
    with pytest.raises(ValueError, match="conditions.batch_size: 4 there, 2 now"):
        run(copy, "--batch-size", "2")


def test_image_that_has_changed_is_another_run(data, copy, scorers, tmp_path):
    changed = shutil.copytree(data, tmp_path / "changed")
    draw_image(99).save(changed / "can" / "01.jpg")
    with pytest.raises(ValueError, match="pictures.can/01.jpg"):
        run_evaluate("dreambench", "--data", changed, "--output", copy, *MINIATURE, *scorers)


def test_image_that_is_not_finite_ends_the_run_and_is_not_written(run, tmp_path, monkeypatch):
    def forward(self, sample, *args, **kwargs):
        return (torch.full_like(sample, torch.nan),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with pytest.raises(ValueError, match="The image of seed .* NaN or infinite"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("images/**/*.png"))


def test_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "letter.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a results folder"):
        run(tmp_path)


def test_damaged_images_are_named_and_made_again_with_repair(run, copy, finished):
    broken = copy / "images" / "cat" / "00_1.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    flipped = copy / "images" / "can" / "20_0.png"
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(ValueError, match="2 images cannot be read") as error:
        run(copy)
    assert (
        str(broken) in str(error.value)
        and str(flipped) in str(error.value)
        and "--repair" in str(error.value)
    )
    # what a kill in the middle of a write leaves, by a process of the same number
    broken.with_name(f".{broken.name}.{os.getpid()}.part").write_bytes(b"half")
    run(copy, "--repair")
    assert_same_files(files_of(copy, *RESULTS), files_of(finished.folder, *RESULTS))


def test_image_of_other_settings_is_named_and_kept(run, copy):
    shutil.copyfile(copy / "images" / "cat" / "00_1.png", copy / "images" / "cat" / "00_2.png")
    with pytest.raises(ValueError, match="1 images were made with other settings.*00_2.png"):
        run(copy, "--repair")
    assert (copy / "images" / "cat" / "00_2.png").exists()


def test_further_scorer_joins_the_report(run, copy, scorers, finished):
    (copy / "scores" / "dino.jsonl").unlink()
    run(copy, *scorers[2:])
    assert set(json.loads((copy / "report.json").read_text())["metrics"]) == {"clip_i", "clip_t"}
    run(copy, *scorers[:2])
    assert_same_files(files_of(copy, *RESULTS), files_of(finished.folder, *RESULTS))


def test_scores_of_other_weights_are_not_mixed(run, copy, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="dino.jsonl was made by.*never mixed"):
        run(copy, "--scorer", f"dino={tmp_path / 'weights'}")


def test_model_is_told_by_its_weights_and_not_by_its_place(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another card")
    one, copy = (engine.identify_model(tmp_path / name) for name in ("one", "copy"))
    assert one["sha256"] == copy["sha256"] and one["path"] != copy["path"]
    build_tiny_pipeline(seed=1).unet.save_pretrained(tmp_path / "copy" / "unet")
    assert engine.identify_model(tmp_path / "copy")["sha256"] != one["sha256"]
    with fake_hub(tmp_path / "one", tmp_path / "cache" / "0123abcd"):
        assert engine.identify_model("someone/kosmos-g") == {
            "path": "someone/kosmos-g",
            "revision": "0123abcd",
        }


def test_images_of_other_references_are_told_by_what_differs(finished):
    manifest = Manifest.read(finished.folder)
    task = replace(manifest.tasks[0], references=(("can/00.jpg", "can/01.jpg"),))
    with pytest.raises(ValueError, match="1 images differ, such as backpack/00_0, which has the references"):
        manifest.check_same(replace(manifest, tasks=(task, *manifest.tasks[1:])), 0)


def test_all_damaged_images_are_named_before_anything_is_written(data, scorers, tmp_path):
    damaged = shutil.copytree(data, tmp_path / "damaged")
    for name in ("can/00.jpg", "cat/00.jpg"):
        (damaged / name).write_bytes(b"no picture")
    arguments = ["--data", damaged, "--output", tmp_path / "run", *MINIATURE, *scorers]
    with pytest.raises(ValueError, match="2 images of .* are damaged.*can/00.jpg.*cat/00.jpg"):
        run_evaluate("dreambench", "--protocol", "standard", *arguments)
    assert not (tmp_path / "run").exists()


def test_model_that_is_none_is_explained_before_anything_is_written(run, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(generation.KosmosGPipeline, "download", refuse)
    with pytest.raises(OSError, match="'someone/nothing' is not a folder and cannot be fetched.*no network"):
        run(tmp_path / "run", "--model", "someone/nothing")
    with pytest.raises(ValueError, match="holds no model: it has no model_index.json"):
        run(tmp_path / "run", "--model", tmp_path)
    assert not (tmp_path / "run").exists()


def test_scorer_that_cannot_be_fetched_leaves_no_folder_behind(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="--scorer dino=FOLDER.*--scorer efficientnet"):
        run(tmp_path / "run", "--scorer", f"dino={tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists()


def test_lists_may_have_spaces_and_must_be_numbers(run, finished, tmp_path, capsys):
    run(tmp_path / "run", "--subjects", "backpack, can ,cat", "--prompts", "0, 20")
    assert_same_files(files_of(tmp_path / "run", *RESULTS), files_of(finished.folder, *RESULTS))
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--prompts", "a,b")
    assert "'a,b' is not a list of numbers; expected some such as 0,20" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_help_of_every_benchmark_has_an_example_that_parses(benchmark, capsys):
    with pytest.raises(SystemExit):
        run_evaluate(benchmark, "--help")
    shown = capsys.readouterr().out
    assert BENCHMARKS[benchmark].DESCRIPTION.strip() in shown and "is resumed when you repeat it" in shown
    lines = BENCHMARKS[benchmark].EXAMPLES.replace("\\\n", " ").splitlines()
    commands = [line.split()[1:] for line in lines if line.strip().startswith("kosmos-g")]
    assert commands
    for command in commands:
        assert build_parser().parse_args(command).benchmark == benchmark


def test_mistakes_are_explained_before_anything_is_written(run, tmp_path):
    for arguments, message in (
        (["--device", "xpu:7"], "The device 'xpu:7' is not there"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--steps", "0"], "steps is 0"),
        (["--batch-size", "0"], "batch size is 0"),
        (["--scorer", "lpips"], "no scorer 'lpips'. There are dino, clip, efficientnet"),
        (["--scorer", "dino", "--scorer", "dino=x"], "'dino' was given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", *arguments)
        assert not (tmp_path / "run").exists()


def test_damaged_words_and_scores_are_named(run, copy, tmp_path):
    (word,) = list((copy / "words").glob("*"))[:1]
    word.write_bytes(b"half")
    (copy / "images" / "can" / "00_0.png").unlink()
    with pytest.raises(ValueError, match=f"Delete {word}, and it is made again"):
        run(copy)
    (copy / "scores" / "dino.jsonl").write_text("half")
    word.unlink()
    with pytest.raises(ValueError, match="dino.jsonl is damaged.*Delete it"):
        run(copy)
