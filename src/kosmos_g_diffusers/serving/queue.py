"""One run at a time, the others in a queue with an end: each has a ticket that tells its place and can be cancelled.

Whoever asks often waits longer, not the others: addresses take turns, and so do the sessions of an address; each has a share
of the places, and of an address's places some are kept for sessions that have had no turn lately. A run begins only while
somebody listens for its end.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

Job = Callable[["Ticket"], Any]

logger = logging.getLogger(__name__)

CAPACITY = 16  # runs that may wait, unless the user says otherwise
PER_SESSION = 2  # of them of one session
SHARE = 0.75  # of them of one address
KEPT = 0.25  # of its share, for those of its sessions that have had no turn lately
CLOSING = 10  # seconds that a run has for the step it is in
RECENT = 8  # runs whose length is the estimate of the next one's
LISTENER_COMES = 30.0  # seconds that a run waits for somebody to listen
LISTENER_BACK = 5.0  # seconds in which a listener may come back
LOOK = 0.2  # seconds between two looks for listeners
LINGER = 0.1  # share of the time of the last batch that the next one waits for those who were in it


class QueueFull(Exception):
    """As many runs are waiting as the queue holds, or as the session or the address may have."""


class Cancelled(BaseException):
    """Raised in a run that was cancelled. Like asyncio's it is not an Exception, so that what handles errors lets it pass."""


def _always():
    return True


@dataclass(frozen=True)
class Caller:
    """Who asks for a run.

    Args:
        session: what tells users apart: a session's name, or a token's.
        address: where the request came from, as `access.address_of` says.
        is_listening: whether somebody waits for the end of the run now.
    """

    session: str
    address: str = ""
    is_listening: Callable[[], bool] = _always


class Ticket:
    """A run, from its entry into the queue to its end. Any thread may read it; `cancel` may be called at any time."""

    state: str
    progress: Any
    result: Any
    error: BaseException | None
    ended: threading.Event
    caller: Caller | None
    joined: int

    def __init__(self, worker: "Worker", job: Any, caller: Caller | None = None):
        self._worker, self._job, self.caller = worker, job, caller
        self._cancelled = threading.Event()
        self._ending = threading.Lock()
        self._told = []  # functions to call at the end
        self.state = "waiting"  # then "running", then "done", "failed" or "cancelled"
        self.progress = None  # whatever the job last said of itself
        self.result = None  # what the job returned
        self.error = None  # the exception that it ended with
        self.ended = threading.Event()
        self.joined = 0  # number of the last run that began before it came
        self._heard = time.monotonic()  # when somebody listened last
        self._was_heard = False

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
        if self.is_cancelled():
            raise Cancelled

    def is_listened_to(self) -> bool:
        """Whether somebody waits for the end of the run now."""
        if self.caller is not None and not self.caller.is_listening():
            return False
        self._heard, self._was_heard = time.monotonic(), True
        return True

    def is_left(self) -> bool:
        """Whether nobody has listened for so long that nobody will."""
        if self.is_listened_to():
            return False
        patience = LISTENER_BACK if self._was_heard else LISTENER_COMES
        return time.monotonic() - self._heard > patience

    @property
    def job(self) -> Any:
        """What was put into the queue, until the run has ended."""
        return self._job

    def when_ended(self, call: Callable[[], Any]) -> None:
        """Have a function called at the end, by the thread that ends it; at once if that was before."""
        with self._ending:
            if not self.ended.is_set():
                self._told.append(call)
                return
        call()

    def is_cancelled(self) -> bool:
        """Whether `check` would raise."""
        return self._cancelled.is_set() or self.is_left()

    def finish(self, result: Any) -> None:
        """End a run of a batch with its result."""
        self.result = result
        self._end("done")

    def fail(self, error: BaseException) -> None:
        """End a run of a batch with what went wrong."""
        self.error = error
        self._end("cancelled" if isinstance(error, Cancelled) else "failed")

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
        with self._ending:
            if self.ended.is_set():
                return
            self.state = state
            self._job = None  # frees the images that it holds
            self.ended.set()
        for call in self._told:
            call()


class Worker:
    """A thread that runs jobs one after the other.

    Args:
        capacity: runs that may wait, besides the one that is running.
        per_session: of them of one session.
    """

    capacity: int
    per_session: int

    def __init__(self, capacity: int, name: str = "worker", per_session: int = PER_SESSION):
        self.capacity, self.per_session = capacity, per_session
        self._waiting = deque()
        self._durations = deque(maxlen=RECENT)
        self._turns = {}  # address, or address and session -> number of the last run that began
        self._begun = 0
        self._condition = threading.Condition()
        self._closed = False
        self._running = None
        # a daemon: Ctrl-C must not wait for a run
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, caller: Caller | None = None) -> Ticket:
        """Put a job, a function of its ticket, into the queue and return the ticket. Raises QueueFull."""
        with self._condition:
            ticket = Ticket(self, job, caller)
            self._drop_left()
            self._check_room(ticket)
            ticket.joined = self._begun
            self._waiting.append(ticket)
            self._condition.notify()
        return ticket

    def _check_room(self, ticket):
        # with nothing running, the first that waits is about to run
        spare = not self._is_busy()
        if self._closed:
            raise QueueFull("The queue is full: the server is ending.")
        caller = ticket.caller
        # what nobody listens for takes no place from those who do, but has an end too
        is_heard = ticket.is_listened_to()
        waiting = [other for other in self._waiting if other.is_listened_to() == is_heard]
        if (count := len(waiting) - spare) >= self.capacity:
            raise QueueFull(f"The queue is full: {count} runs are waiting. Try again later.")
        if caller is None:
            return
        own = _count(self._waiting, session=caller.session) - spare
        if own >= self.per_session:
            raise QueueFull(
                f"The queue is full for you: {own} of your runs are waiting. Wait for one to end."
            )
        same = _count(waiting, address=caller.address) - spare
        if same >= self._share_of(ticket):
            raise QueueFull(
                f"The queue is full for your address: {same} runs of it are waiting. Try again later."
            )

    def _share_of(self, ticket):
        """Places of an address that a session of it may take a place among: all of them only if it has had none of the last
        runs, so that who was refused finds a place before those who ask again at once."""
        share = max(self.per_session, round(SHARE * self.capacity))
        last = self._turns.get(_turn_keys(ticket)[-1], 0)  # 0 for a session that has had none
        if last > max(0, self._begun - share):
            return max(self.per_session, share - round(KEPT * share))
        return share

    def place_of(self, ticket: Ticket) -> int:
        with self._condition:
            if ticket not in self._waiting:
                return 0
            return self._order().index(ticket) + 1

    def seconds_until(self, ticket: Ticket) -> float | None:
        """Estimate of how long a ticket has to wait, from the last runs; None without any."""
        with self._condition:
            if not self._durations or ticket not in self._waiting:
                return None
            before = self._order().index(ticket) + self._is_busy()
            return before * sum(self._durations) / len(self._durations)

    def forget(self, ticket: Ticket) -> None:
        with self._condition:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket._end("cancelled")

    def _is_busy(self):
        return not all(ticket.ended.is_set() for ticket in self._under_way())

    def _under_way(self):
        return [] if self._running is None else [self._running]

    def close(self) -> None:
        """Cancel every run and end the thread; one that loads a model is not waited for."""
        with self._condition:
            self._closed = True
            tickets = [*self._waiting, *self._under_way()]
            self._condition.notify()
        for ticket in tickets:
            ticket.cancel()
        self._thread.join(timeout=CLOSING)

    def _order(self):
        """Those who wait, in the order in which they will begin: whoever had their last turn earliest."""
        turns, number = dict(self._turns), self._begun
        waiting, order = list(self._waiting), []
        while waiting:
            ticket = min(waiting, key=lambda ticket: _last_turns(ticket, turns))
            waiting.remove(ticket)
            order.append(ticket)
            number += 1
            turns.update(dict.fromkeys(_turn_keys(ticket), number))
        return order

    def _next(self):
        """The next run that somebody listens for; None if there is none."""
        return next((ticket for ticket in self._order() if ticket.is_listened_to()), None)

    def _drop_left(self):
        for ticket in [ticket for ticket in self._waiting if ticket.is_left()]:
            self._waiting.remove(ticket)
            ticket._end("cancelled")

    def _take(self):
        """Wait for the next run; None at the end."""
        with self._condition:
            self._running = None
            while not self._closed:
                self._drop_left()
                if (ticket := self._next()) is not None:
                    break
                self._condition.wait(LOOK if self._waiting else None)
            if self._closed:
                return None
            present = {key for other in self._waiting for key in _turn_keys(other)}
            # who has nothing waiting may be forgotten, but not at once: they are about to ask again
            if len(self._turns) > 1000:
                self._turns = {key: turn for key, turn in self._turns.items() if key in present}
            self._begin(ticket)
            self._running = ticket
            return ticket

    def _begin(self, ticket):
        self._waiting.remove(ticket)
        self._begun += 1
        self._turns.update(dict.fromkeys(_turn_keys(ticket), self._begun))

    def _work(self):
        while (ticket := self._take()) is not None:
            started = time.monotonic()
            ticket._run()
            if ticket.state == "done":
                self._durations.append(time.monotonic() - started)
            elif ticket.state == "failed":
                logger.info("a run failed", exc_info=ticket.error)


class BatchWorker(Worker):
    """A thread that carries out jobs, of any type, together with those of the same kind that wait.

    Nothing waits while nothing else is there: a batch is what came while the last one was carried out. Only after a batch of
    several the thread waits a moment for their clients to ask again, as most do at once.

    Args:
        carry_out: function of a list of tickets, which ends each of them (`finish`, `fail`).
        kind_of: job -> what the jobs of a batch have in common.
        size_of: job -> places that it takes.
        most: places of a batch; a larger job is a batch of its own.
        capacity, per_session: as of Worker.
    """

    most: int

    def __init__(
        self,
        carry_out: Callable[[list[Ticket]], None],
        kind_of: Callable[[Any], Hashable],
        size_of: Callable[[Any], int],
        most: int,
        capacity: int,
        name: str = "worker",
        per_session: int = PER_SESSION,
    ):
        self._carry_out, self._kind_of, self._size_of, self.most = carry_out, kind_of, size_of, most
        self._batch, self._last_took = [], 0.0
        super().__init__(capacity, name, per_session)

    def waiting(self) -> Sequence[Ticket]:
        """Those who wait and are listened to, in the order in which they will begin."""
        with self._condition:
            return [ticket for ticket in self._order() if ticket.is_listened_to()]

    def count_waiting(self) -> int:
        return len(self._waiting)

    def is_alive(self) -> bool:
        """Whether the thread is there, which ends only with the process."""
        return self._thread.is_alive()

    def _under_way(self):
        return self._batch or super()._under_way()

    def _take_batch(self):
        before = len(self._batch)
        with self._condition:
            self._batch = []
            if before > 1 and not self._closed:
                several = LINGER * self._last_took
                self._condition.wait_for(lambda: len(self._waiting) >= before or self._closed, several)
        if (first := self._take()) is None:
            return []
        kind, room = self._kind_of(first.job), self.most - self._size_of(first.job)
        with self._condition:
            batch = [first]
            for ticket in self._order():
                job = ticket.job
                if job is None or not ticket.is_listened_to() or self._kind_of(job) != kind:
                    continue
                if self._size_of(job) <= room:
                    room -= self._size_of(job)
                    self._begin(ticket)
                    batch.append(ticket)
            self._batch = batch
        return batch

    def _work(self):
        while batch := self._take_batch():
            started = time.monotonic()
            for ticket in batch:
                ticket.state = "running"
            try:
                self._carry_out(batch)
            except BaseException as error:  # noqa: BLE001  as in a run
                for ticket in batch:
                    ticket.fail(error)
            self._last_took = time.monotonic() - started
            self._durations.append(self._last_took)


def _count(tickets, **given):
    """How many tickets have a caller with these values."""
    callers = [ticket.caller for ticket in tickets if ticket.caller is not None]
    return sum(all(getattr(caller, name) == value for name, value in given.items()) for caller in callers)


def _turn_keys(ticket):
    """Addresses take turns first, then their sessions; what the server itself asks for comes before them."""
    caller = ticket.caller
    return () if caller is None else ((caller.address,), (caller.address, caller.session))


def _last_turns(ticket, turns):
    """Numbers of the last runs of a ticket's address and session. Who is new had their last turn just before they came:
    a new session for each run must bring nothing."""
    return [turns.get(key, ticket.joined - 0.5) for key in _turn_keys(ticket)]
