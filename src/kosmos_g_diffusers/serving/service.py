"""What a page or an HTTP service offers, without either: runs are queued, carried out, and told of while they last."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ..provenance import MARKED, Marker
from .errors import FieldError, at, unexpected
from .job import Drawing, finished_images
from .libraries import controlling
from .queue import CAPACITY, Job, QueueFull, Ticket, Worker
from .store import Store, open_image_file

if TYPE_CHECKING:
    import PIL.Image

    from ..generation.settings import ControlInput, GenerationSettings
    from .models import Models
    from .session import Session

POLL = 0.1  # seconds between two looks at a run
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

    def __init__(self, models: "Models", store: Store, capacity: int = CAPACITY, marker: Marker = MARKED):
        self.models, self.store, self.marker = models, store, marker
        self.worker = Worker(capacity, "drawing")
        self.annotating = Worker(capacity, "control images")  # on the CPU, while the other draws

    def start(self) -> None:
        """Begin to load the default model; returns at once."""
        self.models.state = "loading"
        self.worker.submit(lambda ticket: self.models.load())

    def close(self) -> None:
        self.worker.close()
        self.annotating.close()

    async def draw(
        self, session: "Session", settings: "GenerationSettings", maps: bool = False
    ) -> AsyncIterator[Ticket]:
        """Yield the ticket of a run whenever there is news of it; the last time it has ended well or was cancelled.

        Args:
            settings: GenerationSettings, whose model, U-Net and LoRA are names of what is offered and whose files are kept.
            maps: whether maps are written too, see `Drawing`.

        Raises:
            FieldError: what was asked for cannot be done.
        """
        drawing = Drawing(self.models, self.store, settings, self.marker, maps)
        session.ticket = ticket = _submit(self.worker, drawing, "run")
        try:
            async for _ in _news(ticket):
                yield ticket
            session.remember(finished_images(ticket))
            _raise_error_of(ticket, "run")
            yield ticket
        finally:
            ticket.cancel()  # when the page was closed in the middle; nothing happens when the run has ended

    def cancel(self, session: "Session") -> bool:
        """Cancel the session's run; what it has finished stays. Returns whether there was one."""
        if session.ticket is None or session.ticket.ended.is_set():
            return False
        session.ticket.cancel()
        return True

    async def control_image(
        self, field: str, control: "ControlInput", height: int | None = None, width: int | None = None
    ) -> "PIL.Image.Image":
        """PIL image of what a ControlNet would read of a ControlInput. Raises FieldError for what the library's refuses."""
        (path,) = self.store.find_all([control.picture], field)

        def make(ticket):
            with at(field):
                image = open_image_file(path, field)
                controls = controlling()
                if control.ready:
                    return controls.control_preview(controls.open_control(control.name, path))
                size = {"height": height, "width": width, "short_side": self.models.short_side()}
                controls.control_size(image, **size)  # says at once what does not fit
                return controls.control_preview(controls.control_image(control.name, image, **size))

        return await self.carry_out(self.annotating, make, field)

    async def carry_out(self, worker: Worker, job: Job, field: str) -> Any:
        """Wait for a job that has no progress to tell; returns its result. What goes wrong belongs to `field`."""
        ticket = _submit(worker, job, field)
        try:
            async for _ in _news(ticket):
                pass
            _raise_error_of(ticket, field)
            return ticket.result
        finally:
            ticket.cancel()


def _submit(worker, job, field):
    try:
        return worker.submit(job)
    except QueueFull as error:
        raise FieldError(field, str(error)) from error


async def _news(ticket):
    """Come back whenever something about a ticket has changed, and at least every second, until it has ended."""
    told, at_time = None, 0.0
    while not ticket.ended.is_set():
        news = (ticket.state, ticket.place, ticket.progress)
        if news != told or time.monotonic() - at_time > PATIENCE:
            told, at_time = news, time.monotonic()
            yield news
        await asyncio.sleep(POLL)


def _raise_error_of(ticket, field):
    if isinstance(ticket.error, FieldError):
        raise ticket.error
    if ticket.error is not None:
        raise FieldError(field, unexpected(ticket.error)) from ticket.error
