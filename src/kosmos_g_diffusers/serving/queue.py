"""One run at a time, the others in a queue with an end: each has a ticket that tells its place and can be cancelled."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Job = Callable[["Ticket"], Any]

logger = logging.getLogger(__name__)

CAPACITY = 16  # runs that may wait, unless the user says otherwise
CLOSING = 10  # seconds that a run has for the step it is in
RECENT = 8  # runs whose length is the estimate of the next one's


class QueueFull(Exception):
    """As many runs are waiting as the queue holds."""


class Cancelled(BaseException):
    """Raised in a run that was cancelled. Like asyncio's it is not an Exception, so that what handles errors lets it pass."""


class Ticket:
    """A run, from its entry into the queue to its end. Any thread may read it; `cancel` may be called at any time."""

    state: str
    progress: Any
    result: Any
    error: BaseException | None
    ended: threading.Event

    def __init__(self, worker: "Worker", job: Job):
        self._worker, self._job = worker, job
        self._cancelled = threading.Event()
        self.state = "waiting"  # then "running", then "done", "failed" or "cancelled"
        self.progress = None  # whatever the job last said of itself
        self.result = None  # what the job returned
        self.error = None  # the exception that it ended with
        self.ended = threading.Event()

    @property
    def place(self) -> int:
        """1 for the next run of those that wait; 0 for any that waits no longer."""
        return self._worker.place_of(self)

    def cancel(self) -> None:
        """End the run: at once while it waits, and where it next calls `check` while it runs."""
        self._cancelled.set()
        self._worker.forget(self)

    def check(self) -> None:
        """Raises Cancelled if the run was cancelled; the job calls it as often as it can stop."""
        if self._cancelled.is_set():
            raise Cancelled

    def _run(self):
        self.state = "running"
        try:
            self.check()
            self.result = self._job(self)
            self._end("done")
        except Cancelled:
            self._end("cancelled")
        except Exception as error:  # noqa: BLE001  the thread must live on; whoever holds the ticket raises it
            self.error = error
            self._end("failed")

    def _end(self, state):
        self.state = state
        self._job = None  # frees the images that it holds
        self.ended.set()


class Worker:
    """A thread that runs jobs one after the other.

    Args:
        capacity: runs that may wait, besides the one that is running.
    """

    capacity: int

    def __init__(self, capacity: int, name: str = "worker"):
        self.capacity = capacity
        self._waiting = deque()
        self._durations = deque(maxlen=RECENT)
        self._condition = threading.Condition()
        self._closed = False
        self._running = None
        # a daemon: Ctrl-C must not wait for a run
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Ticket:
        """Put a job, a function of its ticket, at the end of the queue and return the ticket. Raises QueueFull."""
        with self._condition:
            # with nothing running, the first that waits is about to run
            room = self.capacity + (not self._is_busy())
            if self._closed or len(self._waiting) >= room:
                raise QueueFull(f"The queue is full: {len(self._waiting)} runs are waiting. Try again later.")
            ticket = Ticket(self, job)
            self._waiting.append(ticket)
            self._condition.notify()
        return ticket

    def place_of(self, ticket: Ticket) -> int:
        with self._condition:
            return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def seconds_until(self, ticket: Ticket) -> float | None:
        """Estimate of how long a ticket has to wait, from the last runs; None without any."""
        with self._condition:
            if not self._durations or ticket not in self._waiting:
                return None
            before = self._waiting.index(ticket) + self._is_busy()
            return before * sum(self._durations) / len(self._durations)

    def forget(self, ticket: Ticket) -> None:
        with self._condition:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket._end("cancelled")

    def _is_busy(self):
        return self._running is not None and not self._running.ended.is_set()

    def close(self) -> None:
        """Cancel every run and end the thread; one that loads a model is not waited for."""
        with self._condition:
            self._closed = True
            tickets = [*self._waiting, *([self._running] if self._running else [])]
            self._condition.notify()
        for ticket in tickets:
            ticket.cancel()
        self._thread.join(timeout=CLOSING)

    def _work(self):
        while True:
            with self._condition:
                self._running = None
                self._condition.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = self._waiting.popleft()
            started = time.monotonic()
            self._running._run()
            if self._running.state == "done":
                self._durations.append(time.monotonic() - started)
            elif self._running.state == "failed":
                logger.info("a run failed", exc_info=self._running.error)
