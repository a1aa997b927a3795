"""A service on its address: the thread that draws, the application, and what stands before it."""

import threading
from collections.abc import Sequence

from ..provenance import MARKED, Marker
from ..serving.access import Access
from ..serving.models import Models
from ..serving.web import WebServer
from .application import TIMEOUT, create_application, guarded
from .drawer import BATCH, CAPACITY, Drawer
from .metrics import Metrics
from .tokens import Tokens

ENDING = 30.0  # seconds that requests have at the end


class Service:
    """What `kosmos-g serve` runs. It answers before a model is loaded, and continues where none can be.

    Args:
        models: Models, of which the first is served.
        host, port: where it listens.
        tokens: who may ask; without one everybody who reaches it.
        allowed_hosts: names that it answers to, besides those of this machine and `host`.
        marker: a `provenance.Marker` of the images.
        batch: images that are drawn together, at most.
        capacity: requests that may wait.
        timeout: seconds that a request may take.
        mcp: whether it is a tool for programs that speak the Model Context Protocol, too.

    Raises:
        OSError: it cannot listen there.
    """

    drawer: Drawer
    metrics: Metrics

    def __init__(
        self,
        models: Models,
        host: str = "127.0.0.1",
        port: int = 8000,
        tokens: Tokens | None = None,
        allowed_hosts: Sequence[str] = (),
        marker: Marker = MARKED,
        batch: int = BATCH,
        capacity: int = CAPACITY,
        timeout: float = TIMEOUT,
        mcp: bool = False,
    ):
        self.metrics, self._told = Metrics(), threading.Event()
        self.drawer = Drawer(models, batch, capacity, self.metrics.drew_together)
        self.metrics.watch("waiting", "Requests that wait.", self.drawer.worker.count_waiting)
        self.metrics.watch("ready", "Whether a model is loaded.", lambda: models.state == "ready")
        for name, text in (
            ("hits", "Images whose states were known."),
            ("misses", "Images that were encoded."),
        ):
            self.metrics.watch(
                f"vision_cache_{name}", text, lambda name=name: models.vision_cache_count(name)
            )
        application = create_application(
            self.drawer, marker=marker, timeout=timeout, metrics=self.metrics, mcp=mcp
        )
        guard = guarded(application, Access(host, allowed_hosts), tokens or Tokens())
        try:
            self._server = WebServer(guard, host, port)
        except OSError as error:
            self.drawer.close()
            raise OSError(
                f"The service cannot listen at {host}:{port}: another program does, or it is not an address of this machine. "
                "Pass another --port, or --host."
            ) from error

    @property
    def url(self) -> str:
        return self._server.url

    def start(self) -> None:
        """Answer requests, and begin to load the model; returns when the first was answered."""
        self._server.start()
        self.drawer.start()

    def end(self) -> None:
        """Have `is_ending` return; for a handler of signals."""
        self._told.set()

    def is_ending(self, seconds: float) -> bool:
        """Whether `end` was called, after so many seconds at most."""
        return self._told.wait(seconds)

    def close(self) -> None:
        """Take no more requests, end those that are under way, as far as there is time, and the thread that draws."""
        self._server.close(ENDING)
        self.drawer.close()
