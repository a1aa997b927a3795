"""Images that another model made: found by the names that its scripts give them, scored as drawn ones are."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
from support.evaluating import draw_image, files_of, make_dreambench, run_compare, run_evaluate, save_scorers
from support.marks import DRAWN, term_of

from kosmos_g_diffusers.evaluation import run as evaluation_run
from kosmos_g_diffusers.evaluation.benchmarks import coco, dreambench, dreambench_plus, multi
from kosmos_g_diffusers.evaluation.features import load_extractor
from kosmos_g_diffusers.evaluation.generated import find_generated
from kosmos_g_diffusers.provenance import save_image

pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")

SUBJECTS, PROMPTS = ["can", "cat"], [0, 20]
TEXTS = ["a can in the jungle", "a red can", "a cat in the jungle", "a red cat"]  # in the order of the tasks
FLAGS = ["--subjects", "can,cat", "--prompts", "0,20", "--device", "cpu"]
SAME_SCORE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dreambench(tmp_path_factory.mktemp("dreambench"))


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    def draw(*_):
        raise AssertionError("a model was asked to draw")

    monkeypatch.setattr(evaluation_run, "generate", draw)


@pytest.fixture
def evaluate(data, scorers, tmp_path):
    def evaluate(generated, *arguments, output="run"):
        given = ["--data", data, "--generated", generated, "--output", tmp_path / output, *FLAGS, *scorers]
        run_evaluate("dreambench", *given, *arguments)
        return json.loads((tmp_path / output / "report.json").read_text())

    return evaluate


def write(folder, *names):
    """An image of its own under each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(100 + number).save(folder / name)
    return folder


def find(folder, data, count=None):
    def build(count):
        return dreambench.build_tasks(data, "paper", SUBJECTS, PROMPTS, images_per_prompt=count)

    return find_generated(folder, build, dreambench.LAYOUTS, count)


def patchdpo(text):
    return f"{text.rpartition('cat')[1] or 'can'}/{text}.png"


# Names ---------------------------------------------------------------------------------------------------------------

# the numbers of UNO's list of 750: "can" is the fifth subject, "cat" the seventh, each with 25 prompts
UNO = ["100_0.png", "120_0.png", "150_0.png", "170_0.png"]


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("PatchDPO", [patchdpo(text) for text in TEXTS]),
        ("PatchDPO", [patchdpo(text).replace(" ", "_").replace(".png", ".JPG") for text in TEXTS]),
        ("PatchDPO", [patchdpo(text).replace(".png", "/0.png") for text in TEXTS]),
        ("kosmos-g's runs", ["can/00_0.png", "can/20_0.jpg", "cat/00_0.png", "cat/20_0.webp"]),
        (
            "Kosmos-G's DreamBench script",
            [
                f"{text[-3:] if 'red' in text else text[2:5]}+0{n}+{7 * n}+{text}.png"
                for n, text in zip([1, 1, 4, 4], TEXTS, strict=True)
            ],
        ),
        ("UNO", UNO),
    ],
)
def test_names_of_each_layout_tell_the_prompt(title, names, data, tmp_path):
    write(tmp_path / "made", *names)
    (tmp_path / "made" / "all_score.json").write_text("{}")
    write(tmp_path / "made", ".hidden/can/00_0.png", "__MACOSX/can/a can in the jungle.png")
    tasks, generated = find(tmp_path / "made", data)
    assert generated.layout == title
    assert [task.text for task in tasks] == TEXTS
    assert [generated.files[task.id] for task in tasks] == names


def test_list_of_uno_is_the_table_in_order(data):
    numbers = [
        dreambench.LAYOUTS[-1].name(task, 0) + ".png"
        for task in dreambench.build_tasks(data, "paper", SUBJECTS, PROMPTS, 1)
    ]
    assert numbers == UNO


def test_settings_that_uno_writes_say_the_prompt(data, tmp_path):
    """As for a list of one's own, whose numbers are others."""
    made = write(tmp_path, "0_0.png", "1_0.png", "2_0.png", "100_0.png", "3_0.png")
    paths = {"can": "./dreambooth/dataset/can/01.jpg", "cat": "./dreambooth/dataset/cat/04.jpg"}
    for number, text in zip([3, 2, 1, 0], TEXTS, strict=True):
        settings = {"prompt": text, "image_paths": [paths["cat" if "cat" in text else "can"]], "seed": 3407}
        (made / f"{number}_0.json").write_text(json.dumps(settings))
    (made / "100_0.json").write_text(json.dumps({"prompt": "a hat", "image_paths": []}))
    tasks, generated = find(made, data)
    assert [generated.files[task.id] for task in tasks] == ["3_0.png", "2_0.png", "1_0.png", "0_0.png"]
    assert (
        "1 further images of that folder belong to no prompt of this run, such as 100_0.png."
        in generated.notes
    )


def test_images_of_a_prompt_keep_their_order(data, tmp_path):
    names = [
        f"{text[-3:] if 'red' in text else text[2:5]}+{image}+{n}+{text}.png"
        for text, image in zip(TEXTS, ["01", "01", "04", "04"], strict=True)
        for n in (9, 10, 100)
    ]
    tasks, generated = find(write(tmp_path, *names), data)
    assert [generated.files[task.id] for task in tasks] == names and len(tasks) == 12
    tasks, generated = find(tmp_path, data, count=2)
    assert [generated.files[task.id] for task in tasks] == [name for n, name in enumerate(names) if n % 3 < 2]


def test_images_of_another_input_image_are_not_taken(data, tmp_path):
    with pytest.raises(ValueError, match="none belongs to a prompt"):
        find(write(tmp_path, "can+00+0+a can in the jungle.png"), data)


def test_what_is_missing_is_listed_by_its_name(data, tmp_path):
    made = write(tmp_path, *(patchdpo(text) for text in TEXTS[:2]), "cat/a red cat_1.png")
    with pytest.raises(ValueError) as error:
        find(made, data)
    for part in (
        "5 of 8 images are not in",
        "as of PatchDPO",
        "can/a red can_1, cat/a cat in the jungle, cat/a cat",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has 0 images: none belongs to a prompt. Expected names as can/00_0.png"),
        (
            ["dog/a dog in the jungle.png"],
            r"has 1 images, such as dog/a dog in the jungle.png: none .*100_0.png \(UNO\)",
        ),
        (
            ["can/a red can.png", "can/a red can.jpg"],
            "1 images of .* are there twice, such as can/a red can.jpg and",
        ),
        (["manifest.jsonl/cat.png"], "none belongs"),
    ],
)
def test_folders_that_cannot_be_used_are_explained(names, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        find(write(tmp_path, *names), data)


def test_missing_folders_and_own_runs_are_explained(data, tmp_path):
    with pytest.raises(ValueError, match="There is no folder .*nowhere"):
        find(tmp_path / "nowhere", data)
    (tmp_path / "manifest.jsonl").touch()
    with pytest.raises(ValueError, match="is a run of kosmos-g evaluate.*: pass it to kosmos-g compare"):
        find(tmp_path, data)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_images_that_were_given(evaluate, data, scorers, tmp_path, capsys):
    made = write(tmp_path / "made", *map(patchdpo, TEXTS))
    report = evaluate(made)
    printed = capsys.readouterr()
    assert "| dino |" in printed.out and "small model" not in printed.err
    extractor = load_extractor("clip", scorers[-1].partition("=")[2])
    images = [PIL.Image.open(made / patchdpo(text)) for text in TEXTS]
    given = [PIL.Image.open(data / name) for name in ("can/01.jpg", "can/01.jpg", "cat/04.jpg", "cat/04.jpg")]
    features, others = (extractor.features(group)["clip_i"] for group in (images, given))
    assert report["metrics"]["clip_i"]["mean"] == pytest.approx(
        float((features * others).sum(-1).mean()), abs=SAME_SCORE
    )
    texts = extractor.text_features(TEXTS)
    assert report["metrics"]["clip_t"]["mean"] == pytest.approx(
        float((features * texts).sum(-1).mean()), abs=SAME_SCORE
    )
    assert report["model"]["path"] == str(made) and report["model"]["layout"] == "PatchDPO"
    assert report["settings"] == {} and set(report["conditions"]) == {"versions"}
    assert "pictures encoded" not in report["counts"] and not (tmp_path / "run" / "words").exists()
    text = (tmp_path / "run" / "report.md").read_text()
    assert "made by another model and read from a folder as of PatchDPO" in text and "0.694" in text
    # a repeated command does nothing again
    before = files_of(tmp_path / "run", "images", "scores", "report.json", "manifest.jsonl")
    evaluate(made)
    assert files_of(tmp_path / "run", "images", "scores", "report.json", "manifest.jsonl") == before
    # and other images are another run
    draw_image(7).save(made / patchdpo(TEXTS[0]))
    with pytest.raises(ValueError, match="holds a run of other settings .model.sha256"):
        evaluate(made)


def test_copies_have_the_same_pixels_and_marks(evaluate, tmp_path):
    made = tmp_path / "made"
    (made / "can").mkdir(parents=True)
    (made / "cat").mkdir()
    images = [draw_image(number) for number in range(4)]
    images[0].convert("RGBA").save(made / "can" / "00_0.png")
    save_image(images[1], made / "can" / "20_0.png")
    images[2].save(made / "cat" / "00_0.jpg")
    save_image(images[3], made / "cat" / "20_0.webp")
    evaluate(made)
    copies = [
        tmp_path / "run" / "images" / f"{name}.png"
        for name in ("can/00_0", "can/20_0", "cat/00_0", "cat/20_0")
    ]
    for copy in copies[:2]:
        assert copy.read_bytes() == (made / copy.parent.name / copy.name).read_bytes()
    for copy, name in zip(copies[2:], ("cat/00_0.jpg", "cat/20_0.webp"), strict=True):
        assert PIL.Image.open(copy).format == "PNG"
        assert np.array_equal(PIL.Image.open(copy), PIL.Image.open(made / name).convert("RGB"))
    assert [term_of(copy) for copy in copies] == [None, DRAWN, None, DRAWN]


def test_damaged_images_are_all_named_before_anything_is_written(evaluate, tmp_path):
    made = write(tmp_path / "made", *map(patchdpo, TEXTS))
    for text in TEXTS[1:3]:
        (made / patchdpo(text)).write_bytes(b"no image")
    with pytest.raises(
        ValueError, match="2 images of .* are damaged. can/a red can.png .* cat/a cat in the jungle.png"
    ):
        evaluate(made)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "kosmos-g"], "--model came with --generated"),
        (["--steps", "0", "--guidance", "3"], "--steps and --guidance came with --generated"),
        (["--no-mark", "--repair"], "--repair and --no-mark came"),
        (
            ["--batch-size", "2", "--dtype", "float16", "--scheduler", "dpm"],
            "--scheduler and --dtype and --batch-size came",
        ),
        (["--images-per-prompt", "0"], "0 images per prompt were asked for"),
    ],
)
def test_flags_of_drawing_are_refused(flags, message, evaluate, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(write(tmp_path / "made", *map(patchdpo, TEXTS)), *flags)
    assert not (tmp_path / "run").exists()


def test_runs_of_different_models_are_compared_by_subject(evaluate, tmp_path):
    """One model made an image of each prompt, the other two."""
    first = evaluate(write(tmp_path / "first", *map(patchdpo, TEXTS)), output="a")
    second = evaluate(
        write(
            tmp_path / "second",
            *(f"{task}_{n}.png" for task in ("can/00", "can/20", "cat/00", "cat/20") for n in (0, 1)),
        ),
        output="b",
    )
    run_compare(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "comparison")
    result = json.loads((tmp_path / "comparison" / "compare.json").read_text())
    differences = {
        unit: second["by unit"][unit]["dino"] - first["by unit"][unit]["dino"] for unit in first["by unit"]
    }
    assert result["metrics"]["dino"]["by unit"] == pytest.approx(differences, abs=SAME_SCORE)
    assert result["metrics"]["dino"]["interval"] is not None
    text = (tmp_path / "comparison" / "compare.md").read_text()
    assert (
        "Of each prompt, A has 1 images and B 2" in text and "| layout | PatchDPO | kosmos-g's runs |" in text
    )
    sheet = (tmp_path / "comparison" / "sheets" / "can.html").read_text()
    assert sheet.count("a/images/can/") == 2 and sheet.count("b/images/can/") == 4
    # other prompts are still refused
    shutil.rmtree(tmp_path / "b")
    evaluate(tmp_path / "second", "--prompts", "0", output="b")
    with pytest.raises(
        ValueError, match="2 images of the runs have other prompts|4 images of the runs have other prompts"
    ):
        run_compare(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "other")


def test_dreambench_plus_reads_what_its_scripts_write(tmp_path, scorers):
    data = tmp_path / "data"
    for kind in ("images", "captions"):
        (data / kind / "object").mkdir(parents=True)
    draw_image(1).save(data / "images" / "object" / "07.jpg")
    (data / "captions" / "object" / "07.txt").write_text(
        "Tea pot, old\na photo of a tea pot, old\na tea pot, old, in snow\n"
    )
    collection = "object_07_tea_pot,_old"
    names = [f"samples/tgt_image/{collection}/{n}_0.jpg" for n in (0, 1)]
    made = write(tmp_path / "made", *names, *(name.replace("tgt", "src") for name in names)) / "samples"
    judge = ["--judge", tmp_path / "judge"]
    arguments = ["--data", data, "--output", tmp_path / "run", "--device", "cpu", *scorers]
    run_evaluate("dreambench-plus", "--generated", made, *arguments, *judge)
    manifest = [json.loads(line) for line in (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()]
    assert manifest[0]["model"]["layout"] == "DreamBench++'s scripts" and len(manifest) == 3
    for number, name in enumerate(names):
        copy = PIL.Image.open(tmp_path / "run" / "images" / "object_07_tea_pot-_old" / f"{number}_0.png")
        assert np.array_equal(copy, PIL.Image.open(tmp_path / "made" / name))
    # what the judge is shown is what the other model made
    assert (tmp_path / "judge" / "tgt_image" / collection / "1_0.jpg").is_file()
    build = lambda count: dreambench_plus.build_tasks(data, count)  # noqa: E731
    assert (
        find_generated(made / "tgt_image", build, dreambench_plus.LAYOUTS)[1].layout
        == "DreamBench++'s scripts"
    )
    by_prompt = write(
        tmp_path / "by-prompt",
        f"{collection}/a photo of a tea pot, old.png",
        f"{collection}/a tea pot, old, in snow.png",
    )
    assert find_generated(by_prompt, build, dreambench_plus.LAYOUTS)[1].layout == "PatchDPO"


def test_several_references_are_tabled_by_their_number(data, scorers, tmp_path):
    pair = {"prompt": "a cat and a can in the jungle", "image_paths": ["d/cat/04.jpg", "d/can/01.jpg"]}
    one = {"prompt": "a cat in the jungle", "image_paths": ["d/cat/04.jpg"]}
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([pair, one, {**pair, "prompt": "a cat next to a can"}]))
    made = write(tmp_path / "made", "0_0.png", "1_0.png", "2_0.png")
    arguments = [
        "--data",
        data,
        "--prompts",
        prompts,
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
        *scorers,
    ]
    run_evaluate("multi", "--generated", made, *arguments)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    groups = report["by number of references"]
    assert {number: (group["prompts"], group["images"]) for number, group in groups.items()} == {
        "1": (1, 1),
        "2": (2, 2),
    }
    scores = [
        json.loads(line) for line in (tmp_path / "run" / "scores" / "dino.jsonl").read_text().splitlines()[1:]
    ]
    pairs = [scores[0]["scores"]["dino"], scores[2]["scores"]["dino"]]
    assert groups["2"]["metrics"]["dino"]["mean"] == pytest.approx(sum(pairs) / 2, abs=SAME_SCORE)
    assert groups["1"]["metrics"]["dino"]["mean"] == scores[1]["scores"]["dino"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## By number of references\n\n| input images | prompts | dino |" in text
    assert (
        "dino_worst_subject" not in groups["1"]["metrics"] and "dino_worst_subject" in groups["2"]["metrics"]
    )
    build = lambda count: multi.build_tasks(data, prompts, count)  # noqa: E731
    tasks, own = find_generated(tmp_path / "run" / "images", build, multi.LAYOUTS)
    assert [own.files[task.id] for task in tasks] == ["0000_0.png", "0001_0.png", "0002_0.png"]


def test_coco_reads_numbers_of_captions(tmp_path):
    captions = [{"id": 5 * number, "caption": f"hat {number}"} for number in range(12)]
    tasks = coco.build_tasks(captions, 0)
    names = [f"{number:05}.png" for number in range(12)]
    found, generated = find_generated(
        write(tmp_path, *names, "grid.png"), lambda count: tasks, coco.LAYOUTS, 1
    )
    assert found == tasks and [generated.files[task.id] for task in tasks] == names
    (tmp_path / "00003.png").unlink()
    with pytest.raises(ValueError, match="1 of 12 images are not in .*: 00003. Complete it"):
        find_generated(tmp_path, lambda count: tasks, coco.LAYOUTS, 1)
