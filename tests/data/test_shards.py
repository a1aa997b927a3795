"""WebDataset shards: what the writer writes, webdataset and our source read; damaged, hostile and remote shards."""

import functools
import hashlib
import http.server
import io
import json
import pickle
import random
import shutil
import sys
import tarfile
import threading

import numpy as np
import PIL.Image
import pytest
import requests

from kosmos_g_diffusers.data import (
    BadSample,
    MixtureDataset,
    ShardSource,
    ShardWriter,
    build_source,
    write_shard_index,
)
from kosmos_g_diffusers.data.sample import IMAGE_LENGTH
from kosmos_g_diffusers.data.shard_files import index_tar
from kosmos_g_diffusers.files import cache_path, write_text


def make_image(shade, size=(16, 16)):
    return PIL.Image.new("RGB", size, (shade, shade, shade))


def shade(image):
    """Of an image made by `make_image`, to the nearest ten: JPEG is not exact."""
    return round(int(np.asarray(image)[0, 0, 0]), -1)


def encode(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def write_tar(path, members):
    """A tar file of (name, bytes) or of ready `TarInfo`s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def record(**fields):
    return json.dumps(fields).encode()


@pytest.fixture
def source(tmp_path):
    """Function that opens shards with a cache folder of the test's own."""
    return lambda where, **options: ShardSource(where, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def one_of_each(tmp_path):
    """A folder with a shard that holds a sample of each kind, as `ShardWriter` writes them."""
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write_caption("000", "a dog", make_image(10), note={"licence": "CC0"})
        pairs = [(make_image(20), make_image(30)), (make_image(40), make_image(50))]
        writer.write_edit("001", "make it snow", pairs, words="a garden", caption="a garden in snow")
        entities = [("dog", make_image(70), make_image(80)), ("sofa", None, make_image(90))]
        writer.write_composition("002", "a dog on a sofa", make_image(60), entities)
        writer.write_prompt("003", ["a", make_image(100), "and", make_image(110)], target=make_image(120))
    return tmp_path / "shards"


def read(source, index, seed=0):
    return source.read(index, random.Random(seed))


def test_webdataset_reads_what_the_writer_writes(one_of_each):
    wds = pytest.importorskip("webdataset")
    samples = list(wds.WebDataset(str(one_of_each / "part-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000", "001", "002", "003"]
    members = [sorted(name for name in sample if not name.startswith("__")) for sample in samples]
    assert members == [
        ["json", "target.jpg"],
        ["0.source.jpg", "0.target.jpg", "1.source.jpg", "1.target.jpg", "json"],
        ["0.cutout.png", "0.jpg", "1.cutout.png", "json", "target.jpg"],
        ["0.jpg", "1.jpg", "json", "target.jpg"],
    ]
    assert json.loads(samples[0]["json"]) == {"caption": "a dog", "note": {"licence": "CC0"}}


def test_we_read_what_webdataset_writes(tmp_path, source):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(3):
            writer.write(
                {
                    "__key__": f"x/{number:03d}",
                    "json": {"caption": f"dog {number}"},
                    "target.png": make_image(10 * number),
                }
            )
    shards = source(tmp_path / "a.tar")
    assert [read(shards, index).caption for index in range(3)] == ["dog 0", "dog 1", "dog 2"]
    assert [shade(read(shards, index).target) for index in range(3)] == [0, 10, 20]


def test_captions_edits_compositions_and_prompts_come_back(one_of_each, source):
    shards = source(one_of_each, word_dropout=0, background=1)
    caption, edit, composition, prompt = (read(shards, index) for index in range(4))
    assert (caption.key, caption.prompt, caption.caption) == (
        "shards/part-000000.tar:000",
        ("a dog",),
        "a dog",
    )
    assert shade(caption.target) == 10

    assert (edit.prompt[0], edit.prompt[2], edit.caption) == ("a garden", "make it snow", "a garden in snow")
    pairs = {
        (shade(read(shards, 1, seed).prompt[1]), shade(read(shards, 1, seed).target)) for seed in range(30)
    }
    assert pairs == {(20, 30), (40, 50)}

    assert (composition.prompt[0], composition.prompt[2]) == ("a dog", " on a sofa")
    # of the sofa there is no image with its background
    assert (shade(composition.prompt[1]), shade(composition.prompt[3])) == (70, 90)
    assert (shade(composition.target), composition.caption) == (60, "a dog on a sofa")

    assert [part if isinstance(part, str) else shade(part) for part in prompt.prompt] == [
        "a",
        100,
        "and",
        110,
    ]
    assert (shade(prompt.target), prompt.caption) == (120, None)


def test_words_dropped_and_backgrounds_are_drawn(one_of_each, source):
    shards = source(one_of_each)
    edits = {len(read(shards, 1, seed).prompt) for seed in range(30)}
    assert edits == {2, 3}
    compositions = {
        (read(shards, 2, seed).prompt[0], shade(read(shards, 2, seed).prompt[1])) for seed in range(60)
    }
    assert compositions == {("a dog", 70), ("a dog", 80), ("a ", 70), ("a ", 80)}


def test_shards_of_img2dataset_are_captions(tmp_path, source):
    image_bytes = encode(make_image(50), "JPEG")
    write_tar(
        tmp_path / "0.tar",
        [
            ("000.jpg", image_bytes),
            ("000.txt", b"a dog"),
            ("000.json", record(url="http://x", width=16)),
            ("001.jpg", image_bytes),
            ("001.txt", b"a cat"),
        ],
    )
    shards = source(tmp_path / "0.tar")
    assert [(read(shards, index).caption, shade(read(shards, index).target)) for index in (0, 1)] == [
        ("a dog", 50),
        ("a cat", 50),
    ]


def test_length_is_rough_and_reads_no_member(one_of_each, source, monkeypatch):
    shards = source(one_of_each)
    monkeypatch.setattr(type(shards.files), "read", None)
    lengths = [shards.length(index) // IMAGE_LENGTH for index in range(4)]
    assert lengths == [0, 1, 2, 2]


def test_samples_of_many_shards_are_found(tmp_path, source):
    for number, size in enumerate((3, 1, 2)):
        with ShardWriter(tmp_path, prefix=f"part-{number}") as writer:
            for row in range(size):
                writer.write_caption(f"{row}", f"{number} {row}")
    shards = source(tmp_path)
    assert shards.groups == [3, 1, 2] and len(shards) == 6
    assert [read(shards, index).caption for index in range(6)] == ["0 0", "0 1", "0 2", "1 0", "2 0", "2 1"]


@pytest.mark.parametrize("samples", [1, 4])
def test_the_index_of_a_shard_is_forgotten_when_too_many_are_open(tmp_path, source, monkeypatch, samples):
    monkeypatch.setattr("kosmos_g_diffusers.data.shards.INDEXED_SAMPLES", samples)
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for row in range(10):
            writer.write_caption(f"{row}", f"{row}")
    shards = source(tmp_path)
    for index in [*range(10), *reversed(range(10))]:
        assert read(shards, index).caption == str(index)
        assert 1 <= len(shards._indices) <= max(1, samples // 2)


# The writer --------------------------------------------------------------------------------------------------------


def test_a_writer_goes_on_where_one_was_stopped(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for number in range(5):
                writer.write_caption(f"{number}", f"{number}")
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000000.tar", "part-000001.tar"]
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        assert writer.written == 4
        for number in range(writer.written, 5):
            writer.write_caption(f"{number}", f"{number}")
    shards = source(tmp_path)
    assert [read(shards, index).caption for index in range(5)] == list("01234")


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder) as writer:
            writer.write_caption("0", "a dog", make_image(1))
    assert (tmp_path / "a/part-000000.tar").read_bytes() == (tmp_path / "b/part-000000.tar").read_bytes()


def test_the_index_lists_every_shard_and_is_believed(tmp_path, source, monkeypatch):
    for prefix in ("part-00", "part-01"):
        with ShardWriter(tmp_path, prefix=prefix, samples_per_shard=2) as writer:
            for number in range(3):
                writer.write_caption(f"{number}", f"{prefix} {number}")
    path = write_shard_index(tmp_path)
    index = json.loads(path.read_text())
    assert index["__kind__"] == "wids-shard-index-v1"
    assert [(shard["url"], shard["nsamples"]) for shard in index["shardlist"]] == [
        ("part-00-000000.tar", 2),
        ("part-00-000001.tar", 1),
        ("part-01-000000.tar", 2),
        ("part-01-000001.tar", 1),
    ]
    monkeypatch.setattr("kosmos_g_diffusers.data.shard_files.index_tar", None)  # counting would raise
    patterns = ("*.tar", "part-0{0..1}-00000{0..1}.tar", "part-0{0..1}-*.tar")
    for where in (tmp_path, path, *(tmp_path / pattern for pattern in patterns)):
        if "{" in str(where):
            pytest.importorskip("webdataset")
        assert source(where).groups == [2, 1, 2, 1]


def test_samples_that_the_index_leaves_out_are_warned_of_once(tmp_path, source, caplog):
    for number in range(2):
        with ShardWriter(tmp_path / "shards", prefix=f"p{number}", samples_per_shard=20) as writer:
            for key in range(20):
                writer.write_caption(f"{key:03}", "a dog", make_image(10))
    listed = [{"url": f"p{number}-000000.tar", "nsamples": 5} for number in range(2)]
    write_text(tmp_path / "shards" / "shards.json", json.dumps({"shardlist": listed}))
    shards = source(tmp_path / "shards")
    assert len(shards) == 10
    for index in range(10):
        read(shards, index)
    (record,) = caplog.records
    assert (
        "p0-000000.tar holds 20 samples, and shards.json says 5: the others are never read"
        in record.getMessage()
    )


def test_writing_nothing_to_list_or_a_bad_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no .tar files"):
        write_shard_index(tmp_path)
    with pytest.raises(ValueError, match="prefix '../x'"):
        ShardWriter(tmp_path, prefix="../x")
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="key 'a.b'"):
            writer.write_caption("a.b", "a dog")
        with pytest.raises(BadSample, match="empty caption"):
            writer.write_caption("0", " ")


# Damaged and hostile shards ----------------------------------------------------------------------------------------


def assert_bad(shards, index, cause, message):
    with pytest.raises(BadSample, match=message) as caught:
        read(shards, index)
    assert caught.value.cause == cause


def test_a_shard_that_is_cut_off_costs_the_samples_behind_the_cut(tmp_path, source):
    with ShardWriter(tmp_path) as writer:
        for number in range(4):
            writer.write_caption(f"{number}", f"dog {number}", make_image(10 * number))
    (path,) = tmp_path.glob("*.tar")
    third = index_tar(path)[2].members["target.jpg"][0]
    whole = path.read_bytes()

    # within the third image; nothing tells that there was a fourth sample
    path.write_bytes(whole[: third + 100])
    shards = source(path)
    assert len(shards) == 3
    assert [read(shards, index).caption for index in (0, 1)] == ["dog 0", "dog 1"]
    assert_bad(shards, 2, "shard", "part-000000.tar:2 is cut off")

    path.write_bytes(whole)
    write_shard_index(tmp_path)
    path.write_bytes(whole[: third + 100])
    shards = source(tmp_path)
    assert len(shards) == 4  # as shards.json says
    assert_bad(shards, 2, "shard", "is cut off")
    assert_bad(shards, 3, "shard", "holds 3 samples, and should hold 4")


def test_damage_within_a_shard_costs_what_lies_behind_it(tmp_path, source):
    with ShardWriter(tmp_path) as writer:
        for number in range(4):
            writer.write_caption(f"{number}", f"dog {number}")
    (path,) = tmp_path.glob("*.tar")
    data = bytearray(path.read_bytes())
    header = index_tar(path)[2].members["json"][0] - 512
    data[header : header + 512] = b"\xff" * 512
    path.write_bytes(data)
    shards = source(path)
    assert len(shards) == 2 and read(shards, 0).caption == "dog 0"
    assert_bad(shards, 1, "shard", "the damage of its shard .a damaged header")
    path.write_bytes(data[:header])  # cut between two members: only the missing end mark tells
    assert_bad(source(path), 1, "shard", "the damage of its shard .cut off")


@pytest.mark.parametrize("data", [b"", b"no tar file at all" * 99, b"\x1f\x8b\x08\x00" + b"x" * 999])
def test_a_file_that_is_no_tar_counts_as_one_bad_sample_or_as_the_index_says(tmp_path, source, data):
    write_tar(tmp_path / "good.tar", [("0.json", record(caption="a dog"))])
    (tmp_path / "bad.tar").write_bytes(data)
    shards = source(tmp_path)
    assert shards.groups == [1, 1]
    listed = [{"url": "bad.tar", "nsamples": 50}, {"url": "good.tar", "nsamples": 1}]
    (tmp_path / "shards.json").write_text(json.dumps({"shardlist": listed}))
    shards = source(tmp_path)
    assert shards.groups == [50, 1]
    for index in (0, 17, 49, 0):
        assert_bad(shards, index, "shard", "bad.tar")
    assert read(shards, 50).caption == "a dog"


@pytest.mark.parametrize(
    "members, cause, message",
    [
        ([("0.json", b"{")], "row", "json that cannot be read"),
        ([("0.json", b"[" * 90_000)], "row", "json that cannot be read"),
        ([("0.json", b"[1]")], "row", "holds a list"),
        ([("0.json", record(caption=" "))], "caption", "empty caption"),
        ([("0.json", record(caption=[7, " "]))], "caption", "caption of type NoneType"),
        ([("0.json", record(other=1))], "caption", "caption of type NoneType"),
        ([("0.json", record(caption="x" * 1024**2))], "row", "1,048,"),
        ([("0.png", b"x")], "row", "neither .json nor .txt, only png"),
        ([("0.json", record(caption="a")), ("0.target.png", b"x")], "image", "cannot be read"),
        ([("0.json", record(caption="a")), ("0.json", record(caption="b"))], "shard", "two members"),
        ([("0.json", record(edit="a"))], "row", "without the images 0.source"),
        ([("0.json", record(edit="a")), ("0.0.source.png", encode(make_image(1)))], "image", "no image 0.target"),
        ([("0.json", record(edit="")), *[(f"0.0.{n}.png", encode(make_image(1))) for n in ("source", "target")]],
         "caption", "empty caption"),
        ([("0.json", record(caption="a dog", entities=["dog"]))], "image", "no image 0"),
        ([("0.json", record(caption="a dog", entities="dog"))], "row", "not a list"),
        ([("0.json", record(caption="a dog", entities=["dog"] * 65))], "row", "not a list of at most 64"),
        ([("0.json", record(prompt=[]))], "row", "not a list of 1 to 64"),
        ([("0.json", record(prompt=["a", 7]))], "row", "neither text nor"),
        ([("0.json", record(prompt=[{"image": "../../etc/passwd"}]))], "row", "neither text nor"),
        ([("0.json", record(prompt=[{"image": "0"}]))], "image", "no image 0"),
    ],
)  # fmt: skip
def test_samples_that_do_not_follow_the_layout_are_bad(tmp_path, source, members, cause, message):
    shards = source(write_tar(tmp_path / "0.tar", members))
    assert_bad(shards, 0, cause, message)


def test_names_in_a_tar_are_never_paths(tmp_path, source):
    outside = tmp_path / "secret.json"
    outside.write_bytes(record(caption="secret"))
    link = tarfile.TarInfo("1.json")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    path = write_tar(
        tmp_path / "shards/0.tar",
        [("../../evil.json", record(caption="outside")), ("/etc/0.json", record(caption="absolute")), link],
    )
    before = sorted(tmp_path.rglob("*"))
    shards = source(path)
    assert [read(shards, index).caption for index in range(len(shards))] == ["outside", "absolute"]
    assert [file for file in sorted(tmp_path.rglob("*")) if "cache" not in str(file)] == before


def test_an_image_that_claims_gigabytes_is_not_read(tmp_path, source):
    huge = tarfile.TarInfo("0.target.png")
    huge.size = 80 * 1024**3
    path = tmp_path / "0.tar"
    caption = tarfile.TarInfo("0.json")
    data = record(caption="a dog")
    caption.size = len(data)
    with open(path, "wb") as file:
        file.write(caption.tobuf() + data.ljust(512, b"\0") + huge.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    assert_bad(source(path), 0, "shard", "cut off")


def test_bad_shards_do_not_stop_a_mixture(tmp_path, source):
    with ShardWriter(tmp_path, samples_per_shard=5) as writer:
        for number in range(20):
            writer.write_caption(f"{number}", f"dog {number}")
    write_shard_index(tmp_path)
    (tmp_path / "part-000001.tar").write_bytes(b"damaged" * 999)

    class Collate:
        def prepare(self, sample, generator):
            return sample.caption

        def __call__(self, rows):
            return {"rows": rows}

    dataset = MixtureDataset([source(tmp_path)], Collate(), batch_size=4, bucket_window=5)
    batches = [dataset[step] for step in range(5)]  # one epoch
    assert sum(batch["skipped"].get("shard", 0) for batch in batches) >= 5
    read_ = {row for batch in batches for row in batch["rows"]}
    assert {f"dog {number}" for number in (*range(5), *range(10, 20))} <= read_


# Where shards lie --------------------------------------------------------------------------------------------------


def test_all_missing_shards_are_named(tmp_path, source):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "0.tar", [("0.json", record(caption="a"))])
    with pytest.raises(ValueError, match="2 of the 3 shards of .* are missing: .*1.tar, .*2.tar"):
        source(tmp_path / "{0..2}.tar")
    listed = [{"url": f"{number}.tar", "nsamples": 1} for number in range(3)]
    (tmp_path / "shards.json").write_text(json.dumps({"shardlist": listed}))
    for where in (tmp_path, tmp_path / "shards.json"):
        with pytest.raises(ValueError, match="2 of the 3 shards that .* names are missing: .*1.tar, .*2.tar"):
            source(where)


def test_no_shards_found_is_an_error(tmp_path, source):
    for where in (tmp_path, tmp_path / "x.tar", tmp_path / "*.tar"):
        with pytest.raises(ValueError, match="No data found at"):
            source(where)
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match="No data found: the 1 shards at .* hold no samples"):
        source(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"shardlist": [{"url": "0.tar"}]}', '{"shardlist": [{"url": 1, "nsamples": 1}]}']
)
def test_an_index_of_another_form_is_refused(tmp_path, source, text):
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(ValueError, match="shards.json is not"):
        source(tmp_path)


@pytest.fixture
def remote(tmp_path):
    """A folder of three shards with two samples each and an index, and its URL."""
    pytest.importorskip("webdataset")
    with ShardWriter(tmp_path / "far-away", samples_per_shard=2) as writer:
        for number in range(6):
            writer.write_caption(f"{number}", f"dog {number}", make_image(10 * number))
    write_shard_index(tmp_path / "far-away")
    return tmp_path / "far-away", (tmp_path / "far-away").as_uri()


def test_remote_shards_are_fetched_when_they_are_needed_and_kept(tmp_path, source, remote):
    folder, url = remote
    for where in (f"{url}/part-00000{{0..2}}.tar", f"{url}/shards.json"):
        shards = source(where)
        assert shards.groups == [2, 2, 2]
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert [read(shards, index).caption for index in (2, 3)] == ["dog 2", "dog 3"]
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
    for path in folder.glob("*.tar"):
        path.unlink()
    assert shade(read(source(f"{url}/shards.json"), 3).target) == 30  # from the cache
    assert_bad(shards, 0, "shard", "part-000000.tar cannot be fetched")
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_remote_shards_without_an_index_are_fetched_and_counted(source, remote):
    folder, url = remote
    (folder / "shards.json").unlink()
    assert source(f"{url}/part-00000{{0..2}}.tar").groups == [2, 2, 2]


def test_shards_come_through_a_pipe(source, remote):
    folder, _ = remote
    shards = source(f"pipe:cat '{folder}/part-00000{{0..1}}.tar'")
    assert [read(shards, index).caption for index in range(4)] == ["dog 0", "dog 1", "dog 2", "dog 3"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http URLs with curl")
def test_shards_come_over_http(tmp_path, source, remote):
    folder, _ = remote
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        # of the fourth, which is not there, nothing tells the size
        shards = source(f"{url}/part-00000{{0..3}}.tar")
        assert shards.groups == [2, 2, 2, 1]
        assert shade(read(shards, 5).target) == 50
        assert_bad(shards, 6, "shard", "part-000003.tar cannot be fetched")
        (folder / "shards.json").unlink()
        assert source(f"{url}/part-00000{{0..2}}.tar").groups == [2, 2, 2]
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(remote):
    """The folder of `remote` behind HTTP: its URL, and the requests that came."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens http URLs with curl")
    folder, received = remote[0], []

    class Handler(QuietHandler):
        def send_head(self):
            received.append((self.command, self.path))
            return super().send_head()

        def end_headers(self):
            path = folder / self.path.strip("/").partition("?")[0]
            if path.is_file():
                self.send_header("ETag", hashlib.md5(path.read_bytes()).hexdigest())
            super().end_headers()

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def rewrite(folder, shade, lists=True):
    """Write the first shard anew, as long as before."""
    (folder / "part-000000.tar").unlink()
    with ShardWriter(folder / "new", samples_per_shard=2) as writer:
        for number in range(2):
            writer.write_caption(f"{number}", f"cat {number}", make_image(shade))
    shutil.move(folder / "new" / "part-000000.tar", folder / "part-000000.tar")
    shutil.rmtree(folder / "new")
    if lists:
        write_shard_index(folder)


def test_a_page_that_comes_in_place_of_a_shard_is_not_kept(tmp_path, source, remote, server):
    folder, (url, _) = remote[0], server
    content = (folder / "part-000000.tar").read_bytes()
    (folder / "part-000000.tar").write_text("<!DOCTYPE html><title>Please log in</title>" * 50)
    shards = source(f"{url}/shards.json")
    message = rf"{url}/part-000000.tar is not an uncompressed tar file: it begins with b'<!DOCTYPE html>"
    assert_bad(shards, 0, "shard", message)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    (folder / "part-000000.tar").write_bytes(content)  # logged in, the same run reads it
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"
    (folder / "part-000001.tar").write_bytes(b"")
    assert_bad(shards, 2, "shard", "part-000001.tar is not an uncompressed tar file: it begins with b''")


@pytest.mark.parametrize("listed", [True, False])
def test_a_shard_that_is_written_anew_is_fetched_anew_by_the_next_run(
    tmp_path, source, remote, server, listed
):
    folder, (url, received) = remote[0], server
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"
    before = len(received)
    again = source(f"{url}/shards.json")
    assert [read(again, index).caption for index in (0, 1, 0)] == ["dog 0", "dog 1", "dog 0"]
    assert received[before:].count(("GET", "/part-000000.tar")) == 0  # it is asked for once, and not sent
    assert received[before:].count(("HEAD", "/part-000000.tar")) == 1
    others = pickle.loads(pickle.dumps(again))  # a worker of the same run
    before = len(received)
    assert read(others, 1).caption == "dog 1" and len(received) == before
    rewrite(folder, shade=40, lists=listed)
    assert read(again, 0).caption == "dog 0"  # a run that has begun keeps its data
    assert read(source(f"{url}/shards.json"), 0).caption == "cat 0"
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1


def test_copies_are_kept_while_the_server_does_not_answer(source, remote, server, monkeypatch):
    url, _ = server
    index = f"{url}/part-000000.tar"
    assert read(source(index), 0).caption == "dog 0"

    def silent(*args, **kwargs):
        raise requests.ConnectionError("no answer")

    monkeypatch.setattr(requests, "head", silent)
    assert read(source(index), 1).caption == "dog 1"


def test_a_list_that_contradicts_a_copy_has_it_fetched_once(tmp_path, source, remote):
    """By any protocol: of a file nothing but shards.json says that it has changed."""
    folder, url = remote
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"
    rewrite(folder, shade=240)
    with ShardWriter(folder, prefix="extra", samples_per_shard=2) as writer:
        writer.write_caption("0", "a bird", make_image(10))
    path = folder / "part-000000.tar"
    path.write_bytes(path.read_bytes() + bytes(10240))  # of another length
    write_shard_index(folder)
    shards = source(f"{url}/shards.json")
    assert [read(shards, index).caption for index in (0, 1)] == ["a bird", "cat 0"]
    # a list that is wrong for good has it fetched no second time
    listed = json.loads((folder / "shards.json").read_text())
    for shard in listed["shardlist"]:
        shard["filesize"] = 7
    write_text(folder / "shards.json", json.dumps(listed))
    first = source(f"{url}/shards.json")
    read(first, 2)
    copies = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.tar")}
    read(source(f"{url}/shards.json"), 2)
    assert {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.tar")} == copies


def test_copies_of_earlier_versions_are_taken_over(tmp_path, source, remote, server):
    url, received = server
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"
    (facts,) = (path for path in (tmp_path / "cache").rglob("*.json") if path.parent.name == "shards")
    facts.unlink()
    before = len(received)
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"
    assert ("GET", "/part-000000.tar") not in received[before:] and facts.exists()
    facts.write_text("[")
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"


def test_a_command_that_fails_leaves_no_shard_behind(tmp_path, source, remote):
    folder, _ = remote
    shards = source(f"pipe:cat '{folder}/part-000000.tar'; exit 3")
    assert_bad(shards, 0, "shard", "cannot be fetched .*exit 3")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_what_a_killed_fetch_left_is_removed_by_the_next(tmp_path, source, remote):
    _, url = remote
    left = cache_path(tmp_path / "cache", "shards", f"{url}/part-000000.tar", suffix=".tar.x1.part")
    write_text(left, "half")
    write_text(left.with_name(f".{left.name}"), "half")
    assert read(source(f"{url}/shards.json"), 0).caption == "dog 0"
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_the_cache_keeps_to_its_size(tmp_path, source, remote):
    folder, url = remote
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    shards = source(f"{url}/shards.json", cache_bytes=2 * size)
    for index in (0, 2, 4, 0, 5, 3):
        assert read(shards, index).caption == f"dog {index}"
        assert len(list((tmp_path / "cache").rglob("*.tar"))) <= 2


def test_the_secret_of_a_signed_url_is_in_no_message(source, remote):
    pytest.importorskip("webdataset")
    shards = source("file:/nowhere/part-{0..1}.tar?signature=secret")
    with pytest.raises(BadSample) as caught:
        read(shards, 0)
    assert "secret" not in str(caught.value) and "secret" not in "".join(shards.files.names)


def test_a_source_can_be_sent_to_workers(one_of_each, source):
    shards = source(one_of_each)
    read(shards, 0)
    sent = pickle.loads(pickle.dumps(shards))
    assert not sent._indices
    assert read(sent, 0).caption == "a dog"


def test_without_webdataset_the_error_names_what_to_install(tmp_path, source, monkeypatch):
    write_tar(tmp_path / "0.tar", [("0.json", record(caption="a dog"))])
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert len(source(tmp_path / "*.tar")) == 1  # plain local shards need none
    with pytest.raises(ImportError, match=r"kosmos-g-diffusers\[train\]"):
        source(tmp_path / "{0..1}.tar")


def test_a_line_of_text_builds_a_source(one_of_each, tmp_path):
    shards = build_source(f"shards:{one_of_each}", word_dropout=1, cache_dir=tmp_path / "cache")
    assert isinstance(shards, ShardSource)
    assert read(shards, 1).prompt[-1] == "make it snow" and len(read(shards, 1).prompt) == 2


# Text as editors write it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["txt", "json"])
def test_byte_order_marks_tell_the_encoding_and_are_left_out(tmp_path, source, encoding, ending):
    text = "ein Hund für 3 €"
    content = text if ending == "txt" else json.dumps({"caption": text}, ensure_ascii=False)
    image = ("a.jpg", encode(make_image(10), "JPEG"))
    write_tar(tmp_path / "0.tar", [(f"a.{ending}", content.encode(encoding)), image])
    assert read(source(tmp_path), 0).prompt == (text,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("café".encode("cp1252"), "not UTF-8 .*Save it as UTF-8"),
        ("a dog".encode("utf-16-le"), "NUL characters, such as UTF-16"),
        (b"\xff\xfea", "not UTF-16-LE"),
        (b"\xef\xbb\xbf \n", "empty caption"),
    ],
)
def test_text_in_another_encoding_is_counted(tmp_path, source, content, message):
    write_tar(tmp_path / "0.tar", [("a.txt", content), ("a.jpg", encode(make_image(10), "JPEG"))])
    with pytest.raises(BadSample, match=message) as caught:
        read(source(tmp_path), 0)
    assert caught.value.cause == ("caption" if "empty" in message else "row")


def test_every_text_of_a_record_is_cleaned(tmp_path, source):
    image, mark = encode(make_image(10), "JPEG"), "\ufeff"
    edit = {"edit": f"{mark}make it snow", "input": f"{mark}a garden", "caption": "a garden in snow"}
    prompt = {"prompt": [f"{mark}a ", {"image": "0"}, "in snow"]}
    write_tar(
        tmp_path / "0.tar",
        [
            *(("a.json", record(**edit)), ("a.0.source.jpg", image), ("a.0.target.jpg", image)),
            *(("b.json", record(**prompt)), ("b.0.jpg", image)),
            ("c.json", b'{"caption": "a \\ud83d dog"}'),
        ],
    )
    shards = source(tmp_path, word_dropout=0)
    assert [part for part in read(shards, 0).prompt if isinstance(part, str)] == ["a garden", "make it snow"]
    assert [part for part in read(shards, 1).prompt if isinstance(part, str)] == ["a ", "in snow"]
    with pytest.raises(BadSample, match="half a character"):
        read(shards, 2)


def test_names_that_are_not_utf8_are_printable_in_keys_and_messages(tmp_path, source):
    members = [("caf\udce9\n.txt", b"a dog"), ("na\udcefve.txt", b"")]
    with tarfile.open(tmp_path / "0.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    shards = source(tmp_path)
    assert read(shards, 0).key.endswith(r"0.tar:caf\udce9\n")
    with pytest.raises(BadSample) as caught:
        read(shards, 1)
    for text in (read(shards, 0).key, str(caught.value), caught.value.message):
        assert text.isprintable() and text.encode("utf-8")


def test_where_members_lie_is_found_once_and_kept(tmp_path, source, monkeypatch):
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(5):
            writer.write_caption(f"k{number}", f"dog {number}", make_image(number))
    first = source(tmp_path / "shards")
    keys = [first.read(index, random.Random(0)).caption for index in range(5)]
    monkeypatch.setattr(
        "kosmos_g_diffusers.data.shard_files.index_tar", None
    )  # a second look at the headers would raise
    again = source(tmp_path / "shards")
    assert [again.read(index, random.Random(0)).caption for index in range(5)] == keys
    monkeypatch.undo()
    for kept in tmp_path.rglob("members/*.json"):
        kept.write_text('[["k", {"json": 7}, null]]')
    assert source(tmp_path / "shards").read(4, random.Random(0)).caption == "dog 4"
