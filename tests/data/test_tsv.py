"""The official TSV files and manifests, as they are and damaged."""

import base64
import io
import json
import pickle
import random

import numpy as np
import PIL.Image
import pytest

from kosmos_g_diffusers.data import BadSample, FilteredSample, TsvSource, build_source
from kosmos_g_diffusers.data.sample import IMAGE_LENGTH
from kosmos_g_diffusers.data.tsv import line_offsets


def make_image(shade, size=(8, 8)):
    return PIL.Image.new("RGB", size, (shade, 0, 255 - shade))


def encode(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return base64.b64encode(buffer.getvalue()).decode()


def shade(image):
    """Of an image made by `make_image`."""
    return int(np.asarray(image)[0, 0, 0])


@pytest.fixture
def write(tmp_path):
    """Function that writes rows (lists of columns) to a file below the test's folder."""

    def write(name, rows, end="\n"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
        return path

    return write


@pytest.fixture
def source(tmp_path):
    """Function that opens a source with a cache folder of the test's own."""
    return lambda kind, where, **options: TsvSource(kind, where, cache_dir=tmp_path / "cache", **options)


def caption_row(text, number, *more):
    return ["id", text, encode(make_image(number)), *more]


def composition_row(caption, tags, number):
    """Target of shade `number`, then of each tag shades number + 1, + 2 (with and without background), ..."""
    images = [encode(make_image(number + i)) for i in range(1 + 2 * len(tags))]
    return [caption, ",".join(tags), *images]


def test_caption_rows(write, source):
    path = write("laion/0.tsv", [caption_row("a dog", 10, "512", "400", "0.3"), caption_row("a cat", 20)])
    rows = source("captions", path)
    assert len(rows) == 2 and rows.groups == [2]
    sample = rows.read(1, random.Random(0))
    assert (sample.key, sample.prompt, sample.caption) == ("laion/0.tsv:2", ("a cat",), "a cat")
    assert shade(sample.target) == 20 and sample.target.mode == "RGB"


def test_edit_rows_draw_a_seed_pair(write, source):
    images = [encode(make_image(number)) for number in (10, 11, 20, 21, 30, 31)]
    rows = source("edits", write("0.tsv", [["a garden", "make it snow", *images]]))
    samples = [rows.read(0, random.Random(seed)) for seed in range(60)]
    pairs = {(shade(sample.prompt[-2]), shade(sample.target)) for sample in samples}
    assert pairs == {(10, 11), (20, 21), (30, 31)}
    assert {sample.prompt[-1] for sample in samples} == {"make it snow"}
    assert {sample.prompt[0] for sample in samples if len(sample.prompt) == 3} == {"a garden"}
    assert 10 < sum(len(sample.prompt) == 3 for sample in samples) < 50


def test_composition_rows_show_the_cut_outs_of_their_tags(write, source):
    rows = source("compositions", write("0.tsv", [composition_row("a dog on a sofa", ["sofa", "dog"], 100)]))
    whole = rows.read(0, random.Random(0))
    assert shade(whole.target) == 100 and whole.caption == "a dog on a sofa"
    seen = set()
    for seed in range(60):
        prompt = rows.read(0, random.Random(seed)).prompt
        assert [isinstance(part, str) for part in prompt] == [True, False, True, False]
        assert (prompt[0], prompt[2]) in {("a dog", " on a sofa"), ("a ", " on a ")}
        seen.add((shade(prompt[1]), shade(prompt[3])))
    assert seen == {(dog, sofa) for dog in (103, 104) for sofa in (101, 102)}


def test_probabilities_reach_the_rows(write, source):
    path = write("0.tsv", [composition_row("a dog", ["dog"], 100)])
    rows = source("compositions", path, word_dropout=1, background=1)
    prompts = [rows.read(0, random.Random(seed)).prompt for seed in range(9)]
    assert all(prompt[0] == "a " and shade(prompt[1]) == 101 for prompt in prompts)


def test_the_official_folders_are_read_by_their_manifest(write, source, tmp_path):
    write("laion/0000.tsv", [caption_row("zero", 1)])
    write("laion/part/0001.tsv", [caption_row("one", 2), caption_row("two", 3)])
    write("laion/unlisted.tsv", [caption_row("never", 4)])
    manifest = tmp_path / "laion/json/train.json"
    manifest.parent.mkdir()
    manifest.write_text(
        json.dumps([{"source": ["part/0001.tsv"], "weight": 1.0}, {"source": ["0000.tsv"], "weight": 1.0}])
    )
    for where in (tmp_path / "laion", manifest):
        rows = source("captions", where)
        assert [rows.read(index, random.Random(0)).caption for index in range(3)] == ["one", "two", "zero"]
        assert rows.groups == [2, 1]

    write("openimage/data/c.tsv", [composition_row("a dog", ["dog"], 5)])
    (tmp_path / "openimage/json").mkdir()
    (tmp_path / "openimage/json/train.json").write_text('[{"source": ["c.tsv"], "count": 1}]')
    assert len(source("compositions", tmp_path / "openimage")) == 1


def test_folders_and_patterns_are_read_in_the_order_of_names(write, source, tmp_path):
    for number in (2, 0, 1):
        write(f"d/{number}.tsv", [caption_row(str(number), number)])
    for where in (tmp_path / "d", tmp_path / "d" / "*.tsv"):
        rows = source("captions", where)
        assert [rows.read(index, random.Random(0)).caption for index in range(3)] == ["0", "1", "2"]


def test_differing_weights_of_a_manifest_are_warned_of(write, source, tmp_path, caplog):
    write("0.tsv", [caption_row("a", 1)])
    write("1.tsv", [caption_row("b", 1)])
    manifest = tmp_path / "train.json"
    manifest.write_text('[{"source": ["0.tsv"], "weight": 1}, {"source": ["1.tsv"], "weight": 5}]')
    assert len(source("captions", manifest)) == 2
    assert "different weights, which are not used" in caplog.text


def test_length_is_rough_and_decodes_nothing(write, source):
    captions = source(
        "captions", write("c.tsv", [["id", "a dog", "no image"], ["id", "a dog in the snow", "no"]])
    )
    assert [captions.length(0), captions.length(1)] == [5, 17]
    edits = source("edits", write("e.tsv", [["abc", "de", "no", "no", "no", "no"]]))
    assert edits.length(0) == 5 + IMAGE_LENGTH
    compositions = source("compositions", write("o.tsv", [["a dog on a sofa", "dog,sofa", *["no"] * 5]]))
    assert compositions.length(0) == 15 + 2 * IMAGE_LENGTH


# Bad input ---------------------------------------------------------------------------------------------------------


def test_no_data_found_is_an_error_with_what_was_looked_for(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No data found at .*empty: json/train.json, train.json, \*.tsv"):
        source("captions", tmp_path / "empty")
    with pytest.raises(ValueError, match="No data found at .*nowhere"):
        source("captions", tmp_path / "nowhere")
    (tmp_path / "void.tsv").touch()
    with pytest.raises(ValueError, match="No data found: the 1 TSV files .* hold no rows"):
        source("captions", tmp_path / "void.tsv")


def test_all_missing_files_of_a_manifest_are_named(write, source, tmp_path):
    write("0.tsv", [caption_row("a", 1)])
    manifest = tmp_path / "train.json"
    names = ["0.tsv"] + [f"lost-{number}.tsv" for number in range(30)]
    manifest.write_text(json.dumps([{"source": names}]))
    with pytest.raises(ValueError, match="30 of the 31 files that .*train.json names are missing") as caught:
        source("captions", manifest)
    assert all(name in str(caught.value) for name in names[1:])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ('{"source": []}', "holds a dict"),
        ("[]", "an empty list"),
        ('[{"source": "0.tsv"}]', "Entry 0 .* no list of file names"),
        ('[{"source": []}]', "names no files"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_manifest_of_another_form_is_refused(source, tmp_path, text, message):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        source("captions", tmp_path / "train.json")


@pytest.mark.parametrize(
    "kind, columns, seen, expected",
    [
        ("captions", ["id", "a dog"], 2, "at least 3"),
        ("edits", ["a", "b", "c"], 3, "an even number, at least 4"),
        ("edits", ["a", "b", "c", "d", "e"], 5, "an even number, at least 4"),
        ("compositions", ["a dog", "dog", "target", "whole"], 4, "3 and 2 for each tag"),
        ("compositions", ["a dog", "dog,cat", "target", "whole", "cut"], 5, "3 and 2 for each tag"),
    ],
)
def test_a_first_row_with_the_wrong_columns_stops_before_training(
    write, source, kind, columns, seen, expected
):
    path = write("wrong.tsv", [columns])
    with pytest.raises(ValueError, match=rf"{path}, line 1, has {seen} columns. Expected {expected}"):
        source(kind, path)


def test_a_later_row_with_the_wrong_columns_costs_that_row(write, source):
    path = write("0.tsv", [caption_row("a", 1), ["id", "b"], caption_row("c", 3)])
    rows = source("captions", path)
    with pytest.raises(BadSample, match=rf"{path}, line 2, has 2 columns. Expected at least 3") as caught:
        rows.read(1, random.Random(0))
    assert caught.value.cause == "row"
    assert rows.read(2, random.Random(0)).caption == "c"


def test_rows_that_cannot_be_used_are_bad_samples(write, source):
    truncated = encode(make_image(1, (64, 64)))[:120]
    eps = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    path = write(
        "0.tsv",
        [
            caption_row("first", 1),
            ["id", "not base64", "§§§"],
            ["id", "no image", base64.b64encode(b"hello").decode()],
            ["id", "truncated", truncated],
            ["id", "a program", eps],
            ["id", "  ", encode(make_image(1))],
        ],
    )
    rows = source("captions", path)
    causes = []
    for index in range(1, 6):
        with pytest.raises(BadSample, match=rf"0.tsv:{index + 1} ") as caught:
            rows.read(index, random.Random(0))
        causes.append(caught.value.cause)
    assert causes == ["image"] * 4 + ["caption"]


def test_text_that_is_not_utf8_is_a_bad_row(tmp_path, source):
    (tmp_path / "0.tsv").write_bytes(b"id\tok\tx\nid\t\xff\xfe\tx\n")
    with pytest.raises(BadSample, match="not UTF-8") as caught:
        source("captions", tmp_path / "0.tsv").read(1, random.Random(0))
    assert caught.value.cause == "row"


def test_byte_order_marks_are_no_part_of_a_text(write, source, tmp_path):
    """As editors on Windows write them; a file of UTF-16 is read by its mark, at any place of it."""
    rows = [[f"für {number} 1\u0a0a\u0d0d€", "x", encode(make_image(number)), "", ""] for number in range(3)]
    text = "".join("\t".join(row) + "\r\n" for row in rows) + "\r\n"
    for encoding, mark in (("utf-8-sig", b""), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        path = tmp_path / f"{encoding}.tsv"
        path.write_bytes(mark + text.encode(encoding))
        compositions = source("compositions", path, word_dropout=0, background=1)
        assert len(compositions) == 3
        for number in (2, 0, 1):
            sample = compositions.read(number, random.Random(0))
            assert sample.caption == rows[number][0] and shade(sample.target) == number
            assert compositions.length(number) > 10
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3


def test_utf32_files_are_refused_with_advice(source, tmp_path):
    (tmp_path / "0.tsv").write_bytes("id\tok\tx\n".encode("utf-32"))
    with pytest.raises(ValueError, match="is UTF-32-LE, which is not read. Save it as UTF-8"):
        source("captions", tmp_path / "0.tsv")


def test_utf16_without_its_mark_is_a_bad_row(source, tmp_path):
    (tmp_path / "0.tsv").write_bytes(b"id\tok\tx\nid\td\0o\0g\0\t" + encode(make_image(3)).encode() + b"\n")
    with pytest.raises(
        BadSample, match="NUL characters, such as UTF-16 without its byte order mark"
    ) as caught:
        source("captions", tmp_path / "0.tsv").read(1, random.Random(0))
    assert caught.value.cause == "row"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_a_bad_image(write, source, monkeypatch):
    rows = source("captions", write("0.tsv", [["id", "big", encode(make_image(1, (100, 100)))]]))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(BadSample, match="decompression bomb") as caught:
        rows.read(0, random.Random(0))
    assert caught.value.cause == "image"


def test_small_images_are_filtered_by_their_columns(write, source):
    rows = source(
        "captions",
        write(
            "0.tsv",
            [caption_row("a", 1, "512", "383"), caption_row("b", 1, "384", "384"), caption_row("c", 1)],
        ),
        min_side=384,
    )
    with pytest.raises(FilteredSample, match="512 x 383"):
        rows.read(0, random.Random(0))
    assert [rows.read(index, random.Random(0)).caption for index in (1, 2)] == ["b", "c"]


def test_a_file_that_disappears_costs_its_rows(write, source):
    path = write("0.tsv", [caption_row("a", 1)])
    rows = source("captions", path)
    path.unlink()
    with pytest.raises(BadSample, match="cannot be read") as caught:
        rows.read(0, random.Random(0))
    assert caught.value.cause == "shard"


# Lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, lines",
    [
        (b"", []),
        (b"ab\n", [b"ab\n"]),
        (b"ab", [b"ab"]),
        (b"ab\r\ncd\r\n", [b"ab\r\n", b"cd\r\n"]),
        (b"ab\n\ncd\n\n\n", [b"ab\n", b"\n", b"cd\n"]),
    ],
)
def test_line_offsets(tmp_path, data, lines, monkeypatch):
    monkeypatch.setattr("kosmos_g_diffusers.data.tsv.SCAN_BYTES", 3)
    path = tmp_path / "lines"
    path.write_bytes(data)
    offsets = line_offsets(path, tmp_path / "cache").tolist()
    assert [data[begin:end] for begin, end in zip(offsets, offsets[1:], strict=False)] == lines


def test_line_offsets_are_kept_and_a_damaged_or_old_cache_is_not_believed(tmp_path, monkeypatch):
    path, cache = tmp_path / "lines", tmp_path / "cache"
    path.write_bytes(b"one\ntwo\n")
    first = line_offsets(path, cache).tolist()
    (kept,) = cache.rglob("*.npy")
    kept.write_bytes(b"damaged")
    assert line_offsets(path, cache).tolist() == first
    monkeypatch.setattr("kosmos_g_diffusers.data.tsv.SCAN_BYTES", None)  # a second scan would raise
    assert line_offsets(path, cache).tolist() == first
    monkeypatch.undo()
    path.write_bytes(b"one\ntwo\nthree\n")
    assert len(line_offsets(path, cache)) == 4


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    path = tmp_path / "lines"
    path.write_bytes(b"one\n")
    (tmp_path / "cache").write_text("a file, no folder")
    assert line_offsets(path, tmp_path / "cache").tolist() == [0, 4]
    assert "are not kept" in caplog.text


def test_a_source_can_be_sent_to_workers(write, source):
    rows = pickle.loads(pickle.dumps(source("captions", write("0.tsv", [caption_row("a", 7)]))))
    assert shade(rows.read(0, random.Random(0)).target) == 7


# Specs -------------------------------------------------------------------------------------------------------------


def test_a_line_of_text_builds_a_source(write, tmp_path):
    path = write("0.tsv", [composition_row("a dog", ["dog"], 9)])
    rows = build_source(
        f"tsv:compositions:{path}", background=1, word_dropout=0, cache_dir=tmp_path / "cache"
    )
    assert isinstance(rows, TsvSource) and rows.name == f"tsv:compositions:{path}"
    assert shade(rows.read(0, random.Random(0)).prompt[1]) == 10


@pytest.mark.parametrize(
    "spec", ["", "tsv", "tsv:laion:/x", "tsv:captions:", "/data/x.tsv", "shards:", "datasets:?image=b"]
)
def test_an_unknown_line_names_the_known_forms(spec):
    with pytest.raises(ValueError, match="tsv:captions:PATH") as caught:
        build_source(spec)
    assert (
        "shards:" in str(caught.value)
        and "datasets:" in str(caught.value)
        and repr(spec) in str(caught.value)
    )
