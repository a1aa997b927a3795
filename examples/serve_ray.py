"""The service on several machines: the same application, with Ray Serve to spread, to scale and to batch what is drawn.

    pip install 'kosmos-g-diffusers[serve,ray]'
    python examples/serve_ray.py --model ./kosmos-g --replicas 1 4

Without --model the small model draws. A replica that dies is replaced, and what it was drawing is drawn by another: a
request says all that decides its images. docs/serving.md says more.
"""

import argparse
import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve
from ray.exceptions import RayActorError

from kosmos_g_diffusers.serve.application import create_application, guarded
from kosmos_g_diffusers.serve.batches import draw_all
from kosmos_g_diffusers.serve.drawer import Unavailable
from kosmos_g_diffusers.serve.requests import offer_of
from kosmos_g_diffusers.serve.tokens import Tokens
from kosmos_g_diffusers.serving.access import Access
from kosmos_g_diffusers.serving.models import Models

BATCH = 8  # images that are drawn together
TRIES = 20  # of a request whose replica died
PAUSE = 0.5  # seconds between them


@serve.deployment(max_ongoing_requests=2 * BATCH, health_check_period_s=2)
class Replica:
    """One model on one device."""

    def __init__(self, model: str | None = None):
        self._models = Models([model] if model else [])
        self._models.load()
        self._thread = ThreadPoolExecutor(1)

    async def describe(self):
        return offer_of(self._models)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
    async def draw(self, requests):
        loop = asyncio.get_running_loop()
        # exceptions are values here: each belongs to one request
        return [
            (one,)
            for one in await loop.run_in_executor(self._thread, draw_all, self._models, requests, BATCH)
        ]


class Replicas:
    """What the application draws with: all replicas together."""

    def __init__(self, handle, name):
        self._handle, self.name, self.state, self._looking = handle, name, ("loading", None), None

    def retry(self):
        self._looking = asyncio.ensure_future(self._look())

    async def _look(self):
        try:
            await asyncio.wait_for(self._ask("describe"), 4)
            self.state = ("ready", None)
        except Exception:  # noqa: BLE001  Ray logs it
            self.state = ("failed", "No replica answers.")

    async def describe(self):
        return await self._ask("describe")

    async def prepare(self, request):
        """A replica does."""

    async def draw(self, request, caller=None):
        (result,) = await self._ask("draw", request)
        if isinstance(result, Exception):
            raise result
        return result

    async def _ask(self, method, *arguments):
        for _ in range(TRIES):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except RayActorError:  # the replica died; another draws the same
                await asyncio.sleep(PAUSE)
        raise Unavailable("No replica answers.")


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress()
class Front:
    """The HTTP API, with its tokens."""

    def __init__(self, replicas, name, allowed_hosts, tokens):
        self._replicas, self._access = Replicas(replicas, name), Access("127.0.0.1", allowed_hosts)
        self._tokens = Tokens(tokens)

    def __serve_build_asgi_app__(self):
        return guarded(create_application(self._replicas), self._access, self._tokens)


def build(model=None, replicas=(1, 2), gpus=0, allowed_hosts=(), tokens=()):
    """The application, for `serve.run`; `replicas`: the fewest and the most of them."""
    scaling = {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": BATCH}
    options = {"autoscaling_config": scaling, "ray_actor_options": {"num_gpus": gpus}}
    name = os.path.basename(os.path.abspath(model)) if model else "sprites"
    return Front.bind(Replica.options(**options).bind(model), name, list(allowed_hosts), list(tokens))


def main():
    parser = argparse.ArgumentParser(description="Kosmos-G on Ray Serve.")
    parser.add_argument("--model", help="folder that every machine has (default: the small model)")
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 2), metavar=("LEAST", "MOST"))
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--allowed-host", action="append", default=[], metavar="NAME")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    tokens = os.environ.get("KOSMOS_G_TOKENS", "").split()  # without one, for this machine alone
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": "0.0.0.0" if tokens else "127.0.0.1", "port": arguments.port})  # noqa: S104
    options = (arguments.model, arguments.replicas, arguments.gpus, arguments.allowed_host, tokens)
    serve.run(build(*options))
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
