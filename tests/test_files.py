import hashlib
import os
import stat

import pytest

from kosmos_g_diffusers.files import (
    first_line,
    hash_file,
    hash_folder,
    read_json,
    remove_partial_files,
    write_text,
    written_atomically,
)


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "below" / "a.txt"
    with written_atomically(path) as file:
        file.write(b"half")
        assert not path.exists() and all(name.startswith(".a.txt.") for name in os.listdir(path.parent))
    assert path.read_bytes() == b"half" and os.listdir(path.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(tmp_path, error):
    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(type(error)), written_atomically(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise error
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_partial_files_of_this_and_of_the_first_version_are_removed(tmp_path):
    for name in (".a.png.x1.part", "a.png.x2.part", ".b.png.x3.part", "a.png"):
        (tmp_path / name).write_bytes(b"")
    remove_partial_files(tmp_path, older_than=3600)
    assert len(os.listdir(tmp_path)) == 4
    remove_partial_files(tmp_path, "a.*")
    assert sorted(os.listdir(tmp_path)) == [".b.png.x3.part", "a.png"]


def test_json_that_cannot_be_read_is_named(tmp_path):
    write_text(tmp_path / "a.json", '{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    for content in ("{", "[" * 100_000, "\0"):
        write_text(tmp_path / "b.json", content)
        with pytest.raises(ValueError, match=r"b.json is not JSON .*\. Expected a list"):
            read_json(tmp_path / "b.json", "Expected a list.")
    with pytest.raises(ValueError, match=r"There is no file .*c.json\. Expected a list"):
        read_json(tmp_path / "c.json", "Expected a list.")


def test_hashes(tmp_path):
    write_text(tmp_path / "a" / "one", "x")
    write_text(tmp_path / "a" / ".hidden", "y")
    assert hash_file(tmp_path / "a" / "one") == hashlib.sha256(b"x").hexdigest()
    before = hash_folder(tmp_path, ("a",))
    write_text(tmp_path / "a" / ".hidden", "z")
    assert hash_folder(tmp_path, ("a",)) == before
    (tmp_path / "a" / "one").rename(tmp_path / "a" / "two")
    assert hash_folder(tmp_path, ("a",)) != before


def test_first_line_of_an_error():
    assert first_line(ValueError("It failed. Badly.\nAt once.")) == "It failed. Badly"
    assert first_line(KeyError()) == "KeyError"
