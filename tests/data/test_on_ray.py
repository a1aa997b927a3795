"""Importing with Ray Data: the shards of one machine, a worker killed on the way, outputs at an fsspec address."""

import json
import os
import signal
import sys

import pytest
from support.stored_data import encode, make_image, write_files

from kosmos_g_diffusers.data.making import ImportSettings, import_data
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
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(
            [
                os.environ.get("PYTHONPATH", ""),
                os.path.dirname(__file__),
                os.path.dirname(os.path.dirname(__file__)),
            ]
        ),
    )
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
