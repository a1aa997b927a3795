"""One run, one owner: the lock of a run's folder, so that the same command started twice does not train twice.

RUN/.lock says in JSON who trains there: host, process, start. While the run lasts, the file is locked with flock, which the
system undoes however the process ends; and its time is renewed every RENEWED seconds, for file systems without locks and
those whose locks end at the machine.
"""

import errno
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
RENEWED = 30.0  # seconds between two renewals of the time stamp
DEAD = 300.0  # seconds without one after which a process without a lock counts as dead
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

_held: dict[str, "RunLock"] = {}  # of this process, by the path of the run's folder


def hold_run(run: str | Path, take_over: bool = False) -> "RunLock":
    """The lock of a run's folder, which must be there. A process that has it already gets it again.

    Args:
        take_over: a process that is known by its time stamp alone counts as dead at once, one whose lock is still there when it has
            not been heard of for DEAD seconds.

    Raises:
        ValueError: another process trains there; the message says which, and how to go on.
    """
    key = os.path.realpath(run)
    if key not in _held:
        _held[key] = RunLock(Path(key), take_over)
    return _held[key]


class RunLock:
    """The lock that `hold_run` gives.

    Attributes:
        is_ours: False from when another process has taken the run over (`--take-over`).
    """

    path: Path
    descriptor: int
    has_flock: bool
    owner: dict[str, Any]
    is_ours: bool

    def __init__(self, run: Path, take_over: bool):
        self.path, self.is_ours = run / NAME, True
        self._open()
        try:
            earlier = self._read()
            if self.has_flock is None:
                self._break(run, earlier, take_over)
            elif earlier and not take_over:
                self._check_dead(run, earlier)
            self.owner = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "flock": self.has_flock,
                "token": secrets.token_hex(8),
            }
            self._write(json.dumps(self.owner) + "\n")
            if not self.has_flock:
                self._check_race(run)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name="kosmos-g run lock", daemon=True).start()

    def release(self) -> None:
        """Give the run free. A second time does nothing."""
        if _held.pop(str(self.path.parent), None) is not self:
            return
        self._ended.set()
        with suppress(OSError):
            if self._read().get("token") == self.owner["token"]:
                self._write("")
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _open(self):
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self.has_flock = _flock(self.descriptor)

    def _break(self, run, earlier, take_over):
        """Leave the file to whoever has it locked, and lock a new one, if that process has not been heard of for long.

        Some file servers keep the locks of machines that have gone. ValueError otherwise.
        """
        is_silent = self._now() - os.fstat(self.descriptor).st_mtime >= DEAD
        if not (is_silent and take_over):
            advice = "Pass --take-over if it is gone: it has not been heard of for 5 minutes. " * is_silent
            raise ValueError(
                f"{_describe(run, earlier)} {advice}End that one first; this command then resumes the run."
            )
        os.close(self.descriptor)
        self.path.unlink(missing_ok=True)
        self._open()
        if self.has_flock is None:
            raise ValueError(f"{_describe(run, self._read())} It began at the same moment.")

    def _read(self):
        """Who holds the run, or did when it died; nothing for nobody, and for a record that cannot be read."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write(self, text):
        os.ftruncate(self.descriptor, 0)
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        os.write(self.descriptor, text.encode())
        os.fsync(self.descriptor)

    def _check_dead(self, run, earlier):
        """ValueError if the process that a record names may be alive, although we could lock its file, or nobody can."""
        age = self._now() - os.fstat(self.descriptor).st_mtime
        if age >= DEAD:
            return
        if self.has_flock and earlier.get("flock"):
            if earlier.get("host") == socket.gethostname() or not self._is_renewed(run, earlier):
                return
        raise ValueError(
            f"{_describe(run, earlier)} Its last sign of life is {max(0, age):.0f} s old, and it counts as dead after {DEAD:.0f}. "
            "End it first, or pass --take-over if it is gone."
        )

    def _is_renewed(self, run, earlier):
        """Whether the time stamp moves: some file systems keep the locks of one machine from the others."""
        print(
            f"kosmos-g: {run} was locked on {earlier.get('host')}; waiting up to {2 * RENEWED:.0f} s to see whether that run lives.",
            file=sys.stderr,
        )
        before, end = os.fstat(self.descriptor).st_mtime_ns, time.monotonic() + 2 * RENEWED
        while time.monotonic() < end:
            time.sleep(min(1.0, RENEWED / 10))
            if self.path.stat().st_mtime_ns != before:
                return True
        return False

    def _now(self):
        """The time by the clock that stamps the files here, which may be another machine's."""
        with suppress(OSError), tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".part") as file:
            return os.fstat(file.fileno()).st_mtime
        return time.time()

    def _check_race(self, run):
        """Without locks two processes may have written at once; the one whose record stays has won."""
        time.sleep(min(2.0, RENEWED / 10))
        now = self._read()
        if now.get("token") != self.owner["token"]:
            raise ValueError(f"{_describe(run, now)} It began at the same moment.")

    def _renew(self):
        while not self._ended.wait(RENEWED):
            with suppress(OSError):  # a network that may be well again next time
                owner = self._read()
                if owner and owner.get("token") != self.owner["token"]:
                    self.is_ours = False
                    return
                os.utime(self.path)


def _flock(descriptor):
    """True if the file is locked now, False where there are no locks, None if another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _describe(run, owner):
    """A sentence about who has a run."""
    who = "Another process"
    if owner:
        who = f"Process {owner.get('process')} on {owner.get('host')}, started {owner.get('started')},"
    return f"{who} trains in {run}."


def _close_in_child():
    """A forked child, such as a reader of data, would hold the lock beyond the death of the run."""
    for lock in _held.values():
        with suppress(OSError):
            os.close(lock.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
