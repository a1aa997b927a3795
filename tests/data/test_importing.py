"""Importing public sets: forms of their exact columns, filters, kills on the way; what is read back is what the form gives itself."""

import json
import multiprocessing
import os
import random
import time
import zipfile

import pytest
from support.stored_data import encode, make_image, shade, shown, write_files, write_lines, write_tar

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.data import ShardSource, build_source
from kosmos_g_diffusers.data.making import ImportSettings, import_data, importing
from kosmos_g_diffusers.data.making.archives import unpack
from kosmos_g_diffusers.data.public_sets import LAYOUTS, find_public_set, format_table, read_public_sets
from kosmos_g_diffusers.data.shard_writer import write_shard

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def run(source, output, workers=0, sheet_samples=0, data=None, **settings):
    options = {"workers": workers, "sheet_samples": sheet_samples, "data": data}
    return import_data(output, ImportSettings(source=source, **settings), **options)


def folder_of(tmp_path, count=10, **sizes):
    files = {}
    for number in range(count):
        files |= {
            f"{number:02}.png": encode(make_image(number, sizes.get(f"n{number}", (8, 8)))),
            f"{number:02}.txt": f"dog {number}",
        }
    return write_files(tmp_path / "folder", files)


def samples_of(source, seeds=(0, 1, 2)):
    """What training reads of every sample, with several draws."""
    found = []
    for index in range(len(source)):
        for seed in seeds:
            sample = source.read(index, random.Random(seed))
            found.append(
                (shown(sample), None if sample.target is None else shade(sample.target), sample.caption)
            )
    return found


# What is written ------------------------------------------------------------------------------------------------------


def test_shards_hold_the_samples_and_their_images_as_they_are(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "03.png").write_bytes(b"no image")
    (folder / "04.txt").write_text(" ")
    manifest = run(f"folder:{folder}", tmp_path / "out", samples_per_shard=4, sheet_samples=3)
    assert (manifest["samples"], manifest["shards"], manifest["skipped"]) == (
        8,
        3,
        {"image": 1, "caption": 1},
    )
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["shardlist"][0]["nsamples"] == 3
    assert (tmp_path / "out" / "contact-sheet.html").is_file()
    source = ShardSource(tmp_path / "out")
    assert [caption for *_, caption in samples_of(source, (0,))] == [
        f"dog {n}" for n in range(10) if n not in (3, 4)
    ]
    record = source.record(0)
    assert record.images["target"]() == (folder / "00.png").read_bytes()
    assert record.content["note"] == {"source": "folder/00.png"}


def test_samples_are_filtered_and_the_source_is_looked_at_from_its_beginning(tmp_path):
    rows = {
        "text": ["a", "b", "c", "d"],
        "image": [encode(make_image(n, (8 + 8 * (n != 1), 16))) for n in range(4)],
    }
    rows["quality"] = [5.0, 5.0, 1.0, 5.0]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "table")
    line = f"datasets:{tmp_path}/table?image=image&score=quality"
    manifest = run(line, tmp_path / "out", limit=3, min_side=16, min_score=2)
    assert (manifest["samples"], manifest["skipped"]) == (1, {"small": 1, "score": 1})


def test_the_command_imports_and_says_how_much(tmp_path, capsys):
    folder = folder_of(tmp_path, 3)
    arguments = [
        "data",
        "import",
        f"folder:{folder}",
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "0",
        "--limit",
        "2",
    ]
    assert cli.main([*arguments, "--sheet-samples", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"2 samples in 1 shards in {tmp_path / 'out'}", "No input was skipped."]
    assert (tmp_path / "out" / "contact-sheet.html").is_file()
    assert cli.main([*arguments, "--min-side", "9"]) == 2
    assert "other settings: min_side 0 there, 9 now" in capsys.readouterr().err


def test_settings_have_to_stay_the_same_and_two_processes_do_not_write_the_same(tmp_path):
    folder = folder_of(tmp_path, 3)
    run(f"folder:{folder}", tmp_path / "out")
    with pytest.raises(ValueError, match="other settings: min_side 0 there, 9 now"):
        run(f"folder:{folder}", tmp_path / "out", min_side=9)
    import filelock

    with (
        filelock.FileLock(tmp_path / "out" / ".import-0-of-1.lock"),
        pytest.raises(ValueError, match="Another process writes"),
    ):
        run(f"folder:{folder}", tmp_path / "out")
    with pytest.raises(ValueError, match="Nothing could be made of any sample .* small: 3"):
        run(f"folder:{folder}", tmp_path / "other", min_side=9)


def test_processes_share_the_shards(tmp_path):
    folder = folder_of(tmp_path)
    settings = ImportSettings(source=f"folder:{folder}", samples_per_shard=2)
    for index in (1, 2, 0):
        import_data(
            tmp_path / "out", settings, workers=0, process_index=index, num_processes=3, sheet_samples=0
        )
    import_data(tmp_path / "alone", settings, workers=0, sheet_samples=0)
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.tar"))
    assert names == sorted(path.name for path in (tmp_path / "out").glob("*.tar")) and len(names) == 5
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def import_slowly(line, output, before, after, mark):
    """Import, and stop for ever at the second shard: before it is written, or between it and what says that it is done."""

    def write(path, samples):
        wait = path.name == "part-000001.tar"
        if wait and before:
            mark.touch()
            time.sleep(600)
        write_shard(path, samples)
        if wait and after:
            mark.touch()
            time.sleep(600)

    importing.write_shard = write
    run(line, output, samples_per_shard=5)


def test_what_is_killed_twice_loses_nothing_and_makes_nothing_twice(tmp_path):
    folder = folder_of(tmp_path, 20)
    (folder / "07.txt").unlink()
    for number, stop in enumerate(((True, False), (False, True))):
        mark = tmp_path / f"mark-{number}"
        arguments = (f"folder:{folder}", tmp_path / "out", *stop, mark)
        process = multiprocessing.get_context("fork").Process(target=import_slowly, args=arguments)
        process.start()
        while not mark.exists():
            assert process.is_alive()
            time.sleep(0.05)
        process.kill()
        process.join()
    manifest = run(f"folder:{folder}", tmp_path / "out", samples_per_shard=5)
    assert (manifest["samples"], manifest["shards"], manifest["skipped"]) == (19, 4, {"caption": 1})
    captions = [caption for *_, caption in samples_of(ShardSource(tmp_path / "out"), (0,))]
    assert captions == [f"dog {number}" for number in range(20) if number != 7]
    assert not list((tmp_path / "out").glob(".*.part"))


# The table ------------------------------------------------------------------------------------------------------------


def save_rows(folder, rows, images):
    table = datasets.Dataset.from_dict(rows)
    for column in images:
        feature = (
            datasets.Image() if not isinstance(rows[column][0], list) else datasets.Sequence(datasets.Image())
        )
        table = table.cast_column(column, feature)
    table.to_parquet(folder / "train.parquet")


def columns_of(row):
    return {name.strip() for name in row.columns.split(",")}


def test_the_table_has_what_a_person_has_to_know():
    rows = read_public_sets()
    assert len(rows) >= 12 and len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.licence and row.size and row.good_for and row.layout in LAYOUTS
        assert row.kind in ("caption", "edit", "composition", "prompt", "document")
        query = row.line.partition("?")[2]
        named = [part.split("=", 1) for part in query.split("&") if "=" in part]
        for use, name in named:
            if use in ("edit", "source", "prompt", "texts", "input") and row.line.startswith("datasets"):
                assert name.split(".")[0] in columns_of(row), (row.name, use)


def test_the_table_says_where_columns_are_not_known_from_a_sets_own_page():
    blocks = dict(zip([row.name for row in read_public_sets()], _blocks(format_table()), strict=True))
    assert "no row of it was seen" in blocks["x2i-web"]
    assert "as other loaders of it use them" in blocks["ultraedit"]
    assert "columns:" not in blocks["hq-edit"] + blocks["instructpix2pix"]


def _blocks(text):
    """Of each row its lines."""
    blocks = []
    for line in text.splitlines():
        if not line.startswith(" "):
            blocks.append("")
        blocks[-1] += line
    return blocks


def test_the_table_is_shown_and_unknown_names_are_named(tmp_path, capsys):
    assert cli.main(["data", "list"]) == 0
    text = capsys.readouterr().out
    for row in read_public_sets():
        assert row.name in text and row.licence in text and row.id in text
    assert cli.main(["data", "import", "magicbrus", "--output", str(tmp_path / "out")]) == 2
    assert (
        "'magicbrus' is not a known data set. Known: instructpix2pix, magicbrush" in capsys.readouterr().err
    )
    with pytest.raises(
        ValueError, match="grit is not fetched by this command.* img2dataset .* pass it as --data"
    ):
        run("grit", tmp_path / "out")
    with pytest.raises(ValueError, match="magicbrush has no scores"):
        run("magicbrush", tmp_path / "out", min_score=3)


def two_views(left, right):
    whole = make_image(99, (80, 40))
    whole.paste(make_image(left, (24, 24)), (8, 8))
    whole.paste(make_image(right, (24, 24)), (48, 8))
    return encode(whole)


# rows with the exact columns of the sets on the Hub that `datasets` fetches
HUB = {
    "instructpix2pix": (
        lambda n: {"original_prompt": f"garden {n}", "original_image": encode(n), "edit_prompt": "make it snow",
                   "edited_prompt": f"snow {n}", "edited_image": encode(100 + n)},
        ["original_image", "edited_image"],
        lambda n: ([f"garden {n}", n, "make it snow"], 100 + n, f"snow {n}"),
    ),
    "magicbrush": (
        lambda n: {"img_id": str(n), "turn_index": 1, "source_img": encode(n), "mask_img": encode(7), "instruction": f"edit {n}",
                   "target_img": encode(100 + n)},
        ["source_img", "mask_img", "target_img"],
        lambda n: ([n, f"edit {n}"], 100 + n, None),
    ),
    "omniedit": (
        lambda n: {"omni_edit_id": str(n), "task": "swap", "src_img": encode(n), "edited_img": encode(100 + n),
                   "edited_prompt_list": [f"edit {n}"], "width": 8, "height": 8, "sc_score_1": 9, "sc_score_2": 9,
                   "sc_reasoning": "", "pq_score": 9, "pq_reasoning": "", "o_score": 9.0},
        ["src_img", "edited_img"],
        lambda n: ([n, f"edit {n}"], 100 + n, None),
    ),
    "ultraedit": (
        lambda n: {"source_image": encode(n), "edited_image": encode(100 + n), "edit_prompt": f"edit {n}",
                   "source_caption": f"garden {n}", "target_caption": f"snow {n}"},
        ["source_image", "edited_image"],
        lambda n: ([f"garden {n}", n, f"edit {n}"], 100 + n, f"snow {n}"),
    ),
    "hq-edit": (
        lambda n: {"input": f"garden {n}", "input_image": encode(n), "edit": f"edit {n}", "inverse_edit": "",
                   "output": f"snow {n}", "output_image": encode(100 + n)},
        ["input_image", "output_image"],
        lambda n: ([f"garden {n}", n, f"edit {n}"], 100 + n, f"snow {n}"),
    ),
    "subjects200k": (
        lambda n: {"image": two_views(n, 100 + n), "collection": "collection_2",
                   "quality_assessment": {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5},
                   "description": {"item": "cup", "description_0": "a cup", "description_1": f"cup {n}", "category": "",
                                   "description_valid": True}},
        ["image"],
        lambda n: ([n, f"cup {n}"], 100 + n, None),
    ),
    "metaquery-instruct": (
        lambda n: {"source_images": [encode(n), encode(50 + n)], "prompt": f"both {n}", "target_image": encode(100 + n)},
        ["source_images", "target_image"],
        lambda n: ([n, 50 + n, f"both {n}"], 100 + n, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_sets_on_the_hub_are_imported_by_name(name, tmp_path, monkeypatch):
    make_row, images, expected = HUB[name]
    rows = [make_row(number) for number in range(4)]
    assert set(rows[0]) >= columns_of(find_public_set(name))
    save_rows(tmp_path, {column: [row[column] for row in rows] for column in rows[0]}, images)
    where = f"parquet?data_files={tmp_path}/train.parquet&"
    line = find_public_set(name).line.replace("split=FreeForm&", "")
    # the Hub is not there: the same line, with the file of the same columns
    monkeypatch.setattr(
        "kosmos_g_diffusers.data.making.importing.build_source",
        lambda given: build_source(
            f"datasets:{where}{given.replace('split=FreeForm&', '').partition('?')[2]}"
        ),
    )
    manifest = run(name, tmp_path / "out", **({"min_score": 5} if find_public_set(name).score else {}))
    assert (manifest["samples"], manifest["settings"]["licence"]) == (4, find_public_set(name).licence)
    imported = build_source(f"shards:{tmp_path}/out", word_dropout=0)
    for number in range(4):
        sample = imported.read(number, random.Random(0))
        assert (shown(sample), shade(sample.target), sample.caption) == expected(number)
    note = imported.record(0).content["note"]
    assert note["licence"] == find_public_set(name).licence and note["source"].endswith(":0")
    direct = build_source(f"datasets:{where}{line.partition('?')[2]}")
    assert samples_of(direct) == samples_of(build_source(f"shards:{tmp_path}/out"))


def split_archive(folder, name, members, parts=3, mode="w:gz"):
    """A tar.gz, cut into parts .part-aa, .part-ab, ..."""
    whole = write_tar(folder / name, members, mode).read_bytes()
    (folder / name).unlink()
    size = -(-len(whole) // parts)
    for number in range(parts):
        (folder / f"{name}.part-a{'abcdef'[number]}").write_bytes(whole[number * size : (number + 1) * size])


def test_a_set_of_json_lines_and_a_split_archive_is_imported(tmp_path):
    place = tmp_path / "seed" / "multi_turn_editing"
    rows = [
        {"source_image": f"a/{n}.png", "target_image": f"b/{n}.png", "instruction": f"edit {n}"}
        for n in range(4)
    ]
    write_lines(place / "annotations" / "split_0001.jsonl", rows[:3])
    write_lines(place / "annotations" / "split_0002.jsonl", rows[3:])
    images = {f"a/{n}.png": encode(n) for n in range(4)} | {f"b/{n}.png": encode(100 + n) for n in range(4)}
    split_archive(place / "images", "multi_turn.tar.gz", images)
    for _ in range(2):  # unpacked once
        assert run("seed-edit-turns", tmp_path / "out", data=tmp_path / "seed")["samples"] == 4
    source = build_source(f"shards:{tmp_path}/out")
    assert samples_of(source, (0,)) == [([n, f"edit {n}"], 100 + n, None) for n in range(4)]


def test_other_sets_of_files_are_imported(tmp_path):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a dog"}]
    place = tmp_path / "llava"
    write_files(
        place,
        {
            "blip_laion_cc_sbu_558k.json": json.dumps(
                [{"id": "0", "image": "00/0.png", "conversations": turns}]
            )
        },
    )
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        archive.writestr("00/0.png", encode(5))
    run("llava-pretrain", tmp_path / "out1", data=place)
    assert samples_of(build_source(f"shards:{tmp_path}/out1"), (0,)) == [(["a dog"], 5, "a dog")]

    mark = "<img><|image_{}|></img>"
    row = {"task_type": "x", "instruction": f"{mark.format(2)} and {mark.format(1)}", "input_images": ["retrieval/d/0.png", "retrieval/d/1.png"],
           "output_image": "retrieval/d/2.png"}  # fmt: skip
    place = tmp_path / "x2i"
    write_lines(place / "web-image-1.jsonl", [row])
    write_tar(place / "retrieval" / "images.tar.gz", {f"d/{n}.png": encode(n) for n in range(3)}, "w:gz")
    run("x2i-web", tmp_path / "out2", data=place)
    assert samples_of(build_source(f"shards:{tmp_path}/out2"), (0,)) == [([1, " and ", 0], 2, None)]

    record = {
        "caption": "a dog on a sofa",
        "noun_chunks": [[0, 5, 0, 0, 0.5, 1, 0.9]],
        "ref_exps": [],
        "key": "0",
    }
    image = make_image(9, (20, 20))
    write_tar(
        tmp_path / "grit" / "0.tar",
        {"0.jpg": encode(image), "0.json": json.dumps(record).encode(), "0.txt": b"x"},
    )
    run("grit", tmp_path / "out3", data=tmp_path / "grit")
    imported = build_source(f"shards:{tmp_path}/out3", word_dropout=0)
    assert shown(imported.read(0, random.Random(0))) == ["a dog", 9, " on a sofa"]
    assert samples_of(imported) == samples_of(
        build_source(
            f"shards:{tmp_path}/grit?image=jpg&caption=json.caption&boxes=json.noun_chunks", word_dropout=0
        )
    )

    members = {"0.jpg": encode(3), "0.txt": b"a cat", "0.json": b'{"url": "x"}'}
    write_tar(tmp_path / "cc" / "0.tar", members)
    run("cc12m", tmp_path / "out4", data=tmp_path / "cc")
    assert samples_of(build_source(f"shards:{tmp_path}/out4"), (0,)) == [(["a cat"], 3, "a cat")]

    write_tar(
        tmp_path / "t2i" / "data_512_2M" / "0.tar", {"0.jpg": encode(3), "0.json": b'{"prompt": "a cat"}'}
    )
    run("text-to-image-2m", tmp_path / "out5", data=tmp_path / "t2i")
    assert samples_of(build_source(f"shards:{tmp_path}/out5"), (0,)) == [(["a cat"], 3, "a cat")]

    document = {
        "url": "x",
        "text_list": ["a", "b"],
        "image_info": [{"image_name": "0.png", "matched_text_index": 1}],
        "similarity_matrix": [],
    }
    write_lines(tmp_path / "mmc4" / "docs.jsonl", [document])
    write_files(tmp_path / "mmc4" / "images", {"0.png": encode(4)})
    run("mmc4-core", tmp_path / "out6", data=tmp_path / "mmc4")
    assert samples_of(build_source(f"shards:{tmp_path}/out6"), (0,)) == [(["a", 4, "b"], None, None)]

    table = datasets.Dataset.from_dict(
        {"images": [["0.png", None]], "texts": [[None, "a"]], "metadata": ["[]"], "general_metadata": ["{}"]}
    )
    (tmp_path / "obelics").mkdir()
    table.to_parquet(tmp_path / "obelics" / "0.parquet")
    write_files(tmp_path / "obelics", {"0.png": encode(4)})
    run("obelics", tmp_path / "out7", data=tmp_path / "obelics")
    assert samples_of(build_source(f"shards:{tmp_path}/out7"), (0,)) == [([4, "a"], None, None)]


def test_what_a_set_needs_is_fetched_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, repo_type, allow_patterns, local_dir):
        asked.update(name=name, kind=repo_type, patterns=allow_patterns)
        write_tar(tmp_path / "x.tar", {"0.jpg": encode(3), "0.json": b'{"prompt": "a cat"}'})
        (tmp_path / "out" / "fetched" / "data_512_2M").mkdir(parents=True)
        (tmp_path / "x.tar").rename(tmp_path / "out" / "fetched" / "data_512_2M" / "0.tar")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert run("text-to-image-2m", tmp_path / "out")["samples"] == 1
    assert asked == {
        "name": "jackyhate/text-to-image-2M",
        "kind": "dataset",
        "patterns": ["data_512_2M/*.tar"],
    }
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline\nx"))
    )
    with pytest.raises(
        OSError, match="text-to-image-2M cannot be fetched: offline Fetch data_512_2M.* pass --data FOLDER"
    ):
        run("text-to-image-2m", tmp_path / "other")


# Archives -------------------------------------------------------------------------------------------------------------


def test_archives_are_read_as_hostile(tmp_path):
    folder = tmp_path / "in"
    write_tar(
        folder / "a.tar.gz",
        {"../up.png": b"x", "/abs.png": b"x", "ok/1.png": b"good", "c:x.png": b"x"},
        "w:gz",
    )
    unpack(folder, "*.tar.gz")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert files == ["in/ok/1.png"]
    os.symlink(tmp_path, folder / "link")
    write_tar(folder / "b.tar.gz", {"link/2.png": b"x"}, "w:gz")
    unpack(folder, "b.tar.gz")
    assert not (tmp_path / "2.png").exists()


def test_an_archive_that_is_cut_off_or_not_there_is_explained(tmp_path):
    split_archive(tmp_path, "a.tar.gz", {f"{n}.png": os.urandom(5000) for n in range(20)})
    (tmp_path / "a.tar.gz.part-ac").unlink()
    with pytest.raises(ValueError, match="a.tar.gz.part-aa cannot be unpacked .* with all its parts"):
        unpack(tmp_path, "a.tar.gz.part-*")
    with pytest.raises(ValueError, match="There is no b.zip in"):
        unpack(tmp_path, "b.zip")
