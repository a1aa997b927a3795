import json

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from support.evaluating import draw_image, make_dreambench, run_evaluate, save_scorers

from kosmos_g_diffusers.evaluation.benchmarks.multi import build_tasks
from kosmos_g_diffusers.evaluation.features import load_extractor
from kosmos_g_diffusers.evaluation.scoring import FeatureScorer
from kosmos_g_diffusers.processing_kosmos_g import open_image

PAIR = {
    "prompt": "<i> and <i> in the jungle",
    "images": ["cat/04.jpg", "can/01.jpg"],
    "text": "a cat and a can in the jungle",
}


@pytest.fixture
def data(tmp_path):
    return make_dreambench(tmp_path / "data")


@pytest.fixture
def write(data):
    def write(*entries):
        (data / "prompts.json").write_text(json.dumps(entries))

    return write


def test_each_subject_has_references_of_its_own(data, write):
    write(PAIR, {**PAIR, "references": ["cat", ["can/00.jpg", "can/01.jpg"]]})
    tasks = build_tasks(data, images_per_prompt=1)
    assert [task.unit for task in tasks] == ["cat+can", "cat+can"]
    assert tasks[0].references == (("cat/04.jpg",), ("can/01.jpg",))
    assert tasks[1].references == (("cat/00.jpg", "cat/01.jpg", "cat/04.jpg"), ("can/00.jpg", "can/01.jpg"))
    assert tasks[0].text == PAIR["text"] and len(build_tasks(data)) == 8


def test_list_of_uno_is_read_by_class_words(data, write):
    write(
        {
            "prompt": "a cat and a can in the jungle",
            "image_paths": ["./dreambooth/dataset/cat/04.jpg", "x/can/01.jpg"],
        }
    )
    task = build_tasks(data)[0]
    assert (task.prompt, task.text, task.pictures) == tuple(PAIR[key] for key in ("prompt", "text")) + (
        ("cat/04.jpg", "can/01.jpg"),
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**PAIR, "images": ["cat/04.jpg"]}, "2 '<i>' marks"),
        ({"prompt": "<i>"}, r"has \['prompt'\]"),
        ("a cat", "has str"),
        ({**PAIR, "references": ["cat"]}, "an entry for each of 2 images"),
        ({**PAIR, "references": ["cat", "nowhere"]}, "nor a folder with images"),
        ({**PAIR, "images": ["cat/04.jpg", "../can/01.jpg"]}, "leads out of the data folder"),
        ({**PAIR, "text": 3}, "must be strings"),
        ({"prompt": "a cat", "image_paths": ["dog/00.jpg"]}, "does not say 'a dog'"),
        ({"prompt": "a cat", "image_paths": ["fox/00.jpg"]}, "class of 'fox/00.jpg'"),
    ],
)
def test_entries_of_another_form_are_named_by_their_number(data, write, entry, message):
    write(PAIR, entry)
    with pytest.raises(ValueError, match=f"Entry 1 .*{message}"):
        build_tasks(data)


def test_missing_images_are_named_at_once(data, write):
    write({**PAIR, "images": ["cat/09.jpg", "can/09.jpg"]})
    with pytest.raises(ValueError, match="2 images .*can/09.jpg, cat/09.jpg"):
        build_tasks(data)


def test_missing_or_broken_file_of_prompts_is_explained(data):
    with pytest.raises(
        ValueError, match='There is no file .*prompts.json.*Expected a list such as .*"images"'
    ):
        build_tasks(data)
    (data / "prompts.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        build_tasks(data)
    (data / "prompts.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of prompts"):
        build_tasks(data)


def test_scores_are_cosines_with_each_subject_and_with_words(data, write, tmp_path):
    write({**PAIR, "references": ["cat", ["can/01.jpg"]]}, {**PAIR, "text": None})
    task, wordless = build_tasks(data, images_per_prompt=1)
    save_scorers(tmp_path)
    weights = str(tmp_path / "clip")
    scorer, extractor = FeatureScorer("clip", weights, "cpu", data), load_extractor("clip", weights)
    images = [draw_image(5), draw_image(6)]
    scores, without_words = scorer.score([task, wordless], images)
    feature = extractor.features(images)["clip_i"][0]
    expected = []
    for names in task.references:
        others = extractor.features([PIL.Image.open(data / name) for name in names])["clip_i"]
        expected.append(torch.nn.functional.cosine_similarity(feature[None], others).mean().item())
    assert scores["clip_i_subject_1"] == pytest.approx(expected[0], abs=1e-6)
    assert scores["clip_i_subject_2"] == pytest.approx(expected[1], abs=1e-6)
    assert scores["clip_i"] == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert scores["clip_i_worst_subject"] == pytest.approx(min(expected), abs=1e-6)
    (words,) = extractor.text_features([task.text])
    assert scores["clip_t"] == pytest.approx(float(feature @ words), abs=1e-6)
    assert set(scores) - set(without_words) == {"clip_t"}


def test_scorers_ignore_colour_profiles_as_the_papers_scripts_do(data, write, tmp_path):
    write(PAIR)
    (task,) = build_tasks(data, images_per_prompt=1)
    save_scorers(tmp_path)
    image, path, cat = draw_image(5), data / "cat" / "04.jpg", draw_image(6)
    cat.save(path, format="PNG")
    (plain,) = FeatureScorer("clip", str(tmp_path / "clip"), "cpu", data).score([task], [image])
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    at = profile.index(b"rXYZ", 128)
    other = profile.index(b"gXYZ", 128)
    # the entries of two primaries exchanged in the profile's table
    exchanged = bytearray(profile)
    exchanged[at : at + 4], exchanged[other : other + 4] = b"gXYZ", b"rXYZ"
    cat.save(path, format="PNG", icc_profile=bytes(exchanged))
    assert not np.array_equal(open_image(path, "it"), cat)
    (profiled,) = FeatureScorer("clip", str(tmp_path / "clip"), "cpu", data).score([task], [image])
    assert profiled == plain


def test_command_scores_every_subject(data, write, tmp_path):
    pytest.importorskip("accelerate", reason="evaluation needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="evaluation needs the extra `eval`")
    other = {**PAIR, "prompt": "<i> next to <i>", "images": ["can/01.jpg", "backpack/02.jpg"]}
    write(PAIR, other, {key: value for key, value in PAIR.items() if key != "text"})
    arguments = ["--images-per-prompt", 1, "--steps", 1, "--device", "cpu", "--output", tmp_path / "run"]
    run_evaluate("multi", "--data", data, *arguments, *save_scorers(tmp_path))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["by unit"]) == {"cat+can", "can+backpack"}
    expected = {"dino", "dino_subject_1", "dino_subject_2", "dino_worst_subject", "clip_i", "clip_t"}
    assert expected <= set(report["metrics"])
    assert report["counts"]["pictures"] == 3
