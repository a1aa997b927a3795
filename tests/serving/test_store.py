"""The limit of the disk: what goes, what stays, and what is said when nothing may go."""

import gc
import os
import shutil
import time

import PIL.Image
import pytest

from kosmos_g_diffusers.generation.png import write_png
from kosmos_g_diffusers.generation.settings import GenerationSettings
from kosmos_g_diffusers.serving.session import Session
from kosmos_g_diffusers.serving.store import Store, StoreFull, on_disk

SIZE = 64 * 1024  # of a file of these tests, about


def noise(path):
    """A PNG of about SIZE bytes."""
    PIL.Image.frombytes("RGB", (148, 147), os.urandom(148 * 147 * 3)).save(path)
    return path


def upload(store, name, age=0):
    path = store.new_upload_path(name)
    with store.using([path]):
        store.make_room(on_disk(SIZE))
        noise(path)
    when = time.time() - age
    os.utime(path, (when, when))
    return path


def draw(store, *inputs, age=0):
    path = store.new_image_path()
    settings = GenerationSettings("<i> " * len(inputs) or "a hat", images=inputs)
    write_png(PIL.Image.frombytes("RGB", (148, 147), os.urandom(148 * 147 * 3)), path, settings)
    when = time.time() - age
    os.utime(path, (when, when))
    store.count_image(path, settings)
    return path


@pytest.fixture
def limited(tmp_path):
    """Function that makes a store with room for some files."""

    def make(files, **options):
        return Store(tmp_path / "out", files * on_disk(SIZE + 4096), **options)

    return make


def test_oldest_uploads_go_first_and_those_that_are_used_stay(limited):
    store = limited(3)
    old, used, young = (upload(store, f"{age}.png", age) for age in (300, 200, 100))
    with store.using([old]):
        store.make_room(SIZE)
    assert old.exists() and not used.exists() and young.exists()


def test_upload_and_input_are_one_file(limited, tmp_path):
    store = limited(3)
    path = upload(store, "cat.png")
    kept = store.find(store.keep_upload(path, "pictures"))
    assert kept.samefile(path)
    for _ in range(50):
        store.keep_upload(path, "pictures")
        assert store.lend(kept).samefile(path)
    assert len({entry.stat().st_ino for entry in (tmp_path / "out").rglob("*.png")}) == 1
    store.make_room(SIZE)  # fifty names are one file


def test_input_that_an_image_needs_is_never_deleted(limited):
    store = limited(3)
    needed = store.keep_upload(upload(store, "a.png", 900), "pictures")
    spare = store.keep_upload(upload(store, "b.png", 500), "pictures")
    image = draw(store, needed)
    for _ in range(3):
        upload(store, "c.png")
    assert store.find(needed) is not None and store.find(spare) is None
    assert needed.find(image.parent).exists()  # as `kosmos-g generate --from` looks for it
    assert image.exists()


def test_images_from_before_a_restart_keep_what_they_need(limited):
    needed = limited(9).keep_upload(upload(limited(9), "a.png", 900), "pictures")
    draw(limited(9), needed)
    store = limited(2)
    for _ in range(3):
        upload(store, "c.png")
    assert store.find(needed) is not None


def test_full_disk_is_told_and_images_stay_unless_the_limit_was_given(limited):
    store = limited(2)
    images = [draw(store, store.keep_upload(upload(store, f"{n}.png"), "pictures"), age=n) for n in range(2)]
    with pytest.raises(StoreFull, match="disk space of this server is used up"):
        upload(store, "more.png")
    assert all(image.exists() for image in images) and not store.removed


def test_given_limit_deletes_the_oldest_images_and_what_they_alone_needed(limited):
    store = limited(4, prunes_images=True)
    inputs = [store.keep_upload(upload(store, f"{n}.png", 50), "pictures") for n in range(2)]
    old, young = draw(store, inputs[0], age=500), draw(store, inputs[1], age=5)
    for _ in range(2):
        upload(store, "more.png")
    assert not old.exists() and young.exists() and store.removed == {old.name}
    assert store.find(inputs[0]) is None and store.find(inputs[1]) is not None


def test_image_that_is_being_used_outlives_a_given_limit(limited):
    store, run = limited(2, prunes_images=True), Session()
    path = draw(store, age=500)
    store.hold(run, [path])
    draw(store)
    draw(store)
    assert path.exists()


def test_words_of_a_session_stay_as_long_as_it_lives(limited):
    store, session = limited(2), Session()
    word = store.keep_upload(upload(store, "word.png", 900), "words")
    store.hold(session, [word])
    for _ in range(3):
        upload(store, "more.png")
    assert store.find(word) is not None
    del session
    gc.collect()
    store._pruned = float("-inf")
    for _ in range(3):
        upload(store, "more.png")
    assert store.find(word) is None


def test_examples_stay(limited, tmp_path):
    store = limited(2)
    example = store.put_example("cat.png", noise(tmp_path / "cat.png"))
    os.utime(example, (0, 0))
    for _ in range(5):
        upload(store, "more.png")
    assert example.exists()


def test_small_files_count_as_what_they_take(limited):
    store = Store(limited(1).folder, 10 * 4096)
    for number in range(10):
        store.new_upload_path(f"{number}.png").write_bytes(b"x")
        store.make_room(on_disk(1))
    assert len(list((store.folder / "uploads").iterdir())) == 10
    store.make_room(on_disk(1))
    assert len(list((store.folder / "uploads").iterdir())) == 9


def test_uploads_of_a_day_ago_are_deleted_at_the_start_and_while_it_runs(limited):
    store = limited(9)
    path = upload(store, "a.png")
    os.utime(path.parent, (0, 0))
    limited(9)
    assert not path.parent.exists()
    path = upload(store, "a.png")
    os.utime(path.parent, (0, 0))
    store._tidied = float("-inf")
    store.make_room(1)
    assert not path.parent.exists()


def test_file_system_without_links_gets_a_copy(limited, monkeypatch):
    store = limited(9)
    path = upload(store, "a.png")

    def refuse(*args):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    kept = store.keep_upload(path, "pictures")
    assert store.find(kept).read_bytes() == path.read_bytes()
    shutil.rmtree(path.parent)
    assert store.find(kept) is not None
