"""gr.Blocks that knows who calls, and whose failures are sentences: what a client got wrong leaves no traceback in the log."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import gradio as gr

from ..serving.access import network_of
from ..serving.errors import unexpected
from ..serving.queue import Caller

logger = logging.getLogger(__name__)

WRONG_VALUE = "A value is of the wrong kind or not offered here. Reload the page."
CALLS_PER_SESSION = 12  # at once; a page that opens makes several
CALLS_PER_ADDRESS = 96

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)
# of the request that is being answered: whether something failed that the client did not do wrong
bugs: ContextVar[list[str] | None] = ContextVar("bugs", default=None)


def caller() -> Caller | None:
    """Who asked for what the current handler does."""
    return _caller.get()


class Listeners:
    """Streams on which clients listen for what they asked for, by the name of the session or of the event."""

    def __init__(self):
        self._open = Counter()

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]

    def are_there(self, *names: str | None) -> bool:
        return any(name in self._open for name in names)


class Blocks(gr.Blocks):
    """Args: as of gr.Blocks."""

    listeners: Listeners

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.listeners = Listeners()
        self._under_way = Counter()  # calls, by session and by address

    async def process_api(self, block_fn: Any, inputs: list[Any], **options: Any) -> dict[str, Any]:
        session, event = options.get("session_hash"), options.get("event_id")
        client = getattr(options.get("request"), "client", None)
        address = network_of(getattr(client, "host", None) or "")
        # a call without an event is answered by the request that it came with
        listening = (lambda: self.listeners.are_there(session, event)) if event else (lambda: True)
        _caller.set(Caller(session or event or address, address, listening))
        is_first = options.get("iterator") is None
        try:
            with self._counted(session or event, address, is_first):
                return await super().process_api(block_fn, inputs, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            text = unexpected(error)
            if (known := bugs.get()) is not None:
                known.append(text)
            raise gr.Error(text, visible=False, print_exception=False) from None

    async def preprocess_data(self, *arguments: Any, **options: Any) -> list[Any]:
        try:
            return await super().preprocess_data(*arguments, **options)
        except gr.Error:
            raise
        except Exception as error:  # all that it reads is what the client sent
            logger.info("refused", exc_info=error)
            raise gr.Error(WRONG_VALUE, visible=False, print_exception=False) from None

    @contextmanager
    def _counted(self, session, address, is_first):
        """Refuse more calls at once than a page makes: each holds what it was sent."""
        names = (("session", session), ("address", address))
        most = (CALLS_PER_SESSION, CALLS_PER_ADDRESS)
        if is_first and any(self._under_way[name] >= limit for name, limit in zip(names, most, strict=True)):
            message = "run: Too many calls at once. Wait until some of them have ended."
            raise gr.Error(message, visible=False, print_exception=False)
        self._under_way.update(names)
        try:
            yield
        finally:
            self._under_way.subtract(names)
            self._under_way += Counter()
