"""Data sets that are larger than the disk: Parquet files fetched one by one, read in any order, resumed at the exact sample."""

import os
import pickle
import random

import pytest
from support.stored_data import encode, read, shade, write_lines

from kosmos_g_diffusers.data import BadSample, MixtureDataset, build_source

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path):
    """Three files of 7, 5 and 9 rows in several row groups, and a column that nobody asks for."""
    first = 0
    for number, rows in enumerate((7, 5, 9)):
        shades = range(first, first + rows)
        table = datasets.Dataset.from_dict(
            {
                "text": [f"shade {n}" for n in shades],
                "image": [encode(n) for n in shades],
                "unused": ["x" * 1000] * rows,
            }
        )
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{number}.parquet", batch_size=3)
        first += rows
    return tmp_path


@pytest.fixture
def line(files):
    return f"datasets:parquet?data_files={files}/*.parquet&image=image&caption=text"


class Names:
    """A collate that keeps the caption and a number of the sample's own."""

    def prepare(self, sample, generator):
        return {"row": (sample.caption, shade(sample.target), generator.initial_seed())}

    def __call__(self, rows):
        return {"rows": [row["row"] for row in rows]}


def batches(source, steps, **options):
    dataset = MixtureDataset([source], Names(), batch_size=4, **options)
    return [dataset[step]["rows"] for step in steps]


def test_files_are_fetched_when_a_row_of_them_is_needed(line, tmp_path):
    source = build_source(f"{line}&streaming=true", cache_dir=tmp_path / "copies")
    assert (len(source), source.groups) == (21, [7, 5, 9])
    copies = tmp_path / "copies" / "parquet"
    # of the first file, which is looked at for the kind of its images, nothing but text and image is kept
    assert source.read(11, random.Random(0)).caption == "shade 11"
    for index in range(21):
        sample = source.read(index, random.Random(0))
        assert (sample.key, sample.caption, shade(sample.target)) == (
            f"parquet:{index}",
            f"shade {index}",
            index,
        )
    kept = sum(path.stat().st_size for path in copies.glob("*.arrow"))
    assert kept < 21 * 1000 and len(list(copies.glob("*.arrow"))) >= 3
    assert source.length(3) == len("shade 3")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(20, random.Random(0)).caption == "shade 20"


def test_streamed_rows_come_in_the_order_of_their_files_and_resume_at_the_exact_sample(line, tmp_path):
    streamed = build_source(f"{line}&streaming=true", cache_dir=tmp_path / "copies")
    local = build_source(line)
    local.groups = streamed.groups  # a table has no files: with them, the order is the same
    expected = batches(local, range(12), seed=3)
    assert batches(streamed, range(12), seed=3) == expected
    again = build_source(f"{line}&streaming=true", cache_dir=tmp_path / "other")
    assert batches(again, range(7, 12), seed=3) == expected[7:]
    assert sorted(row for batch in batches(again, range(21), seed=3) for row, *_ in batch) == sorted(
        4 * [f"shade {n}" for n in range(21)]
    )


def test_copies_keep_to_their_limit(line, tmp_path):
    source = build_source(f"{line}&streaming=true&cache_gib=0.000001", cache_dir=tmp_path / "copies")
    for index in (0, 8, 13, 1, 20, 9):
        assert source.read(index, random.Random(0)).caption == f"shade {index}"
        copy = pickle.loads(pickle.dumps(source))  # nothing is open there
        assert copy.read(index, random.Random(0)).caption == f"shade {index}"
    assert len(list((tmp_path / "copies" / "parquet").glob("*.arrow"))) == 1


def test_a_file_that_changed_is_fetched_anew(files, line, tmp_path):
    options = {"cache_dir": tmp_path / "copies"}
    assert read(f"{line}&streaming=true", 0, **options).caption == "shade 0"
    rows = {"text": ["new"] * 7, "image": [encode(1)] * 7, "unused": ["x"] * 7}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(files / "0.parquet")
    os.utime(files / "0.parquet", (1, 1))
    assert read(f"{line}&streaming=true", 0, **options).caption == "new"


def test_a_file_that_is_gone_costs_its_rows(files, line, tmp_path):
    source = build_source(f"{line}&streaming=true", cache_dir=tmp_path / "copies")
    (files / "2.parquet").unlink()
    assert source.read(3, random.Random(0)).caption == "shade 3"
    with pytest.raises(BadSample, match=r"2.parquet cannot be fetched") as caught:
        source.read(20, random.Random(0))
    assert caught.value.cause == "shard"


def test_what_cannot_be_streamed_is_refused_with_the_reason(files, line, tmp_path):
    where = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(
        ValueError, match="a.jsonl is not Parquet. .* could not be resumed at the exact sample"
    ):
        build_source(f"datasets:json?data_files={where}&streaming=true")
    with pytest.raises(ValueError, match="has no split 'test' to stream, only train"):
        build_source(f"{line}&streaming=true&split=test")
    with pytest.raises(ValueError, match="streaming=perhaps. Expected true or false"):
        build_source(f"{line}&streaming=perhaps")
    with pytest.raises(ValueError, match="cache_gib=much. Expected a number of GiB"):
        build_source(f"{line}&streaming=true&cache_gib=much")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(files / "3.parquet")
    with pytest.raises(
        ValueError, match="3.parquet has the columns text, the first file text, image, unused"
    ):
        build_source(f"{line}&streaming=true", cache_dir=tmp_path / "copies")
    (files / "3.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        build_source(f"{line}&streaming=true", cache_dir=tmp_path / "copies")
