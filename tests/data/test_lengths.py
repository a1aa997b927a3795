"""Lengths and places of samples are found once, by one process; batches by length are what they were without that."""

import base64
import json
import multiprocessing
import pickle
import random

import numpy as np
import pytest
from support.stored_data import encode, write_files, write_tar

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.data import BadSample, MixtureDataset, build_source
from kosmos_g_diffusers.data.lengths import Lengths
from kosmos_g_diffusers.data.mixture import EndlessOrder


def captions(count):
    rng = random.Random(0)
    return [f"number {number} " + "dog " * rng.randrange(30) for number in range(count)]


@pytest.fixture
def lines(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    image, texts = encode(1), captions(30)
    rows = ["\t".join(("x", text, base64.b64encode(image).decode())) for text in texts]
    for number in range(3):
        part = slice(10 * number, 10 * number + 10)
        write_files(tmp_path / "tsv", {f"{number}.tsv": "\n".join(rows[part]) + "\n"})
        members = [
            (f"{key}.json", json.dumps({"caption": text}).encode()) for key, text in enumerate(texts[part])
        ]
        write_tar(tmp_path / "shards" / f"{number}.tar", members)
    files = {f"{number:02}.png": image for number in range(30)} | {
        f"{n:02}.txt": text for n, text in enumerate(texts)
    }
    write_files(tmp_path / "folder", files)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "table")
    (tmp_path / "parquet").mkdir()
    for number in range(3):
        part = datasets.Dataset.from_dict({"text": texts[10 * number : 10 * number + 10]})
        part.to_parquet(tmp_path / "parquet" / f"{number}.parquet")
    return {
        "tsv": f"tsv:captions:{tmp_path}/tsv",
        "shards": f"shards:{tmp_path}/shards",
        "folder": f"folder:{tmp_path}/folder",
        "table": f"datasets:{tmp_path}/table?caption=text",
        "streamed": f"datasets:parquet?data_files={tmp_path}/parquet/*.parquet&streaming=true&caption=text",
    }


class Plain:
    def prepare(self, sample, generator):
        return {"caption": sample.caption}

    def __call__(self, rows):
        return {}


FORMS = ("tsv", "shards", "folder", "table", "streamed")


@pytest.mark.parametrize("form", FORMS)
def test_batches_by_length_hold_the_samples_that_their_lengths_say(form, lines, tmp_path):
    source = build_source(lines[form], cache_dir=tmp_path / "user-cache")
    options = {"batch_size": 2, "num_processes": 3, "bucket_window": 4, "seed": 5, "shuffle_window": 16}
    mixture = MixtureDataset([source], Plain(), **options)
    order = EndlessOrder(source.groups, mixture.orders[0].seed, 16)
    for window in range(4):  # a window of 24 samples, over several epochs
        positions = np.arange(24 * window, 24 * window + 24)
        expected = positions[np.argsort([source.length(order[p]) for p in positions.tolist()], kind="stable")]
        found = [mixture.positions(0, 4 * window + batch) for batch in range(4)]
        assert sorted(map(tuple, found)) == sorted(map(tuple, expected.reshape(4, -1).tolist()))


@pytest.mark.parametrize("form", FORMS)
def test_lengths_are_found_once_and_kept(form, lines, tmp_path, monkeypatch):
    source = build_source(lines[form], cache_dir=tmp_path / "user-cache")
    order = EndlessOrder(source.groups, 0)
    expected = [source.length(index) for index in range(30)]
    assert Lengths(source, order).take(np.arange(30)).tolist() == expected
    for name in ("length", "lengths"):
        monkeypatch.setattr(type(source), name, None, raising=False)  # would raise
    again = pickle.loads(pickle.dumps(build_source(lines[form], cache_dir=tmp_path / "user-cache")))
    indices = np.array([29, 3, 3, 11])
    assert Lengths(again, order).take(indices).tolist() == [expected[index] for index in indices]


def test_damaged_lengths_and_changed_files_are_looked_at_again(lines, tmp_path):
    source = build_source(lines["tsv"], cache_dir=tmp_path / "user-cache")
    order = EndlessOrder(source.groups, 0)
    first = Lengths(source, order).take(np.arange(30)).tolist()
    for path in (tmp_path / "user-cache" / "lengths").glob("*.npy"):
        path.write_bytes(b"damaged")
    assert Lengths(source, order).take(np.arange(30)).tolist() == first
    row = (tmp_path / "tsv" / "0.tsv").read_text().splitlines()[0].split("\t")
    (tmp_path / "tsv" / "0.tsv").write_text("\t".join((row[0], "dog", row[2])) + "\n")
    source = build_source(lines["tsv"], cache_dir=tmp_path / "user-cache")
    assert Lengths(source, EndlessOrder(source.groups, 0)).take(np.arange(3)).tolist() == [3, *first[10:12]]


def test_a_cache_that_cannot_be_written_costs_time_only(lines, tmp_path):
    (tmp_path / "user-cache").write_text("a file, no folder")
    source = build_source(lines["tsv"], cache_dir=tmp_path / "user-cache")
    assert Lengths(source, EndlessOrder(source.groups, 0)).take(np.arange(2)).tolist() == [
        source.length(0),
        source.length(1),
    ]


def test_sources_of_ones_own_are_asked_for_the_lengths_that_are_needed():
    class Own:
        name, groups, asked = "own", [1000], []

        def __len__(self):
            return 1000

        def length(self, index):
            self.asked.append(index)
            if index == 7:
                raise BadSample("row", "seven")
            return index

    own = Own()
    assert Lengths(own, EndlessOrder([1000], 0)).take(np.array([5, 7])).tolist() == [5, 0] and own.asked == [
        5,
        7,
    ]


def open_and_count(line, cache_dir, reads, barrier):
    from kosmos_g_diffusers.data import tsv

    find = tsv._find_lines

    def counted(path, *arguments):
        with reads.get_lock():
            reads.value += 1
        return find(path, *arguments)

    tsv._find_lines = counted
    barrier.wait()
    build_source(line, cache_dir=cache_dir)


def test_of_several_processes_that_start_cold_one_reads_each_file(lines, tmp_path):
    context = multiprocessing.get_context("fork")
    reads, barrier = context.Value("i", 0), context.Barrier(4)
    arguments = (lines["tsv"], tmp_path / "user-cache", reads, barrier)
    processes = [context.Process(target=open_and_count, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and reads.value == 3


def test_where_lines_begin_is_mapped_and_not_sent_to_workers(lines, tmp_path):
    source = build_source(lines["tsv"], cache_dir=tmp_path / "user-cache")
    assert all(isinstance(offsets, np.memmap) for offsets in source.offsets)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(17, random.Random(0)).caption == source.read(17, random.Random(0)).caption
    assert all(kept is None for kept in source.__getstate__()["offsets"])


def test_an_index_is_built_beforehand(lines, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cli.main(["data", "index", lines["tsv"], lines["shards"]]) == 0
    assert capsys.readouterr().out.count(": 30 samples") == 2
    kept = sorted(path.relative_to(tmp_path / "home").parts[1] for path in (tmp_path / "home").rglob("*.npy"))
    assert kept.count("lines") == 3 and kept.count("lengths") == 6


def test_many_positions_at_once_are_those_one_by_one():
    order = EndlessOrder([5, 0, 7, 40, 3], 1, 8)
    positions = np.array([0, 54, 55, 110, 3, 30, 164])
    assert order.take(positions).tolist() == [order[position] for position in positions.tolist()]
