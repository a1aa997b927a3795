import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kosmos_g_diffusers import files
from kosmos_g_diffusers.files import (
    check_output_file,
    check_output_folder,
    first_line,
    hash_file,
    hash_folder,
    is_full_disk,
    partial_folder,
    read_json,
    remove_partial_files,
    write_text,
    written_atomically,
)

ALONE = {
    **os.environ,
    "PYTHONPATH": str(Path(files.__file__).parent),
}  # imports the module without the package


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


def test_file_that_is_being_written_is_not_taken_for_abandoned(tmp_path):
    with written_atomically(tmp_path / "a.txt") as file:
        remove_partial_files(tmp_path)
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_bytes() == b"whole"


def test_file_of_a_process_that_was_killed_is_removed_by_the_next_check(tmp_path):
    script = (
        "import os, signal, sys; from files import written_atomically\n"
        "with written_atomically(sys.argv[1]) as file: file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    output = tmp_path / "a[1].txt"
    subprocess.run([sys.executable, "-c", script, str(output)], env=ALONE)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a[1].txt.") and left.endswith(".part")
    check_output_file(tmp_path / "a.txt")  # another's
    assert os.listdir(tmp_path) == [left]
    check_output_file(output)
    assert os.listdir(tmp_path) == []


def test_name_as_long_as_it_can_be_is_written(tmp_path):
    path = tmp_path / ("ö" * 125 + ".png")
    with written_atomically(path) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [path.name]


def test_error_of_writing_names_the_file_and_not_a_hidden_one(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'$"), written_atomically(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="other.txt'$"), written_atomically(path):
        open(tmp_path / "other.txt")
    with pytest.raises(IsADirectoryError, match=r"'.*/b'$"):
        (tmp_path / "b").mkdir()
        write_text(tmp_path / "b", "x")
    assert os.listdir(tmp_path) == ["b"]


def test_full_disk_is_told_from_other_errors(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (full, OSError(errno.EDQUOT, "quota"), RuntimeError("I/O error: No space left on device")):
        assert is_full_disk(error) and is_full_disk(error, tmp_path)
    wrapped = RuntimeError("Checkpoint")
    wrapped.__cause__ = full
    assert is_full_disk(wrapped)
    for error in (OSError(errno.EACCES, "denied"), RuntimeError("other")):
        assert not is_full_disk(error) and not is_full_disk(error, tmp_path)
    # as numpy says it
    silent = OSError("1000000 requested and 131056 written")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.npy'$"):
        with written_atomically(tmp_path / "a.npy"):
            raise silent


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_full_disk_leaves_what_was_there(tmp_path):
    script = (
        "import resource, signal, sys; from files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(sys.argv[1], bytes(5000))\n"
        "except OSError as error: print(error)"
    )
    (tmp_path / "a.txt").write_text("before")
    command = [sys.executable, "-c", script, str(tmp_path / "a.txt")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=ALONE).stdout
    assert said.endswith(f"'{tmp_path / 'a.txt'}'\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder. Pass the path of a file"),
        (".", "is a folder"),
        ("folder", "is a folder"),
        ("folder/..", "is a folder"),
        ("folder/a.txt/", "is a folder"),
        ("missing/a.txt", "There is no folder 'missing' to write the output 'missing/a.txt' into"),
        ("file.txt/a.txt", "There is no folder 'file.txt' .*: it is a file"),
        ("a" * 252 + ".txt", "File name too long"),
        ("a/" * 3000 + "a.txt", "File name too long"),
        ("a\0b.txt", "null"),
        ("pipe.txt", "is a device or pipe"),
        ("a.png", "does not end in .txt"),
        ("/proc/a.txt", "no file can be made in '/proc'"),
    ],
)
def test_output_that_cannot_be_written_is_refused_by_its_name(tmp_path, monkeypatch, name, message):
    if name.startswith("/proc") and not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc")
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    write_text("file.txt", "x")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.txt")
    elif name == "pipe.txt":
        pytest.skip("there are no pipes")
    with pytest.raises(ValueError, match=message) as error:
        check_output_file(name, suffix=".txt")
    assert ".part" not in str(error.value) and len(str(error.value)) < 400
    assert sorted({*os.listdir(), "pipe.txt"}) == ["file.txt", "folder", "pipe.txt"]


def test_output_that_is_there_is_refused_unless_it_may_be_overwritten(tmp_path):
    write_text(tmp_path / "a.txt", "mine")
    assert check_output_file(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    with pytest.raises(FileExistsError, match=r"a.txt would be overwritten\. Pass --force"):
        check_output_file(tmp_path / "a.txt", overwrite=False)
    assert (tmp_path / "a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "has no name"),
        ("file.txt", "is a file"),
        ("file.txt/below", "cannot be made: .*file.txt is a file"),
        ("a" * 300, "File name too long"),
    ],
)
def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    write_text("file.txt", "x")
    with pytest.raises(ValueError, match=message):
        check_output_folder(name)
    assert check_output_folder("new/below/") == Path("new/below") and os.listdir() == ["file.txt"]


def test_weights_that_only_their_owner_could_read_get_the_mode_of_other_files(tmp_path):
    for name, mode in (("a.safetensors", 0o600), ("b/c.safetensors", 0o600), ("d.safetensors", 0o400)):
        write_text(tmp_path / name, "x")
        (tmp_path / name).chmod(mode)
    write_text(tmp_path / "other", "x")
    files.follow_umask(tmp_path)
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "b/c.safetensors", "other")]
    assert len(set(modes)) == 1
    assert stat.S_IMODE((tmp_path / "d.safetensors").stat().st_mode) == 0o400


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no folders")
def test_folder_of_a_process_that_was_killed_is_removed_by_the_next(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from files import partial_folder\n"
        "with partial_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], env=ALONE)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".model-notes").mkdir()
    with partial_folder(tmp_path / "model") as first, partial_folder(tmp_path / "model") as second:
        assert first.is_dir() and second.is_dir() and not left.exists()
    assert os.listdir(tmp_path) == [".model-notes"]


def test_error_that_is_its_own_cause_ends_the_look_for_a_full_disk(tmp_path):
    error, cause = ValueError("one"), ValueError("two")
    error.__cause__, cause.__context__ = cause, error
    assert not is_full_disk(error, tmp_path)
