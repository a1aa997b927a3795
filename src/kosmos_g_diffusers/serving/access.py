"""Who may talk to a server: the names that it answers to, the sites that may use it, how much one address asks at once.

A page in a browser may send requests to any address, this machine's too, with the cookies that belong there, and a name
that its owner points at this machine (DNS rebinding) makes the answers readable. So a request's `Host` must be a name that the
server was started for, and a browser must say that the page which asks is the server's own.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104  names of "all addresses of this machine"
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@?#\\\[\]]+)(?::(\d{1,5}))?")
DEFAULT_PORTS = {"http": "80", "https": "443"}
OWN_SITES = {"same-origin", "none"}  # of Sec-Fetch-Site: our page, and what a user typed
OTHER_SITE = "Pages of other sites may not use this server."
METHODS = ("GET", "HEAD", "POST")
MOST_OPEN = 512  # requests of one address that are answered at the same time; a page holds two or three
MOST_POSTS = 64  # of them with a body, which is held in memory
HEADERS = [  # on every answer; no site may show the page inside its own, where a user is made to click
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class Refused(Exception):
    """A request that is answered with `status` and a sentence. Args: headers: of the answer."""

    status: int
    message: str
    headers: dict[str, str]

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def address_of(scope: Message) -> str:
    """Whose request it is, as far as addresses tell: an IPv4 address, or the /64 network that a provider gives a customer."""
    host = (scope.get("client") or ("",))[0]
    return network_of(host)


def network_of(host: str) -> str:
    """The same for the address itself, a text that may be empty."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Access:
    """The names that a server answers to, and who may use it from a browser.

    Args:
        host: address that it listens on.
        allowed: further names or addresses, such as that of a reverse proxy: NAME, NAME:PORT, or *.NAME for what is below.
        share: function that gives the public address of the server, or None.

    Raises:
        ValueError: a name that is not one.
    """

    names: set[str]

    def __init__(
        self, host: str, allowed: Iterable[str] = (), share: Callable[[], str | None] = lambda: None
    ):
        self._share = share
        self._any_address = host in ANY_ADDRESS
        self._given = {_given_name(name) for name in allowed}
        self.names = {*LOCAL_NAMES, *(name.rpartition("|")[0] for name in self._given)}
        if not self._any_address:
            self.names.add(_bare(host))

    def check(self, scope: Message) -> None:
        """Raise Refused for a request, HTTP or websocket, that this server is not to answer."""
        headers = Headers(scope=scope)
        asked = headers.getlist("host")
        # a reverse proxy says in the second header which name was asked for
        names = [
            *asked,
            *(name.strip() for text in headers.getlist("x-forwarded-host") for name in text.split(",")),
        ]
        arrived = (scope.get("server") or ("",))[0]
        if len(asked) != 1 or not all(self._is_ours(name, arrived) for name in names):
            raise Refused(
                421,
                "This server does not answer to that name. Whoever started it can add it: --allowed-host NAME.",
            )
        if not all(self._is_own_page(origin, names) for origin in headers.getlist("origin")):
            raise Refused(403, OTHER_SITE)
        sites = {site.strip().lower() for site in headers.getlist("sec-fetch-site")}
        if not sites <= OWN_SITES and not _opens_the_page(scope, headers):
            raise Refused(403, OTHER_SITE)

    def _is_ours(self, text, arrived):
        match = HOST.fullmatch(text)
        if match is None:
            return False
        name = _bare(match[1])
        if name in self.names or name == self._shared():
            return True
        if any(own.startswith("*.") and name.endswith(own[1:]) for own in self.names):
            return True
        # an address, unlike a name, cannot be pointed anywhere by a stranger
        return self._any_address and network_of(name) == network_of(_bare(arrived))

    def _is_own_page(self, origin, names):
        """Whether a page is this server's: it has the name and port that were asked for, or the proxy's name."""
        parts = urlsplit(origin)
        if parts.scheme not in DEFAULT_PORTS or origin.count("/") != 2:
            return False
        match = HOST.fullmatch(parts.netloc)
        if match is None:
            return False
        name, port = _bare(match[1]), match[2] or DEFAULT_PORTS[parts.scheme]
        for asked in filter(None, map(HOST.fullmatch, names)):
            if _bare(asked[1]) == name and (asked[2] or port) == port and (asked[2] or not match[2]):
                return True
        return name == self._shared() or f"{name}|{match[2] or ''}" in self._given

    def _shared(self):
        url = self._share()
        return urlsplit(url).hostname if url else None


def _given_name(text):
    """NAME or NAME:PORT -> "name|port". ValueError for anything else."""
    match = HOST.fullmatch(text.removeprefix("*."))
    if match is None or "*" in match[1]:
        raise ValueError(
            f"--allowed-host {text!r} is not a name. Pass a name or an address, such as kosmos.example.org."
        )
    return f"{'*.' if text.startswith('*.') else ''}{_bare(match[1])}|{match[2] or ''}"


def _bare(name):
    """A host name or address as it is compared."""
    return name.strip("[]").lower().rstrip(".")


def _opens_the_page(scope, headers):
    """Whether this is a user who follows a link to the page: what it answers is shown to them alone."""
    return (
        scope.get("method") == "GET"
        and scope["path"] == "/"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


class Gate:
    """ASGI middleware that lets through what `Access` allows, so much at once for each address.

    Args:
        app: what it stands before: everything that the server answers.
        access: Access.
        websockets: whether the application has any.
        refuse: what answers a request that is not let through; None takes `answer_refused`.
    """

    app: Application
    access: Access

    def __init__(
        self,
        app: Application,
        access: Access,
        websockets: bool = False,
        refuse: "Callable[[Refused, Message, Receive, Send], Awaitable[None]] | None" = None,
    ):
        self.app, self.access, self._websockets = app, access, websockets
        self._refuse = refuse or answer_refused
        self._open, self._posts = Counter(), Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        send = _with_headers(send)
        counted = []
        try:
            self.access.check(scope)
            # gradio would believe whoever sends it
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"x-gradio-server"]}
            self._count(scope, counted)
            await self.app(scope, receive, send)
        except Refused as refused:
            await self._refuse(refused, scope, receive, send)
        finally:
            for counter, address in counted:
                counter[address] -= 1
                if not counter[address]:
                    del counter[address]

    def _count(self, scope, counted):
        if scope["type"] == "websocket":
            if not self._websockets:
                raise Refused(403, "There is no websocket here.")
        elif scope["method"] not in METHODS:
            raise Refused(405, "This is not done here.", {"allow": ", ".join(METHODS)})
        address = address_of(scope)
        for counter, limit, counts in (
            (self._open, MOST_OPEN, True),
            (self._posts, MOST_POSTS, scope.get("method") == "POST"),
        ):
            if counts:
                if counter[address] >= limit:
                    raise Refused(429, "Too many requests from your address at once.", {"retry-after": "5"})
                counter[address] += 1
                counted.append((counter, address))


async def answer_refused(refused: Refused, scope: Message, receive: Receive, send: Send) -> None:
    """Answer a request as a Refused says."""
    if scope["type"] == "websocket":
        await receive()
        return await send({"type": "websocket.close", "code": 1008, "reason": refused.message[:100]})
    content = {"detail": refused.message, "error": refused.message}
    await JSONResponse(content, refused.status, refused.headers)(scope, receive, send)


def _with_headers(send):
    """No other site is given leave to read (the Access-Control headers), and `HEADERS` are there."""

    async def send_with_headers(message):
        if message["type"] == "http.response.start":
            own = {name for name, _ in message.get("headers", [])}
            kept = [
                pair
                for pair in message.get("headers", [])
                if not pair[0].lower().startswith(b"access-control-")
            ]
            added = [pair for pair in HEADERS if pair[0] not in own]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return send_with_headers
