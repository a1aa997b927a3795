# ruff: noqa: F811  fixtures are imported, and used by the names of arguments
import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from support.training_runs import (  # noqa: F401  fixtures
    FORK,
    ToySource,
    ToyStage,
    dataset,
    fresh_accelerator,
    run_processes,
    settings,
    weights,
)

from kosmos_g_diffusers.training import TrainingStopped, lock, train
from kosmos_g_diffusers.training.lock import NAME, hold_run


def train_toy(config, pause=0.0, **options):
    source = ToySource(pause=pause)
    return train(config, ToyStage(), dataset(config, source=source), progress_bar=False, **options)


def start_run(config, pause=0.02):
    """A child that trains, with its lock taken."""
    child = FORK.Process(target=train_toy, args=(config, pause))
    child.start()
    wait_until(lambda: (Path(config.output) / "log.jsonl").exists())
    return child


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_same_command_started_twice_is_refused_and_the_first_ends_as_if_alone(tmp_path):
    config = settings(tmp_path / "run", steps=12, save_every=1)
    first = start_run(config)
    hidden = tmp_path / "run" / ".checkpoint-00000099.partial"
    hidden.mkdir()  # as the first run has while it writes
    words = (
        rf"^Process {first.pid} on {socket.gethostname()}, started 20.* trains in .*run\. End that one first"
    )
    with pytest.raises(ValueError, match=words):
        train_toy(config)
    with pytest.raises(ValueError, match=words):
        train_toy(config.replace(take_over=True))  # it is alive: the system says so
    assert hidden.is_dir()
    first.join()
    assert first.exitcode == 0
    alone = train_toy(settings(tmp_path / "alone", steps=12, save_every=1))
    expected = weights(alone)
    given = weights(tmp_path / "run" / alone.name)
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_run_of_a_process_that_was_killed_is_free_at_once(tmp_path):
    """Readers of data, which live a little longer, do not hold it."""
    config = settings(tmp_path / "run", steps=400, save_every=1, workers=1)
    first = start_run(config)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with hold_run(config.output):
        pass


def test_lock_says_who_trains_and_is_empty_afterwards(tmp_path):
    with hold_run(tmp_path) as held:
        owner = json.loads((tmp_path / NAME).read_text())
        assert (owner["host"], owner["process"]) == (socket.gethostname(), os.getpid())
        assert hold_run(tmp_path) is held  # as a notebook does
    assert (tmp_path / NAME).read_text() == ""
    held.release()
    with hold_run(tmp_path) as again:
        assert again is not held


def test_run_that_cannot_begin_gives_the_folder_free(tmp_path):
    config = settings(tmp_path, steps=2)
    with pytest.raises(IndexError):
        train(config, ToyStage(), [], progress_bar=False)
    child = FORK.Process(target=train_toy, args=(config,))
    child.start()
    child.join()
    assert child.exitcode == 0


def hold_until_told(folder, says):
    with hold_run(folder):
        says.put("held")
        says.get()


def test_lock_of_a_machine_that_has_gone_is_taken_over_when_it_is_said_so(tmp_path):
    """As file servers keep it: the file is locked, and nobody renews its time."""
    says = FORK.Queue()
    owner = FORK.Process(target=hold_until_told, args=(tmp_path, says))
    owner.start()
    assert says.get() == "held"
    then = time.time() - 301
    os.utime(tmp_path / NAME, (then, then))
    with pytest.raises(ValueError, match=rf"^Process {owner.pid} on .*Pass --take-over if it is gone"):
        hold_run(tmp_path)
    with hold_run(tmp_path, take_over=True):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
        says.put("end")
        owner.join()
        # it leaves alone what is not its own
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def refused(config, words):
    with pytest.raises(ValueError, match=words):
        train_toy(config)


def test_all_processes_of_a_run_are_refused_alike(tmp_path):
    config = settings(tmp_path / "run", steps=8)
    Path(config.output).mkdir()
    with hold_run(config.output):
        words = f"Process {os.getpid()} on .* trains in"
        assert run_processes(refused_together, config, words) == [0, 0]


def refused_together(config, words):
    assert PartialState(cpu=True).num_processes == 2
    refused(config, words)


# Where there are no locks, or locks end at the machine -----------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch):
    def refuses(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuses)
    monkeypatch.setattr(lock, "RENEWED", 0.2)


def write_owner(folder, seconds_ago, host=None, flock=False):
    """The lock of a process that lived until then."""
    owner = {"host": host or "elsewhere", "process": 7, "started": "2026-01-01", "flock": flock, "token": "t"}
    (folder / NAME).write_text(json.dumps(owner))
    then = time.time() - seconds_ago
    os.utime(folder / NAME, (then, then))


def test_without_locks_a_fresh_time_stamp_is_refused(tmp_path, no_locks):
    write_owner(tmp_path, 200)
    words = r"^Process 7 on elsewhere, started 2026-01-01, trains in .* is 20\d s old.* dead after 300\. .*--take-over"
    with pytest.raises(ValueError, match=words):
        hold_run(tmp_path)
    hold_run(tmp_path, take_over=True).release()
    write_owner(tmp_path, 301)
    hold_run(tmp_path).release()


def test_without_locks_the_time_stamp_is_renewed_and_a_run_that_was_taken_over_stops(tmp_path, no_locks):
    with hold_run(tmp_path) as held:
        before = (tmp_path / NAME).stat().st_mtime_ns
        wait_until(lambda: (tmp_path / NAME).stat().st_mtime_ns > before)
        write_owner(tmp_path, 0)
        wait_until(lambda: not held.is_ours)
    assert json.loads((tmp_path / NAME).read_text())["process"] == 7  # it is the other's now


def test_run_that_was_taken_over_writes_nothing_more(tmp_path, no_locks):
    config = settings(tmp_path, steps=500, save_every=500)

    class TakenOver(ToyStage):
        def forward(self, batch):
            if self.passes == 2:
                write_owner(tmp_path, 0)
            time.sleep(0.01)
            return super().forward(batch)

    with pytest.raises(TrainingStopped, match="Another process has taken over"):
        train(config, TakenOver(), dataset(config), progress_bar=False)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_without_locks_the_one_whose_record_stays_has_won(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: write_owner(tmp_path, 0))
    with pytest.raises(ValueError, match="Process 7 .*at the same moment"):
        hold_run(tmp_path)


def test_locks_that_end_at_the_machine(tmp_path, monkeypatch, capsys):
    """One that died elsewhere is not renewed; one that lives there is."""
    monkeypatch.setattr(lock, "RENEWED", 0.2)
    write_owner(tmp_path, 1, socket.gethostname(), flock=True)
    hold_run(tmp_path).release()
    assert not capsys.readouterr().err  # the lock alone tells
    write_owner(tmp_path, 1, flock=True)
    hold_run(tmp_path).release()
    assert "locked on elsewhere; waiting" in capsys.readouterr().err
    write_owner(tmp_path, 1, flock=True)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (os.utime(tmp_path / NAME), sleep(seconds)))
    with pytest.raises(ValueError, match="Process 7 on elsewhere.*--take-over"):
        hold_run(tmp_path)


def test_record_that_is_none_is_nobody_s(tmp_path):
    for text in ("", "{", "[1]", "\0" * 20):
        (tmp_path / NAME).write_text(text)
        hold_run(tmp_path).release()
