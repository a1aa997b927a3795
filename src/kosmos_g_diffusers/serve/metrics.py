"""What a service counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one service; each has a registry of its own, so that several live in one process."""

    kind = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = CollectorRegistry()
        options = {"namespace": "kosmos_g", "registry": self._registry}
        self._requests = Counter("requests", "Answers.", ["route", "status"], **options)
        self._seconds = Histogram(
            "request_seconds", "From a request to its answer.", ["route"], buckets=SECONDS, **options
        )
        self._batches = Histogram(
            "batch_images", "Images that were drawn together.", buckets=BATCHES, **options
        )
        self._images = Counter("images", "Images that were answered.", **options)
        self._options = options

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def drew_together(self, images: int) -> None:
        self._batches.observe(images)

    def sent(self, images: int) -> None:
        self._images.inc(images)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A number that is looked up whenever someone asks."""
        Gauge(name, text, **self._options).set_function(value)

    def as_text(self) -> bytes:
        return generate_latest(self._registry)
