"""What reaches gradio: the routes that the page needs, calls that were looked through, files of the app's own folder.

gradio is made to be open: it fetches addresses that a client names in the place of an upload, streams any address
through itself, and has routes for recording, monitoring and editing apps. None of that is used here; uploads and log-ins
never reach it.
"""

import asyncio
import json
import logging
import re
import secrets
from collections import OrderedDict
from contextlib import nullcontext
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, StreamingResponse

from ..serving.access import Application, Message, Receive, Refused, Send, address_of, answer_refused
from ..serving.bodies import int_or_zero, read_body, read_json_body, replay
from ..serving.errors import unexpected
from ..serving.passwords import Logins
from ..serving.store import IMAGES, UPLOADS, Store
from ..serving.tool import is_tool
from ..serving.uploads import BrokenOff, receive_files
from .blocks import Blocks, bugs

logger = logging.getLogger(__name__)

PUBLIC = re.compile(  # what the page that asks for a password needs
    r"/(login/?|logout/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|assets/.+|static/.+|svelte/.+)?"
    r"|/gradio_api/(user/?|login_check/?|theme\.css)"
)
ROUTES = re.compile(
    rf"{PUBLIC.pattern}|/config/?"
    r"|/gradio_api/(startup-events|info/?|app_id/?|openapi\.json"
    r"|queue/(join|data|status)|run/\w+/?|api/\w+/?|call/(v2/)?\w+(/\w+)?/?|cancel|reset/?|heartbeat/[\w.-]+"
    r"|upload|upload_progress|file=.+)"
)
FILE = "/gradio_api/file="
OWN_FILE = re.compile(rf"({IMAGES}|{UPLOADS})(/[^/\\\0]+)+")  # relative: the server runs in its output folder
CALL = re.compile(r"/gradio_api/(run|api|call|call/v2)/(\w+)/?")
LISTENED = re.compile(r"/gradio_api/(?:queue/data|call/(?:v2/)?\w+/(\w+)/?)")
SESSION = re.compile(r"[\w.-]{1,100}")
MAX_CALL = 2**20  # bytes of a call; images come by upload before, only strokes are in it
MAX_LOGIN = 8192
SESSIONS = 500  # whose values are kept; gradio's own limit is 10,000
SESSIONS_PER_ADDRESS = 60
MOST_LOGINS = 10_000
ALIVE = 1.0  # seconds between two looks at an upload
# a file that someone uploaded must not act in the name of the page, whatever it claims to be
FILE_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'",
    ),
    (b"cache-control", b"private"),
]


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before: gradio's application of `blocks`, or one in which it is mounted.
        blocks: Blocks, whose `app` is gradio's application.
        store: Store, which takes the uploads.
        logins: Logins; None where nobody has to log in.
        tool: Tool, for programs; None where it is not offered.
    """

    app: Application
    blocks: Blocks
    store: Store
    logins: Logins | None

    def __init__(
        self,
        app: Application,
        blocks: Blocks,
        store: Store,
        logins: Logins | None = None,
        tool: Application | None = None,
    ):
        self.app, self.blocks, self.store, self.logins, self._tool = app, blocks, store, logins, tool
        self._uploading = set()  # their ids
        self._sessions = OrderedDict()  # name -> address, the one that was used last at the end

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = []  # kinds of messages

        async def send_noting(message):
            sent.append((message["type"], message.get("more_body", False)))
            await send(message)

        bugs.set([])
        try:
            await self._answer(scope, receive, send_noting)
        except Refused as refused:
            await answer_refused(refused, scope, receive, send)
        except BrokenOff:
            pass
        except Exception as error:
            text = "This is not there."
            if _is_refusal(error):  # of a stream, by gradio: nobody asked for what it would tell
                logger.info("refused", exc_info=error)
            else:
                text = unexpected(error)
            if not sent:
                await JSONResponse({"detail": text, "error": text}, 500)(scope, receive, send)
            elif sent[-1] != ("http.response.body", False):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, scope, receive, send):
        path, method = scope["path"], scope["method"]
        if self._tool is not None and is_tool(path):
            return await self._tool(scope, receive, send)
        if not ROUTES.fullmatch(path):
            raise Refused(404, "There is nothing here.")
        if self.logins is not None and not PUBLIC.fullmatch(path) and self._user_of(scope) is None:
            raise Refused(401, "Log in first.")
        if path.startswith(FILE):
            if not _is_own(path.removeprefix(FILE)):
                raise Refused(403, "This file is not served.")
            # gradio would repeat the headers of a request for a part of a file
            scope = _with_request_headers(scope, drop=(b"range",))
            return await self.app(scope, receive, _with_headers(send, FILE_HEADERS))
        if path == "/gradio_api/upload_progress":
            return await self._tell_upload(scope, receive, send)
        if method != "POST":
            with self._listening(scope):
                return await self.app(scope, receive, send)
        if path == "/gradio_api/upload":
            return await self._upload(scope, receive, send)
        if path.rstrip("/") == "/login":
            return await self._log_in(scope, receive, send)
        await self._call(scope, receive, send)

    def _listening(self, scope):
        match = LISTENED.fullmatch(scope["path"])
        if match is None:
            return nullcontext()
        name = match[1] or parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        return self.blocks.listeners.listening(name)

    # Calls -------------------------------------------------------------------------------------------------------

    async def _call(self, scope, receive, send):
        """Hand on a call that was read and looked through, written anew: gradio reads what was looked at."""
        headers, path = Headers(scope=scope), scope["path"]
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a browser sends any other kind for any site, without asking first
            raise Refused(415, "A call is application/json.")
        body = await read_body(receive, MAX_CALL, int_or_zero(headers.get("content-length")))
        content = read_json_body(body, _is_own, _is_own_url)
        if path.startswith("/gradio_api/call/v2/"):
            self._check_names(content, path)
        else:
            content = self._checked(content, path)
        if isinstance(session := content.get("session_hash"), str):
            self._note_session(session, address_of(scope))
        body = json.dumps(content).encode()
        own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        scope = _with_request_headers(scope, drop=(b"transfer-encoding",), add=own)
        await self.app(scope, replay(body, receive), _with_status(send))

    def _checked(self, content, path):
        """The fields of a call, each of its kind and of what there is. Raises Refused."""
        takes = {"session_hash": str}
        if path.endswith(("/cancel", "/reset", "/reset/")):
            takes |= {"event_id": str, "fn_index": int}
        else:
            takes |= {"data": list, "event_data": object, "trigger_id": int, "fn_index": int}
        given = {name: content[name] for name in takes if content.get(name) is not None}
        for name, value in given.items():
            if not isinstance(value, takes[name]) or takes[name] is int and isinstance(value, bool):
                raise Refused(400, f"The field {name} of this call is of the wrong kind.")
        if not SESSION.fullmatch(given.get("session_hash", "x")):
            raise Refused(400, "The session_hash of this call is not a short name of letters and digits.")
        function = self.blocks.fns.get(given.get("fn_index"))
        # some are the page's alone, which calls them without the server
        if "fn_index" in given and (function is None or function.fn is None):
            raise Refused(400, "There is no such function here. Reload the page.")
        if given.get("trigger_id") and given["trigger_id"] not in self._triggers:
            raise Refused(400, "There is no such component here. Reload the page.")
        if function is not None and function.collects_event_data:
            event = given.get("event_data")
            if not (isinstance(event, dict) and {"index", "value"} <= event.keys()):
                raise Refused(400, "This call does not say what was chosen.")
        if path == "/gradio_api/queue/join" and not {"data", "fn_index", "session_hash"} <= given.keys():
            raise Refused(400, "This call has no data, no fn_index or no session_hash.")
        if (call := CALL.fullmatch(path)) is not None:
            if function is None and call[2] not in {entry.api_name for entry in self.blocks.fns.values()}:
                raise Refused(404, "There is no such endpoint here.")
            if "data" not in given:
                raise Refused(400, "This call has no data.")
        return given

    def _check_names(self, content, path):
        """Raise Refused if a call by the names of its parameters has one that there is not, or lacks one."""
        parameters = self._parameters.get(path.rstrip("/").rpartition("/")[2])
        if parameters is None:
            raise Refused(404, "There is no such endpoint here.")
        if unknown := sorted(content.keys() - parameters.keys()):
            raise Refused(400, f"This call has a parameter that there is not: {unknown[0][:100]}.")
        missing = [
            name for name, has_default in parameters.items() if not has_default and name not in content
        ]
        if missing:
            raise Refused(400, f"This call has no {missing[0]}.")

    @cached_property
    def _triggers(self):
        """Ids of what a call may come from: the components, and the page itself, which tells that it was opened."""
        targets = {target for function in self.blocks.fns.values() for target, _ in function.targets}
        return targets | self.blocks.blocks.keys()

    @cached_property
    def _parameters(self):
        """Name of an endpoint -> {name of a parameter: whether it has a default}."""
        return {
            name.removeprefix("/"): {
                entry["parameter_name"]: entry["parameter_has_default"] for entry in endpoint["parameters"]
            }
            for name, endpoint in self.blocks.get_api_info()["named_endpoints"].items()
        }

    def _note_session(self, session, address):
        """Forget the values of the oldest sessions, of an address that opens one after the other first of all."""
        self._sessions[session] = address
        self._sessions.move_to_end(session)
        same = [name for name, owner in self._sessions.items() if owner == address]
        if len(same) > SESSIONS_PER_ADDRESS:
            dropped = same[0]
        elif len(self._sessions) > SESSIONS:
            dropped = next(iter(self._sessions))
        else:
            return
        del self._sessions[dropped]
        states = self.blocks.app.state_holder
        states.session_data.pop(dropped, None)
        states.time_last_used.pop(dropped, None)

    # Uploads -----------------------------------------------------------------------------------------------------

    async def _upload(self, scope, receive, send):
        name = parse_qs(scope["query_string"].decode("latin-1")).get("upload_id", [""])[0]
        self._uploading.add(name)
        try:
            paths = await receive_files(scope, receive, self.store)
        finally:
            self._uploading.discard(name)
        names = [path.relative_to(self.store.folder).as_posix() for path in paths]
        await JSONResponse(names)(scope, receive, send)

    async def _tell_upload(self, scope, receive, send):
        """The stream on which a page waits for the end of its upload."""
        name = parse_qs(scope["query_string"].decode("latin-1")).get("upload_id", [""])[0]

        async def until_done():
            await asyncio.sleep(ALIVE)  # it may come before the upload
            while name in self._uploading:
                yield 'data: {"msg": "heartbeat"}\n\n'
                await asyncio.sleep(ALIVE)
            yield 'data: {"msg": "done"}\n\n'

        await StreamingResponse(until_done(), media_type="text/event-stream")(scope, receive, send)

    # Passwords ---------------------------------------------------------------------------------------------------

    def _user_of(self, scope):
        cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
        return self.blocks.app.tokens.get(cookies.get(self._cookie()))

    def _cookie(self):
        return f"access-token-unsecure-{self.blocks.app.cookie_id}"  # one that gradio's page looks at too

    async def _log_in(self, scope, receive, send):
        body = await read_body(receive, MAX_LOGIN, int_or_zero(Headers(scope=scope).get("content-length")))
        if self.logins is None:
            raise Refused(404, "Nobody has to log in here.")
        try:
            form = await Request(scope, replay(body, receive)).form(max_files=0, max_fields=20)
        except (HTTPException, MultiPartException):
            raise Refused(400, "This is not a form.") from None
        user, password = form.get("username"), form.get("password")
        if not isinstance(user, str) or not isinstance(password, str):
            raise Refused(400, "A form with username and password is needed.")
        await self.logins.check(address_of(scope), user.strip(), password)
        tokens = self.blocks.app.tokens
        while len(tokens) >= MOST_LOGINS:
            tokens.pop(next(iter(tokens)))
        token = secrets.token_urlsafe(32)
        tokens[token] = user.strip()
        answer = JSONResponse({"success": True})
        is_secure = scope["scheme"] == "https"
        answer.set_cookie(self._cookie(), token, httponly=True, samesite="strict", secure=is_secure)
        await answer(scope, receive, send)


def _is_refusal(error):
    """Whether an exception is one of HTTP, or comes from one."""
    while error is not None and not isinstance(error, HTTPException):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_own(name: str) -> bool:
    """Whether a relative path is of a file that is served: what was drawn, or uploaded."""
    return bool(OWN_FILE.fullmatch(name)) and not {".", ".."} & {*name.split("/")}


def _is_own_url(url):
    """Whether this is an address that gradio gave such a file; the host is nobody's business: it is not asked."""
    return _is_own(unquote(url.partition(FILE)[2]))


def _with_request_headers(scope, drop=(), add=()):
    names = {*drop, *(name for name, _ in add)}
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() not in names] + [*add]}


def _with_headers(send, headers):
    async def send_with_headers(message):
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return send_with_headers


def _with_status(send):
    """gradio answers 500 to every failure; what the client got wrong is a 400."""

    async def send_with_status(message: dict[str, Any]):
        if message["type"] == "http.response.start" and message["status"] == 500 and not bugs.get():
            message = {**message, "status": 400}
        await send(message)

    return send_with_status
