"""Importing and composing with Ray Data: the shards of one machine, a worker killed on the way, outputs at an fsspec address."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.making_models import save_models
from support.stored_data import encode, make_image, write_files

from kosmos_g_diffusers.data.making import (
    ComposeSettings,
    ImportSettings,
    compose,
    entities,
    import_data,
    on_ray,
)
from kosmos_g_diffusers.data.making.on_ray import Place, ShardMaker, connected, import_on_ray


def folder_of(tmp_path, count=12):
    files = {}
    for number in range(count):
        files |= {f"{number:02}.png": encode(make_image(number)), f"{number:02}.txt": f"dog {number}"}
    files["05.txt"] = " "
    return write_files(tmp_path / "folder", files)


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


@pytest.fixture
def alone(tmp_path):
    """What one machine makes."""
    settings = ImportSettings(source=f"folder:{folder_of(tmp_path)}", samples_per_shard=2)
    manifest = import_data(tmp_path / "alone", settings, workers=0, sheet_samples=0)
    return settings, manifest, shards_of(tmp_path / "alone")


def test_what_an_actor_makes_is_what_one_machine_makes(alone, tmp_path):
    settings, _, expected = alone
    maker = ShardMaker(settings.source, settings, {}, str(tmp_path / "out"))
    for shard in (3, 0, 5, 1, 4, 2):
        assert maker({"shard": [shard]}) == {"shard": [shard]}
    assert shards_of(tmp_path / "out") == expected


def test_outputs_go_to_any_address(alone):
    settings, _, expected = alone
    maker = ShardMaker(settings.source, settings, {}, "memory://bucket/out")
    maker({"shard": [0, 2]})
    place = Place("memory://bucket/out")
    assert place.read("part-000000.tar") == expected["part-000000.tar"]
    assert (
        place.names()["part-000002.tar"] == len(expected["part-000002.tar"]) and place.read("nothing") is None
    )
    assert Place("memory://nowhere").names() == {}


def test_without_ray_the_error_names_what_to_install(alone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"kosmos-g-diffusers\[ray\]"), connected("local"):
        pass


def test_sets_that_have_to_be_fetched_are_not_fetched_by_every_node(tmp_path):
    with pytest.raises(ValueError, match="grit has to be fetched before a cluster reads it. Pass --data"):
        import_on_ray(str(tmp_path / "out"), ImportSettings(source="grit"), "local")


class Mortal(ShardMaker):
    """Its process dies when it makes shard 3 for the first time."""

    def make(self, shard):
        if shard == 3 and self.place.read("died") is None:
            self.place.write("died", b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        super().make(shard)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing_and_nothing_is_made_twice(alone, tmp_path, monkeypatch):
    pytest.importorskip("ray.data")
    settings, manifest, expected = alone
    monkeypatch.setattr("kosmos_g_diffusers.data.making.on_ray.ShardMaker", Mortal)
    let_workers_find_this(monkeypatch)
    made = import_on_ray(str(tmp_path / "out"), settings, "local")
    assert (tmp_path / "out" / "died").exists() and shards_of(tmp_path / "out") == expected
    assert (made["samples"], made["shards"], made["skipped"]) == (
        manifest["samples"],
        manifest["shards"],
        manifest["skipped"],
    )
    listed = json.loads((tmp_path / "out" / "shards.json").read_text())["shardlist"]
    assert listed == json.loads((tmp_path / "alone" / "shards.json").read_text())["shardlist"]
    again = import_on_ray(str(tmp_path / "out"), settings, "local")  # nothing is left to make
    assert again["samples"] == made["samples"]


# Composing ------------------------------------------------------------------------------------------------------------


class Here:
    """What of Ray is used, run in this process."""

    def __init__(self):
        self.data, self.DataContext, self.execution_options = self, self, self

    def ActorPoolStrategy(self, **sizes):
        return sizes

    def cluster_resources(self):
        return {"CPU": 2}

    def get_current(self):
        return self

    def from_items(self, items, override_num_blocks):
        self.items = items
        return self

    def map_batches(self, actor, fn_constructor_args, batch_size, **others):
        self.actor = actor(*fn_constructor_args)
        return self

    def iter_rows(self):
        for item in self.items:
            made = self.actor({name: [value] for name, value in item.items()})
            yield {name: values[0] for name, values in made.items()}


def name_first_words(self, captions):
    """In place of a language model whose random weights name nothing."""
    return [caption.split()[:1] for caption in captions]


class Naming(on_ray.ComposeActor):
    """With the names above, in a process of its own."""

    def __init__(self, *arguments):
        entities.EntityFinder.__call__ = name_first_words
        super().__init__(*arguments)


def let_workers_find_this(monkeypatch):
    here = Path(__file__).parent
    paths = [os.environ.get("PYTHONPATH", ""), str(here), str(here.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def composing(tmp_path, models, monkeypatch):
    """What one machine makes of five images, one of which is damaged."""
    monkeypatch.setattr(entities.EntityFinder, "__call__", name_first_words)
    rng = np.random.default_rng(0)
    for number in range(5):
        image = PIL.Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "3.png").write_bytes(b"no image")
    settings = ComposeSettings(
        **{name: str(folder) for name, folder in models.items()},
        min_side=8,
        size=32,
        threshold=0.0,
        min_area=0.0,
    )
    options = {"batch_size": 2, "samples_per_shard": 2, "sheet_samples": 0}
    manifest = compose(tmp_path / "photos", tmp_path / "alone", settings, workers=0, **options)
    return settings, options, manifest, shards_of(tmp_path / "alone")


def test_compositions_of_a_cluster_are_those_of_one_machine(composing, tmp_path, monkeypatch):
    settings, options, manifest, expected = composing
    monkeypatch.setattr(on_ray, "connected", lambda address: contextlib.nullcontext(Here()))
    made = on_ray.compose_on_ray(tmp_path / "photos", str(tmp_path / "out"), settings, "here", **options)
    assert shards_of(tmp_path / "out") == expected and made["skipped"] == manifest["skipped"]
    # an address: what is there is taken up, and nothing is made again
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    on_ray.compose_on_ray(tmp_path / "photos", "memory://bucket/made", settings, "here", **options)
    place = Place("memory://bucket/made")
    assert {name: place.read(name) for name in place.names() if name.startswith("part-")} == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-home"))
    monkeypatch.setattr(on_ray, "connected", None)
    again = on_ray.compose_on_ray(tmp_path / "photos", "memory://bucket/made", settings, "here", **options)
    assert again["skipped"] == manifest["skipped"]


@pytest.mark.slow
def test_compositions_are_made_by_actors_of_ray(composing, tmp_path, monkeypatch):
    pytest.importorskip("ray.data")
    monkeypatch.setattr(on_ray, "ComposeActor", Naming)
    let_workers_find_this(monkeypatch)
    settings, options, manifest, expected = composing
    made = on_ray.compose_on_ray(tmp_path / "photos", str(tmp_path / "out"), settings, "local", **options)
    assert shards_of(tmp_path / "out") == expected and made["skipped"] == manifest["skipped"]
