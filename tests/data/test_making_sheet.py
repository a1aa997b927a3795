"""The contact sheet: what it shows of each kind of sample, and that nothing in it can act."""

import base64
import io
import re

import PIL.Image
import pytest

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.commands import data as data_command
from kosmos_g_diffusers.data import ShardWriter
from kosmos_g_diffusers.data.making import write_contact_sheet


def make_image(colour, size=(64, 48)):
    return PIL.Image.new("RGB", size, colour)


def shown(page):
    """The images of a page."""
    data = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    return [PIL.Image.open(io.BytesIO(base64.b64decode(part))) for part in data]


def colour(image):
    return max(zip(image.getpixel((5, 5)), ("red", "green", "blue"), strict=True))[1]


def test_composition_is_shown_with_its_things_named_and_marked(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write_composition(
            "a",
            "a dog's bed & a hat",
            make_image("red"),
            [("dog", make_image("lime"), make_image("blue")), ("hat", make_image("lime"), None)],
        )

    page = write_contact_sheet(tmp_path, tmp_path / "sheet.html").read_text()

    assert [colour(image) for image in shown(page)] == ["red", "green", "blue", "green"]
    assert "a <mark>dog&#39;s</mark> bed &amp; a <mark>hat</mark>" in page
    assert re.findall(r"<figcaption>([^<]*)<br>", page) == ["target", "dog", "dog (cutout)", "hat"]
    assert "64 x 48" in page


def test_other_kinds_of_samples_are_shown(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write_caption("a", "a caption", make_image("red"))
        writer.write_caption("b", "words alone")
        writer.write_edit(
            "c",
            "make it snow",
            [(make_image("red"), make_image("blue"))] * 2,
            words="a garden",
            caption="snow",
        )
        writer.write_prompt("d", ["look at", make_image("lime")], caption="prompted")

    page = write_contact_sheet(tmp_path, tmp_path / "sheet.html").read_text()

    for text in ("a caption", "words alone", "make it snow", "a garden", "snow", "look at", "prompted"):
        assert text in page
    assert [colour(image) for image in shown(page)] == ["red", "red", "blue", "red", "blue", "green"]


def test_texts_of_a_stranger_stay_texts(tmp_path):
    evil = "<script>alert('x')</script><img src=http://example.com onerror=alert(1)> dog"
    with ShardWriter(tmp_path) as writer:
        writer.write_composition(
            "a", evil, make_image("red"), [("dog", make_image("red"), None)], note={"source": evil}
        )
        writer.write_edit("b", evil, [(make_image("red"), make_image("red"))], words=evil)
        writer.write_prompt("c", [evil, make_image("red")])

    page = write_contact_sheet(tmp_path, tmp_path / "sheet.html").read_text()

    assert "<script" not in page
    assert "<img src=http" not in page
    assert "default-src 'none'" in page


def test_samples_are_spread_over_all_shards(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=10) as writer:
        for number in range(40):
            writer.write_caption(f"k{number:02d}", f"number {number}")

    page = write_contact_sheet(tmp_path, tmp_path / "sheet.html", samples=4).read_text()

    assert [int(number) for number in re.findall(r"number (\d+)", page)] == [0, 13, 26, 39]
    assert "4 of 40 samples" in page


def test_damaged_samples_are_said_to_be(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        writer.write_caption("good", "a good one")
        writer.write_caption("bad", "a bad one", make_image("red"))
    shard = tmp_path / "part-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff", b"\0\0\0"))

    page = write_contact_sheet(tmp_path, tmp_path / "sheet.html").read_text()

    assert "a good one" in page
    assert "cannot be read" in page


def test_command_writes_the_page_and_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, data_command))))
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write_caption("a", "a dog", make_image("red"))

    assert cli.main(["data", "sheet", str(tmp_path / "shards"), "--output", str(tmp_path / "look.html")]) == 0

    assert capsys.readouterr().out.strip() == str(tmp_path / "look.html")
    assert len(shown((tmp_path / "look.html").read_text())) == 2  # as training draws it, and as it is stored
    assert cli.main(["data", "sheet", str(tmp_path / "nothing")]) == 2
    assert "No data found" in capsys.readouterr().err


def test_help_shows_every_flag_and_example(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", tuple(dict.fromkeys((*cli.COMMANDS, data_command))))
    for action in ([], ["compose"], ["instructpix2pix"], ["sheet"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["data", *action, "--help"])
        assert end.value.code == 0
    text = capsys.readouterr().out
    assert "Salesforce/blip2-opt-2.7b" in text
    assert "--process-index" in text
