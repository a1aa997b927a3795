"""What a page or an HTTP service offers, without either: runs are queued, carried out, and told of while they last."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..provenance import MARKED, Marker
from .errors import FieldError, at, unexpected
from .images import DECODING, image_file_size, open_image_file
from .job import Drawing, check_side, finished_images
from .libraries import controlling
from .queue import CAPACITY, Caller, Job, QueueFull, Ticket, Worker
from .store import Store

if TYPE_CHECKING:
    from ..generation.settings import ControlInput, GenerationSettings
    from .models import Models
    from .session import Session

POLL = 0.1  # seconds between two looks at a run
QUICK_POLL = 0.01  # the first of them
READING = 64  # what may wait to be read from files
READING_PER_SESSION = 8  # a page asks for several things at once
# seconds after which a look is told even if nothing has changed, or a closed page would go unnoticed
PATIENCE = 1.0


class Service:
    """
    Args:
        models: Models.
        store: Store.
        capacity: runs that may wait for the one that is running.
        marker: a `provenance.Marker` of the images that are drawn.
    """

    marker: Marker
    models: "Models"
    store: Store
    worker: Worker
    annotating: Worker
    reading: Worker

    def __init__(self, models: "Models", store: Store, capacity: int = CAPACITY, marker: Marker = MARKED):
        self.models, self.store, self.marker = models, store, marker
        self.worker = Worker(capacity, "drawing")
        self.annotating = Worker(capacity, "control images")  # on the CPU, while the other draws
        # files of users: looked at and decoded one at a time, in their turns
        self.reading = Worker(READING, "reading", READING_PER_SESSION)

    def start(self) -> None:
        """Begin to load the default model; returns at once."""
        self.models.state = "loading"
        self.worker.submit(lambda ticket: self.models.load())

    def close(self) -> None:
        self.worker.close()
        self.annotating.close()
        self.reading.close()

    async def draw(
        self,
        session: "Session",
        settings: "GenerationSettings",
        caller: Caller | None = None,
        maps: bool = False,
    ) -> AsyncIterator[Ticket]:
        """Yield the ticket of a run whenever there is news of it; the last time it has ended well or was cancelled.

        Args:
            settings: GenerationSettings, whose model, U-Net and LoRA are names of what is offered and whose files are kept.
            caller: whose run it is; None has no limit.
            maps: whether maps are written too, see `Drawing`.

        Raises:
            FieldError: what was asked for cannot be done.
        """
        drawing = Drawing(self.models, self.store, settings, self.marker, maps)
        ticket = _submit(self.worker, drawing, "run", caller)
        session.tickets.append(ticket)
        try:
            async for _ in _news(ticket):
                yield ticket
            session.remember(finished_images(ticket))
            _raise_error_of(ticket, "run")
            yield ticket
        finally:
            ticket.cancel()  # when the page was closed in the middle; nothing happens when the run has ended
            session.tickets.remove(ticket)

    def cancel(self, session: "Session") -> bool:
        """Cancel the session's runs; what they have finished stays. Returns whether there was one."""
        running = [ticket for ticket in session.tickets if not ticket.ended.is_set()]
        for ticket in running:
            ticket.cancel()
        return bool(running)

    async def control_image(
        self,
        field: str,
        control: "ControlInput",
        height: int | None = None,
        width: int | None = None,
        caller: Caller | None = None,
    ) -> "PIL.Image.Image":
        """PIL image of what a ControlNet would read of a ControlInput. Raises FieldError for what the library's refuses."""
        (path,) = self.store.find_all([control.picture], field)

        def make(ticket):
            controls = controlling()
            with at(field):
                if control.ready:
                    check_side(field, *(image_file_size(path) or (0, 0)))
                    with DECODING:
                        return controls.control_preview(controls.open_control(control.name, path))
                with DECODING:
                    image = open_image_file(path, field)
                    # says at once what does not fit
                    size = controls.control_size(image, height, width, self.models.short_side())
                    check_side(field, *size)
                    # as the library begins; what follows takes its time, and others may decode meanwhile
                    image = image.resize(size[::-1], PIL.Image.Resampling.LANCZOS)
                height_and_width = dict(zip(("height", "width"), size, strict=True))
                return controls.control_preview(
                    controls.control_image(control.name, image, **height_and_width)
                )

        return await self.carry_out(self.annotating, make, field, caller)

    async def carry_out(self, worker: Worker, job: Job, field: str, caller: Caller | None = None) -> Any:
        """Wait for a job that has no progress to tell; returns its result. What goes wrong belongs to `field`."""
        ticket = _submit(worker, job, field, caller)
        try:
            async for _ in _news(ticket):
                pass
            _raise_error_of(ticket, field)
            if ticket.state == "cancelled":
                raise FieldError(field, "This was cancelled.")
            return ticket.result
        finally:
            ticket.cancel()


def _submit(worker, job, field, caller):
    try:
        return worker.submit(job, caller)
    except QueueFull as error:
        raise FieldError(field, str(error)) from error


async def _news(ticket):
    """Come back whenever something about a ticket has changed, and at least every second, until it has ended."""
    told, at_time, pause = None, 0.0, QUICK_POLL
    while not ticket.ended.is_set():
        news = (ticket.state, ticket.place, ticket.progress)
        if news != told or time.monotonic() - at_time > PATIENCE:
            told, at_time = news, time.monotonic()
            yield news
        await asyncio.sleep(pause)
        pause = min(2 * pause, POLL)


def _raise_error_of(ticket, field):
    if isinstance(ticket.error, FieldError):
        raise ticket.error
    if ticket.error is not None:
        raise FieldError(field, unexpected(ticket.error)) from ticket.error
