"""The thread that draws for a service: what waits is drawn together (`batches`), and a model that fails to load is tried again."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..serving.errors import FieldError, at, unexpected
from ..serving.models import Models
from ..serving.queue import BatchWorker, Caller, Cancelled, QueueFull, Ticket
from .requests import Offer, Request, offer_of

logger = logging.getLogger(__name__)

BATCH = 8  # images that are drawn together
CAPACITY = 64  # requests that may wait
RETRY = 30.0  # seconds until a model that could not be loaded is tried again
LOOK = 0.05  # seconds between two looks at a model that is being loaded


class Unavailable(Exception):
    """There is no model to draw with now. Its text is a sentence."""


class Drawer:
    """Draws requests, those of one kind together.

    Args:
        models: Models, of which the first is served.
        batch: images of the model's own size that are drawn together, at most; of larger ones fewer.
        capacity: requests that may wait.
        told: is called with the number of images of each batch.
    """

    models: Models
    worker: BatchWorker
    told: Callable[[int], Any]

    def __init__(
        self,
        models: Models,
        batch: int = BATCH,
        capacity: int = CAPACITY,
        told: Callable[[int], Any] = lambda images: None,
    ):
        self.models, self.told = models, told
        self._tried = float("-inf")
        # one program of one user asks for many at once; addresses have their shares
        self.worker = BatchWorker(
            self._carry_out, _kind_of, _size_of, batch, capacity, "drawing", per_session=capacity
        )

    # The model -------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.models.default

    @property
    def state(self) -> tuple[str, str | None]:
        """("waiting", "loading", "ready" or "failed", what is wrong)."""
        return self.models.state, self.models.problem

    def start(self) -> None:
        """Begin to load the model; returns at once."""
        self._tried, self.models.state = time.monotonic(), "loading"
        self.worker.submit(None)

    def retry(self) -> None:
        """Try again if loading failed some time ago."""
        if self.models.state == "failed" and time.monotonic() - self._tried > RETRY:
            self.start()

    def close(self) -> None:
        self.worker.close()

    async def describe(self) -> Offer:
        """What the loaded model draws; waits while it is being loaded. Raises Unavailable."""
        models = self.models
        while models.state in ("waiting", "loading"):
            await asyncio.sleep(LOOK)
        if models.pipe is None:
            raise Unavailable(f"{models.problem} The service tries again.")
        return offer_of(models)

    # Requests --------------------------------------------------------------------------------------------------------

    async def prepare(self, request: Request) -> None:
        """Make the images that a request changes and is controlled by as small as they are drawn. Raises FieldError."""
        from .batches import prepare

        if request.is_drawn:
            await asyncio.to_thread(prepare, self.models, request)

    async def draw(self, request: Request, caller: Caller | None = None) -> Any:
        """[(PIL image, its settings)] of a request, or its two states (Q, D) if it is to be encoded alone; it was prepared.

        Raises:
            FieldError: it cannot be done as it was asked for.
            QueueFull: too many are waiting.
        """
        ticket = self.worker.submit(request, caller)
        try:
            await _end_of(ticket)
        finally:
            ticket.cancel()
        if ticket.state == "cancelled":
            raise QueueFull("The server is ending.")
        if isinstance(ticket.error, FieldError):
            raise ticket.error
        if isinstance(ticket.error, (ValueError, TypeError)):
            with at("prompt"):
                raise ticket.error
        if ticket.error is not None:
            raise FieldError("", unexpected(ticket.error)) from ticket.error
        return ticket.result

    def _carry_out(self, tickets: Sequence[Ticket]) -> None:
        from .batches import draw, encode

        if tickets[0].job is None:
            with contextlib.suppress(FieldError):  # which the state tells
                self.models.load()
            for ticket in tickets:
                ticket.finish(None)
            return
        self.models.load()
        jobs = {ticket.job: ticket for ticket in tickets}
        waiting = [ticket.job for ticket in self.worker.waiting()]
        encode(self.models, [*jobs, *filter(None, waiting)])
        for job, ticket in jobs.items():
            if job.error is not None:
                ticket.fail(job.error)
            elif not job.is_drawn:
                ticket.finish(job.encoded)
        left = [job for job, ticket in jobs.items() if not ticket.ended.is_set()]
        if not left:
            return

        def check():
            if all(jobs[job].is_cancelled() for job in left):
                raise Cancelled

        self.told(sum(job.settings.num_images for job in left))
        try:
            for job, result in draw(self.models, left, self.worker.most, check):
                if isinstance(result, Exception):
                    jobs[job].fail(result)
                else:
                    jobs[job].finish(result)
        except Cancelled as cancelled:
            for job in left:
                jobs[job].fail(cancelled)


def _kind_of(job):
    from .batches import kind_of

    return job if job is None else kind_of(job)


def _size_of(job):
    from .batches import size_of

    return 1 if job is None else size_of(job)


async def _end_of(ticket):
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def tell():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended.set)

    ticket.when_ended(tell)
    await ended.wait()
