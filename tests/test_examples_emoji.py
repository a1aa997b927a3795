"""examples/emoji on made-up subjects: what is chosen, what is said of it, and every phase of the training for a step."""

import importlib
import io
import json
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
MODULES = ("packages", "views", "source", "models", "train", "evaluate")
COLOURS = {"red": (200, 30, 40), "blue": (40, 90, 200), "green": (60, 160, 60), "purple": (120, 70, 180)}


@pytest.fixture
def emoji(monkeypatch):
    """The modules of the example, as attributes."""
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(ROOT)  # as with `python -m examples.emoji.train`
    return SimpleNamespace(**{name: importlib.import_module(f"examples.emoji.{name}") for name in MODULES})


def paint(colour, box, second=None):
    image = Image.new("RGBA", (96, 96))
    pen = ImageDraw.Draw(image)
    pen.rectangle(box, fill=(*COLOURS[colour], 255))
    if second:
        left, top, right, bottom = box
        pen.rectangle((left, (top + bottom) // 2, right, bottom), fill=second)
    return image


@pytest.fixture
def subjects(emoji):
    Subject = emoji.packages.Subject
    return [
        Subject("pole", "object", paint("red", (40, 4, 56, 92))),
        Subject("plank", "object", paint("blue", (4, 36, 92, 60))),
        Subject("block", "toy", paint("green", (20, 20, 76, 76), (240, 240, 245, 255))),
        Subject("corner", "place", paint("purple", (4, 4, 40, 40))),
    ]


def write_tarball(path, contents):
    with tarfile.open(path, "w:gz") as tarball:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tarball.addfile(member, io.BytesIO(content))
    return path


def test_subjects_are_object_like_emoji_that_have_a_name_and_an_image(emoji, tmp_path):
    file = io.BytesIO()
    paint("red", (8, 8, 88, 88)).save(file, format="WEBP", lossless=True)
    codes = ("2615", "1f34e", "1f550", "1f600", "270f-fe0f")
    images = write_tarball(
        tmp_path / "images.tgz", {f"package/assets/{code}.webp": file.getvalue() for code in codes}
    )
    chars = {
        "2615": "hot-beverage",
        "1f34e": "red-apple",
        "1f550": "one-oclock",
        "1f600": "grinning-face",
        "270f": "pencil",
        "1f9ff": "nazar-amulet",
    }
    categories = {
        "Smileys & Emotion": ["grinning-face"],
        "Objects": ["pencil", "nazar-amulet"],
        "Food & Drink": ["red-apple", "hot-beverage"],
        "Travel & Places": ["one-oclock"],
    }
    metadata = {"categories": categories}
    contents = {"chars": chars, "metadata": metadata}
    names = write_tarball(
        tmp_path / "names.tgz",
        {f"package/{name}.json": json.dumps(value).encode() for name, value in contents.items()},
    )
    found = emoji.packages.read_subjects(images, names)
    assert [(subject.name, subject.kind) for subject in found] == [
        ("apple", "food"),
        ("hot beverage", "food"),
        ("pencil", "object"),
    ]
    assert {subject.image.size for subject in found} == {(96, 96)}


def test_a_tarball_that_is_not_the_expected_one_is_refused(emoji, tmp_path):
    path = tmp_path / "iconify-json-noto-1.2.9.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(OSError, match="has the SHA-512 .* Remove the file"):
        emoji.packages.fetch("@iconify-json/noto", tmp_path)


def test_without_npm_the_error_says_where_the_tarball_may_be_put(emoji, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"iconify-json-noto-1\.2\.9\.tgz is not there. Install Node.js"):
        emoji.packages.fetch("@iconify-json/noto", tmp_path)


def test_subjects_with_a_near_twin_are_never_held_out(emoji, subjects):
    twin = emoji.packages.Subject("stick", "object", paint("red", (40, 4, 57, 92)))
    many = [*subjects, twin]
    train, held_out = emoji.packages.split(many, held_out=3)
    assert [subject.name for subject in train] == ["pole", "stick"]
    assert [subject.name for subject in held_out] == ["plank", "block", "corner"]
    with pytest.raises(ValueError, match="4 subjects were to be held out, and 3 of 5 have no near twin"):
        emoji.packages.split(many, held_out=4)


def test_looks_are_said_as_they_were_painted(emoji, subjects):
    said = [emoji.views.say_looks(subject.image) for subject in subjects]
    assert said == ["tall red", "wide blue", "green and white", "purple"]
    turned = emoji.views.turn_hue(subjects[0].image, 120)
    assert emoji.views.say_looks(turned) == "tall green"


def test_a_view_has_the_subject_somewhere_on_its_ground(emoji, subjects):
    corners = []
    for seed in range(20):
        image = emoji.views.view(subjects[0].image, "yellow", 32, random.Random(seed))
        pixels = np.asarray(image)
        assert image.size == (32, 32)
        ground = (pixels == emoji.views.PLAIN["yellow"]).all(-1)
        red = (np.abs(pixels.astype(int) - COLOURS["red"]) < 30).all(-1)
        assert ground.sum() > 500 and red.sum() > 20
        corners.append(tuple(np.argwhere(red).min(0)))
    assert len(set(corners)) > 10


def test_compositions_show_the_subject_on_another_ground_than_is_asked_for(emoji, subjects):
    source = emoji.source.EmojiSource("compositions", subjects, 500)
    for index in range(50):
        *words, photo, ground = source.read(index, random.Random(index)).prompt
        assert photo.size == (64, 64) and ground in emoji.views.GROUNDS.values()
        colour = ground.split()[-2]
        if colour in emoji.views.PLAIN:
            assert photo.getpixel((0, 0)) != emoji.views.PLAIN[colour]
        assert len(words) <= 1


@pytest.mark.parametrize("kind", ["captions", "pictures", "compositions"])
def test_images_follow_from_the_number_and_words_vary(emoji, subjects, kind):
    def read(seed):
        sample = emoji.source.EmojiSource(kind, subjects, 500).read(3, random.Random(seed))
        parts = [*sample.prompt, sample.target]
        return [part.tobytes() for part in parts if isinstance(part, Image.Image)], sample.caption

    assert read(0)[0] == read(1)[0]
    assert len({read(seed)[1] for seed in range(20)}) == 2  # by its name, or by its kind


def test_words_of_held_out_names_are_unknown(emoji, subjects):
    tokenizer = emoji.train.build_clip_tokenizer(emoji.models.list_words(subjects[:2]))
    ids = tokenizer("a tall red pole on a blue background").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("block").input_ids[1] == tokenizer.unk_token_id


def test_scores_find_the_subject_in_its_own_image_and_not_in_anothers(emoji, subjects):
    def features(images):
        colours = [np.asarray(image.resize((8, 8)), dtype=np.float32).reshape(-1) for image in images]
        colours = torch.tensor(np.stack(colours))
        return {"pixels": torch.nn.functional.normalize(colours - colours.mean(1, keepdim=True), dim=-1)}

    evaluate, scorer = emoji.evaluate, SimpleNamespace(features=features)
    tasks = evaluate.build_tasks(subjects)
    assert len(tasks) == 8 and all(task.number != task.other for task in tasks)
    drawn = {
        "image": [evaluate.show(subjects[task.number], task.ground, 0, "reference") for task in tasks],
        "shuffled": [evaluate.show(subjects[task.other], task.ground, 0, "reference") for task in tasks],
    }
    results = evaluate.score(scorer, drawn, tasks, subjects)["pixels"]
    assert np.allclose(results["image"]["score"], 1, atol=1e-5)
    assert all(results["image"]["first"]) and not any(results["shuffled"]["first"])
    assert results["image"]["above"] == [1.0] * 8
    lines = evaluate.summarise({"pixels": results}, len(subjects))
    assert "100.0% | 100.0%" in lines[2] and "| 0.0% |" in lines[3]


def test_every_phase_trains_a_step_and_the_model_draws(emoji, subjects, tmp_path, monkeypatch):
    monkeypatch.setitem(emoji.models.UNET, "block_out_channels", (16, 32, 32))
    run = emoji.train.Run(tmp_path, subjects[:3], steps=1, samples=8, batch_size=2)
    for phase in emoji.train.PHASES.values():
        phase(run)
    tasks = emoji.evaluate.build_tasks(subjects[2:])
    vae = emoji.evaluate.draw(tmp_path / "model", tasks, tmp_path, steps=1, guidance_scale=2.0)
    drawn = {name: emoji.evaluate.read_strip(tmp_path / f"{name}.png") for name in emoji.evaluate.CONDITIONS}
    assert {len(images) for images in drawn.values()} == {len(tasks)}
    assert drawn["image"][0].tobytes() != drawn["shuffled"][0].tobytes()
    ceilings = emoji.evaluate.draw_ceilings(vae, tasks, subjects[2:])
    assert {len(images) for images in ceilings.values()} == {len(tasks)}
    emoji.evaluate.draw_sheet(tasks, drawn, subjects[2:], tmp_path / "sheet.png")
    # a second call finds every phase done
    before = (tmp_path / "instruct" / "log.jsonl").read_bytes()
    emoji.train.train_instruct(run)
    assert (tmp_path / "instruct" / "log.jsonl").read_bytes() == before
