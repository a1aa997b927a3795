import base64
import io
import json

import PIL.Image
import pytest
from support.evaluating import draw_image, run_evaluate, save_scorers
from support.marks import DRAWN, term_of

from kosmos_g_diffusers.evaluation.benchmarks.dreambench_plus import (
    INSTRUCTIONS,
    build_tasks,
    export,
    place_image,
)

COLLECTIONS = {
    "animal/00": ("Kitten", "a photo of a kitten", "a kitten sitting on a cloud"),
    "style/03": ("Ukiyo-e", "a fox in the snow", "the sea at night"),
}


@pytest.fixture
def data(tmp_path):
    for number, (name, lines) in enumerate(COLLECTIONS.items()):
        for kind in ("images", "captions"):
            (tmp_path / "data" / kind / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(number, size=60).save(tmp_path / "data" / "images" / f"{name}.jpg")
        (tmp_path / "data" / "captions" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("text", "subject", "prompt"),
    [
        ("a photo of a kitten", "Kitten", "a photo of <i>"),
        ("A kitten sitting on a cloud", "kitten", "<i> sitting on a cloud"),
        ("the white van on an umbrella", "umbrella", "the white van on <i>"),
        ("a banana kitten", "kitten", "a banana <i>"),  # only a word of its own is an article
        ("a fox in the snow", "ukiyo-e", "<i> a fox in the snow"),
        ("a fox", "", "<i> a fox"),
    ],
)
def test_image_takes_the_place_of_the_subject_and_its_article(text, subject, prompt):
    assert place_image(text, subject) == prompt


def test_collections_have_the_names_of_the_benchmark(data):
    tasks = build_tasks(data)
    assert [task.id for task in tasks] == [
        "live_subject_animal_00_kitten/0_0",
        "live_subject_animal_00_kitten/1_0",
        "style_03_ukiyo-e/0_0",
        "style_03_ukiyo-e/1_0",
    ]
    assert tasks[1].text == "a kitten sitting on a cloud" and tasks[1].pictures == ("images/animal/00.jpg",)


def test_what_is_missing_is_named_at_once(data):
    (data / "captions" / "style" / "03.txt").unlink()
    (data / "images" / "animal" / "00.jpg").unlink()
    with pytest.raises(ValueError, match="captions/style/03.txt, images/animal/00.jpg"):
        build_tasks(data)
    with pytest.raises(ValueError, match="lacks images/<category>"):
        build_tasks(data / "nowhere")


def test_caption_files_without_prompts_are_named_at_once(data):
    (data / "captions" / "style" / "03.txt").write_text("Ukiyo-e\n")
    (data / "captions" / "animal" / "00.txt").write_text("")
    with pytest.raises(ValueError, match="2 files have no prompts: .*00.txt, .*03.txt. Expected the subject"):
        build_tasks(data)


def test_run_is_exported_for_the_judge(data, tmp_path):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")
    (tmp_path / "prompts").mkdir()
    for group in INSTRUCTIONS.values():
        for file in group:
            (tmp_path / "prompts" / file).write_text(f"text of {file}\n")
    judge = ["--judge", tmp_path / "judge", "--judge-prompts", tmp_path / "prompts"]
    arguments = ["--data", data, "--steps", 1, "--device", "cpu", "--output", tmp_path / "run"]
    run_evaluate("dreambench-plus", *arguments, *judge, *save_scorers(tmp_path))
    folder = "live_subject_animal_00_kitten"
    assert (tmp_path / "judge" / "text" / folder / "1_0.txt").read_text() == "a kitten sitting on a cloud\n"
    assert PIL.Image.open(tmp_path / "judge" / "src_image" / folder / "1_0.jpg").size == (60, 60)
    assert PIL.Image.open(tmp_path / "judge" / "tgt_image" / folder / "1_0.jpg").size == (64, 64)
    requests = [json.loads(line) for line in (tmp_path / "judge" / "requests.jsonl").read_text().splitlines()]
    assert len(requests) == 8
    by_id = {request["id"]: request["messages"] for request in requests}
    concept, prompt = by_id[f"{folder}/1_0/concept"], by_id[f"{folder}/1_0/prompt"]
    assert [message["role"] for message in concept] == ["user", "assistant", "user"]
    assert concept[0]["content"] == "text of user_prompt_subject_full.txt"
    assert [part["type"] for part in concept[2]["content"]] == ["image_url", "image_url"]
    # the judge's scripts: read the JPEG of Pillow's quality, resize it, encode it again
    expected = io.BytesIO()
    source = PIL.Image.open(data / "images" / "animal" / "00.jpg").convert("RGB")
    source.save(tmp_path / "source.jpg")
    PIL.Image.open(tmp_path / "source.jpg").resize((512, 512)).save(expected, format="JPEG")
    shown = concept[2]["content"][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    assert base64.b64decode(shown) == expected.getvalue()
    assert prompt[2]["content"][0] == {"type": "text", "text": "a kitten sitting on a cloud"}
    assert by_id["style_03_ukiyo-e/0_0/concept"][1]["content"] == "text of gpt_prompt_style_full.txt"
    shown = [part["image_url"]["url"].partition(",")[2] for part in concept[2]["content"]]
    assert [term_of(base64.b64decode(content)) for content in shown] == [None, DRAWN]
    for kind, term in (("src_image", None), ("tgt_image", DRAWN)):
        assert {term_of(path) for path in (tmp_path / "judge" / kind).rglob("*.jpg")} == {term}
    (tmp_path / "prompts" / "user_prompt_text_full.txt").unlink()
    with pytest.raises(ValueError, match="user_prompt_text_full.txt are not there"):
        export(tmp_path / "run", data, tmp_path / "judge", tmp_path / "prompts")
    with pytest.raises(ValueError, match="user_prompt_text_full.txt are not there"):
        run_evaluate("dreambench-plus", *arguments[:-1], tmp_path / "new", *judge)
    assert not (tmp_path / "new").exists()  # the command says so before any work
    (tmp_path / "run" / "images" / folder / "0_0.png").unlink()
    with pytest.raises(ValueError, match="1 images of .* are not made yet"):
        export(tmp_path / "run", data, tmp_path / "judge")
