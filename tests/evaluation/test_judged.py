"""OmniContext and MultiBanana: instructions of several input images, and what their judges read."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from support.evaluating import draw_image, run_evaluate, save_scorers
from support.marks import DRAWN, term_of

from kosmos_g_diffusers.evaluation.benchmarks import multibanana, omnicontext
from kosmos_g_diffusers.evaluation.benchmarks.multi import place_images

PAIR = "Let the cat from the second image sit on the chair in image 1."


@pytest.mark.parametrize(
    ("text", "count", "prompt", "order"),
    [
        (PAIR, 2, "Let the cat from <i> sit on the chair in <i>.", (1, 0)),
        ("Figure #3, image 2 and the 1st picture", 3, "<i>, <i> and <i>", (2, 1, 0)),
        (
            "the man of image 1, in the clothes of image 1",
            1,
            "the man of <i>, in the clothes of image 1",
            (0,),
        ),
        # not every image is mentioned, or one that is not there
        ("the man in image 1 and the dog", 2, "<i> <i> the man in image 1 and the dog", (0, 1)),
        ("the cat of image 3", 1, "<i> the cat of image 3", (0,)),
        ("image 12 of <i>", 1, "<i> image 12 of ＜i＞", (0,)),
    ],
)
def test_input_images_stand_where_an_instruction_mentions_them(text, count, prompt, order):
    assert place_images(text, count) == (prompt, order)


# MultiBanana ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def banana(tmp_path):
    data = tmp_path / "data"
    for number, name in enumerate(
        ["2_back/006_0", "2_back/006_1", "3_local/014_0", "3_local/014_1", "3_local/014_10"]
    ):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(number).save(data / f"{name}.jpg")
    (data / "2_back" / "006_prompt.txt").write_text(PAIR + "\n", encoding="utf-8")
    (data / "3_local" / "014_prompt.txt").write_text("Schreib „Käse“ auf das Schild.", encoding="utf-8")
    (data / "2_back" / "types.json").write_text("{}")
    return data


def test_multibanana_is_read_from_its_folders(banana):
    draw_image(9).save(banana / "3_local" / "014_generated.jpg")  # of an earlier run
    pair, triple = multibanana.build_tasks(banana)
    assert pair.prompt == "Let the cat from <i> sit on the chair in <i>." and pair.row == "2_back"
    assert pair.pictures == ("2_back/006_1.jpg", "2_back/006_0.jpg") and pair.text is None
    assert triple.prompt == "<i> <i> <i> Schreib „Käse“ auf das Schild."
    assert triple.pictures == ("3_local/014_0.jpg", "3_local/014_1.jpg", "3_local/014_10.jpg")
    assert multibanana.build_tasks(banana, ["3_local"]) == (triple,)


def test_what_multibanana_lacks_is_named_at_once(banana, tmp_path):
    (banana / "2_back" / "006_prompt.txt").unlink()
    (banana / "3_local" / "014_prompt.txt").write_text(" \n")
    (banana / "3_local" / "020_prompt.txt").write_text("A hat.")
    with pytest.raises(
        ValueError,
        match=r"lacks 3 files: 2_back/006_prompt.txt, 3_local/014_prompt.txt \(empty\), 3_local/020_0",
    ):
        multibanana.build_tasks(banana)
    with pytest.raises(ValueError, match="has no folders 4_back; it has 2_back, 3_local"):
        multibanana.build_tasks(banana, ["4_back"])
    with pytest.raises(ValueError, match="has no folders"):
        multibanana.build_tasks(tmp_path / "nowhere")


def test_multibanana_is_drawn_scored_and_written_for_its_judges(banana, tmp_path):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")
    scorers, judge = save_scorers(tmp_path)[:2], tmp_path / "judge"
    flags = ["--data", banana, "--device", "cpu", *scorers]
    run_evaluate("multibanana", *flags, "--steps", 1, "--output", tmp_path / "run", "--judge", judge)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["by number of references"]) == {"2", "3"} and set(report["by prompt"]) == {
        "2_back",
        "3_local",
    }
    for name in ("2_back/006_1.jpg", "2_back/006_prompt.txt", "3_local/014_10.jpg"):
        assert (judge / name).read_bytes() == (banana / name).read_bytes()
    assert not (judge / "2_back" / "types.json").exists()
    drawn = PIL.Image.open(judge / "3_local" / "014_generated.jpg")
    own = PIL.Image.open(tmp_path / "run" / "images" / "3_local" / "014.png")
    assert drawn.format == "JPEG" and np.abs(np.subtract(drawn, own, dtype=float)).mean() < 4
    assert term_of(judge / "3_local" / "014_generated.jpg") == DRAWN
    # the data folder itself takes them, too; and what lies there is scored as another model's
    multibanana.export(tmp_path / "run", banana, banana)
    assert sorted(path.name for path in banana.rglob("*_generated*")) == [
        "006_generated.jpg",
        "014_generated.jpg",
    ]
    run_evaluate("multibanana", *flags, "--generated", banana, "--output", tmp_path / "others")
    other = json.loads((tmp_path / "others" / "report.json").read_text())
    assert other["metrics"]["dino"]["mean"] == pytest.approx(report["metrics"]["dino"]["mean"], abs=0.05)


# OmniContext ---------------------------------------------------------------------------------------------------------


def as_png(number):
    file = io.BytesIO()
    draw_image(number).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def context(tmp_path):
    """A data set of its columns, as parquet."""
    datasets = pytest.importorskip("datasets", reason="reading it needs datasets")
    rows = {
        "key": ["0a1b", "0c2d", "0e3f"],
        "task_type": ["multi_object", "single_object", "single_object"],
        "instruction": [PAIR, "A cup on the moon.", "月亮上的杯子"],
        "input_images": [[as_png(0), as_png(1)], [as_png(2)], [as_png(3)]],
        "instruction_language": ["en", "en", "cn"],
    }
    rows["input_images"] = [
        [{"bytes": one, "path": None} for one in images] for images in rows["input_images"]
    ]
    texts = {name: datasets.Value("string") for name in rows if name != "input_images"}
    features = datasets.Features({**texts, "input_images": datasets.Sequence(datasets.Image())})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    return tmp_path / "data"


def test_omnicontext_is_drawn_scored_and_written_for_its_judge(context, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = tmp_path / "results" / "Kosmos-G"
    flags = ["--data", context, "--device", "cpu", *save_scorers(tmp_path)[:2]]
    run_evaluate("omnicontext", *flags, "--steps", 1, "--output", tmp_path / "run", "--judge", results)
    header, *tasks = map(json.loads, (tmp_path / "run" / "manifest.jsonl").read_text().splitlines())
    assert [task["prompt"] for task in tasks] == [
        "Let the cat from <i> sit on the chair in <i>.",
        "<i> A cup on the moon.",
    ]
    assert tasks[0]["pictures"] == ["multi_object/0a1b_1", "multi_object/0a1b_0"]
    assert (tmp_path / "run" / "pictures" / "multi_object" / "0a1b_1").read_bytes() == as_png(1)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["by number of references"]) == {"1", "2"} and "dino_worst_subject" in report["metrics"]
    drawn = sorted(path.relative_to(results).as_posix() for path in results.rglob("*.*"))
    assert drawn == ["fullset/multi_object/0a1b.png", "fullset/single_object/0c2d.png"]
    for name in drawn:
        copy, own = (
            PIL.Image.open(folder / name.removeprefix(cut))
            for folder, cut in ((results, ""), (tmp_path / "run" / "images", "fullset/"))
        )
        assert np.array_equal(copy, own) and "kosmos_g" not in copy.info and term_of(results / name) == DRAWN
    # what a model's folder holds is scored without drawing
    run_evaluate(
        "omnicontext",
        *flags,
        "--generated",
        results,
        "--output",
        tmp_path / "others",
        "--tasks",
        "single_object",
    )
    other = json.loads((tmp_path / "others" / "report.json").read_text())
    assert other["by prompt"]["single_object"]["dino"] == report["by prompt"]["single_object"]["dino"]


def test_damaged_omnicontext_is_explained(context, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="has no English rows of scene; it has multi_object, single_object"):
        omnicontext.read_rows(context, ["scene"])
    rows = [{"key": "k", "task_type": "t", "instruction": "a", "input_images": [{"bytes": b"no image"}]}]
    with pytest.raises(ValueError, match="1 rows of 'x' have images that cannot be read: t/k .*image 0"):
        omnicontext._check_images("x", rows)
    rows = [{"key": "../../k", "task_type": "t", "instruction": "a", "input_images": [b""]}]
    with pytest.raises(ValueError, match="cannot name an image"):
        omnicontext.build_tasks(rows)


def test_other_data_sets_are_named_by_their_columns(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="reading it needs datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"key": ["a"], "text": ["b"]}).save_to_disk(tmp_path / "data")
    with pytest.raises(
        ValueError, match="has no columns task_type, instruction, input_images; it has key, text"
    ):
        omnicontext.read_rows(tmp_path / "data")
