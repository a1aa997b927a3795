"""SIGTERM and Ctrl-C during a run: remembered until the step is done, obeyed while data is waited for, known to all its processes.

A process that has its data waits in C for those that have none, where no handler of Python runs. So a thread receives its signals
and writes them into the run's folder, which all processes share, and interrupts its own process for those of others.
"""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch

from ..files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

STOP_FILE = ".stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PAUSE = 1.0  # seconds between two looks at the file


class StoppedWaiting(BaseException):
    """A signal came while the run waited for data; no `except Exception` on the way may take it."""


class StopSignal:
    """SIGTERM and Ctrl-C, remembered until the step is done; a second Ctrl-C stops at once.

    Args:
        run: folder of a run of several processes, which tell each other there; None is for one process alone.

    Attributes:
        signal: number of what came, 0 if nothing did.
    """

    run: Path | None
    signal: int
    before: dict[int, Any]
    waits: bool

    def __init__(self, run: Path | None = None):
        self.run = run if hasattr(signal, "pthread_kill") else None

    def __enter__(self) -> Self:
        self.signal, self.before, self.waits, self._thread = 0, {}, False, None
        for number in SIGNALS:
            try:
                self.before[number] = signal.signal(number, self._receive)
            except ValueError:  # signals reach the main thread of a program only
                return self
        if self.run is not None:
            self._inbox, self._outbox = socket.socketpair()
            self._outbox.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._outbox.fileno())
            self._thread = threading.Thread(target=self._tell_and_listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            # ends the thread; closing would not: workers have the socket as well
            self._outbox.shutdown(socket.SHUT_WR)
            self._thread.join()
            self._outbox.close()
            self._inbox.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = int(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.waits:
            self.waits = False
            raise StoppedWaiting

    def _tell_and_listen(self):
        """Until a signal comes, here or in the file: wait for it, and pass it on."""
        self._inbox.settimeout(PAUSE)
        while True:
            numbers = b""
            with suppress(TimeoutError):
                numbers = self._inbox.recv(64)
                if not numbers:  # the run is at its end
                    return
            with suppress(OSError):  # of the disk: then the others may not know
                if self._pass_on([number for number in SIGNALS if number in numbers]):
                    break
        self._inbox.settimeout(None)
        while self._inbox.recv(64):  # until the end of the run: it is said once
            pass

    def _pass_on(self, own):
        """Write a signal of this process into the file, or give it the one that is there; whether there was one."""
        path = self.run / STOP_FILE
        if own:
            write_text(path, str(int(own[0])))
            return True
        if not path.exists():
            return False
        told = path.read_text(encoding="utf-8").strip()
        number = next((number for number in SIGNALS if str(int(number)) == told), signal.SIGTERM)
        signal.pthread_kill(threading.main_thread().ident, number)
        return True

    @contextmanager
    def waiting(self, is_interruptible: bool) -> Iterator[None]:
        """Context of waiting for data, between two steps: a signal ends it, however long it would take."""
        try:
            self.waits = is_interruptible
            if is_interruptible and self.signal:
                raise StoppedWaiting
            yield
        finally:
            self.waits = False

    def agreed(self, accelerator: "Accelerator") -> bool:
        """Whether any process was told to stop: all save together, and all end as the one that was."""
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
            self.signal = int(numbers.max())
        return self.signal > 0

    def take_effect(self) -> None:
        """End the program as the signal would have."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
