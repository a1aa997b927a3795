"""A tool for programs that speak the Model Context Protocol: gradio's MCP server, of one function, without a page or files.

gradio's own routes for it would take addresses of images, write what it draws to a folder and encode it again, without its
settings and its mark. So the function takes `data:` URLs, and what it returns goes out as it is.
"""

import asyncio
import base64
import contextlib
import json
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from .access import Message, Receive, Refused, Send
from .bodies import MAX_BODY, Bodies, read_body, read_json_body, replay
from .errors import FieldError
from .libraries import without_proxies

PATH = "/gradio_api/mcp"  # where gradio has it
READING = 60.0  # seconds that a call may take to come
INSTALL = "pip install 'kosmos-g-diffusers[app,mcp]'"

# (fields of a request for images, who asks) -> PNGs with their settings
Draw = Callable[[dict[str, Any], Request | None], Awaitable[list[bytes]]]


class Tool:
    """An ASGI application for requests to `PATH`; `running` is open as long as it answers.

    Args:
        draw: what draws.
        bodies: what counts the bytes of calls; None takes one of its own.

    Raises:
        ImportError: gradio or mcp is not installed.
    """

    def __init__(self, draw: Draw, bodies: Bodies | None = None):
        self._bodies = bodies or Bodies()
        try:
            with without_proxies():
                import gradio
                import mcp  # noqa: F401
                from gradio.mcp import GradioMCPServer
        except ImportError as error:
            raise ImportError(f"--mcp needs gradio and mcp ({error}). Run: {INSTALL}") from error

        class Server(GradioMCPServer):
            def postprocess_output_data(self, data: Any, root_url: str) -> Any:
                """PNGs as they were drawn, in base64."""
                return [
                    self.types.ImageContent(type="image", data=image, mimeType="image/png")
                    for image in json.loads(data[0])
                ]

        async def draw_image(
            request: gradio.Request,
            prompt: str,
            images: list[str] | None = None,
            negative_prompt: str = "",
            width: int = 0,
            height: int = 0,
            seed: int = -1,
            n: int = 1,
        ) -> str:
            # 64.0 is an integer in JSON
            n, width, height, seed = map(int, (n, width, height, seed))
            given = {"prompt": prompt, "images": images or [], "negative_prompt": negative_prompt, "n": n}
            if width or height:
                given["size"] = f"{width}x{height}"
            if seed >= 0:
                given["seed"] = seed
            try:
                pngs = await draw(given, getattr(request, "request", request))
            except FieldError as error:
                raise gradio.Error(
                    f"{error.field}: {error.message}", visible=False, print_exception=False
                ) from None
            return json.dumps([base64.b64encode(png).decode("ascii") for png in pngs])

        draw_image.__doc__ = DESCRIPTION
        with gradio.Blocks(analytics_enabled=False, title="Kosmos-G") as blocks:
            gradio.api(draw_image, api_name="draw_image", queue=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server = Server(blocks)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._server.manager.run():
            yield

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Raises Refused for a call that names a path or an address."""
        if not is_tool(scope["path"]):
            raise Refused(404, "There is nothing here.")
        scope = {**scope, "path": PATH}
        if scope["method"] != "POST":
            return await self._server.handle_streamable_http(scope, receive, send)
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "A call is application/json.")
        with self._bodies.holding(headers):
            try:
                async with asyncio.timeout(READING):
                    body = await read_body(receive, MAX_BODY)
            except TimeoutError:
                raise Refused(408, f"This call did not come within {READING:.0f} seconds.") from None
            await asyncio.to_thread(read_json_body, body)
            await self._server.handle_streamable_http(scope, replay(body, receive), send)


DESCRIPTION = """Draw images of a prompt of words and images, where <i> stands for an image, and return them as PNGs.

Args:
    prompt: What to draw, with <i> where an image belongs.
    images: The images of the <i>, in that order, as data: URLs such as data:image/png;base64,... Paths and addresses are refused.
    negative_prompt: What the images should not show.
    width: In pixels, a multiple of 8; 0 is the model's own.
    height: In pixels, a multiple of 8; 0 is the model's own.
    seed: Decides what is drawn; -1 draws one.
    n: How many images.
"""


def is_tool(path: str) -> bool:
    """Whether a request is for the tool."""
    return path.rstrip("/") == PATH
