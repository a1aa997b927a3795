"""What reaches gradio: the routes that the page needs, files of the app's own folder, and uploads within limits.

gradio is made to be open: it fetches addresses that a client names in the place of an upload, streams any address
through itself, and has routes for recording, monitoring and editing apps. None of that is used here.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from ..serving.errors import FieldError
from ..serving.store import IMAGES, MAX_BYTES, MAX_FILES, UPLOADS, WORDS_SUFFIX, check_image_file

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ROUTES = re.compile(
    r"/(config/?|login/?|logout/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|assets/.+|static/.+|svelte/.+)?"
    r"|/gradio_api/(startup-events|info/?|app_id/?|user/?|login_check/?|theme\.css|openapi\.json"
    r"|queue/(join|data|status)|run/\w+/?|api/\w+/?|call/(v2/)?\w+(/\w+)?/?|cancel|reset/?|heartbeat/\w+"
    r"|upload|upload_progress|file=.+)"
)
OWN_FILE = re.compile(rf"({IMAGES}|{UPLOADS})(/[^/\\\0]+)+")  # relative: the server runs in its output folder
MAX_CALL = 4 * 2**20  # bytes of a call; images come by upload before, only strokes are in it
MAX_UPLOAD = MAX_FILES * (MAX_BYTES + 2**16)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", WORDS_SUFFIX)
# a file that someone uploaded must not act in the name of the page, whatever it claims to be
FILE_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"private"),
]
PAGE_HEADERS = [(b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff")]


class Refused(Exception):
    """A request that is answered with `status` and a sentence."""

    status: int
    message: str

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Guard:
    """ASGI middleware. Args: app: what it stands before. folder: where relative file names begin."""

    app: Callable[..., Awaitable[None]]
    folder: Path

    def __init__(self, app: Callable[..., Awaitable[None]], folder: str | Path = "."):
        self.app, self.folder = app, Path(folder)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        try:
            if not ROUTES.fullmatch(path):
                raise Refused(404, "There is nothing here.")
            if path.startswith("/gradio_api/file="):
                name = path.partition("=")[2]
                if not _is_own(name):
                    raise Refused(403, "This file is not served.")
                return await self.app(scope, receive, _with_headers(send, FILE_HEADERS))
            if scope["method"] == "POST":
                is_upload = path.endswith("/upload")
                receive = await self._check_body(scope, receive, is_upload)
                if is_upload:
                    return await self._upload(scope, receive, send)
            await self.app(scope, receive, _with_headers(send, PAGE_HEADERS))
        except Refused as refused:
            answer = JSONResponse({"detail": refused.message, "error": refused.message}, refused.status)
            await answer(scope, receive, send)

    async def _check_body(self, scope, receive, is_upload):
        """A `receive` that ends a body that is too long; a call's body is read whole and looked through."""
        headers, seen = Headers(scope=scope), 0
        limit = MAX_UPLOAD if is_upload else MAX_CALL
        too_large = Refused(413, f"This is too large: {limit // 2**20} MB are possible at once.")

        async def receive_counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise too_large
            return message

        if int(headers.get("content-length") or 0) > limit:
            raise too_large
        if is_upload:
            return receive_counted
        body = await _read(receive_counted)
        if "json" in headers.get("content-type", "json"):
            _check_files(body)
        return _repeat(body, receive)

    async def _upload(self, scope, receive, send):
        """Let gradio take an upload, then look at what it was before anyone hears of it."""
        messages = []

        async def collect(message):
            messages.append(message)

        await self.app(scope, receive, collect)
        body = b"".join(message.get("body", b"") for message in messages)
        status = next(message["status"] for message in messages if message["type"] == "http.response.start")
        if status == 200:
            paths = [self.folder / name for name in json.loads(body)]
            try:
                _check_uploads(paths)
            except Refused:
                for path in paths:
                    path.unlink(missing_ok=True)
                raise
        for message in messages:
            await send(message)


def _check_uploads(paths):
    if len(paths) > MAX_FILES:
        raise Refused(413, f"{len(paths)} files were uploaded at once; {MAX_FILES} are possible.")
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise Refused(415, "This is not an image: " + ", ".join(SUFFIXES) + " are taken.")
        if path.suffix.lower() != WORDS_SUFFIX:
            try:
                check_image_file(path)
            except FieldError as error:
                raise Refused(413, error.message) from error


def _is_own(name):
    return bool(OWN_FILE.fullmatch(name)) and ".." not in name.split("/")


def _check_files(body):
    """Refuse a call that names a file which was not uploaded here: any path of the server, any address."""
    try:
        waiting = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        raise Refused(400, "This call is not JSON.") from None
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            path = value.get("path")
            if path is not None and not (isinstance(path, str) and _is_own(path)):
                raise Refused(400, "A file was named that was not uploaded here: handle_file uploads it.")
            waiting.extend(value.values())


async def _read(receive):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def _repeat(body, receive):
    """A `receive` that gives a body that was read once more, and then what follows it."""
    bodies = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return bodies.pop() if bodies else await receive()

    return receive_again


def _with_headers(send, headers):
    async def send_with_headers(message):
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return send_with_headers
