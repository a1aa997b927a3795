"""The HTTP API: routes, errors in the shape of OpenAI's, who may ask, and what becomes of a request whose client has gone."""

import asyncio
import base64
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..environment import __version__
from ..generation.png import PNG_KEY
from ..provenance import MARKED, Marker
from ..serving.access import Access, Application, Gate, Message, Receive, Refused, Send, address_of
from ..serving.bodies import MAX_BODY, Bodies, int_or_zero, parse_json, read_body, read_json_body, replay
from ..serving.errors import FieldError, unexpected
from ..serving.images import MAX_BYTES, MAX_FILES, read_data_url
from ..serving.queue import Caller, QueueFull
from ..serving.tool import PATH, Tool
from .drawer import Unavailable
from .metrics import Metrics
from .requests import (
    UPLOADS,
    Condition,
    Edit,
    File,
    Generation,
    Offer,
    Prompted,
    Request,
    UnknownModel,
    edit_schema,
    read_request,
)
from .tokens import Tokens

logger = logging.getLogger(__name__)

TIMEOUT = 600.0  # seconds of a request, waiting included
OPEN = ("/health", "/ready", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")  # without a token
STATIC = "/static-offline-docs/"
REQUEST_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
COUNTED = {f"/v1/{name}" for name in ("images/generations", "images/edits", "conditions", "models")}
COUNTED |= {*OPEN, "/metrics", PATH, f"{PATH}/"}  # by their names; the others together
READING = 60.0  # seconds that a body may take
LOOK_AT_MODEL = 5.0  # seconds between two looks whether it has to be loaded again
DESCRIPTION = """Images from prompts of words and images, in the shape of OpenAI's image API.

`<i>` in a prompt stands for an image. Images come as files or as `data:` URLs; no path and no address is ever opened. Every
image that is returned carries its settings (`kosmos-g show FILE`) and a mark that a model drew it."""


class Drawing(Protocol):
    """What draws: `Drawer`, or something on other machines."""

    name: str
    state: tuple[str, str | None]

    async def describe(self) -> Offer: ...

    async def prepare(self, request: Request) -> None: ...

    async def draw(self, request: Request, caller: Caller | None = None) -> Any: ...

    def retry(self) -> None: ...


# Answers -----------------------------------------------------------------------------------------------------------------


class Image(BaseModel):
    b64_json: str
    seed: int


class Images(BaseModel):
    """The answer to a request for images."""

    created: int
    data: list[Image]
    size: str
    output_format: str = "png"
    background: str = "opaque"


class Problem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The answer to a request that cannot be done."""

    error: Problem


KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
KINDS |= {404: "not_found_error", 429: "rate_limit_error"}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "What was asked for cannot be done; `param` names the field.",
        401: "No token, or a wrong one.",
        413: "The body is too large.",
        429: "Too many requests are waiting.",
        503: "The model is not loaded.",
        504: "It took too long.",
    }.items()
}


def problem(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in the shape of OpenAI's."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers
    )


async def answer_refused(refused: Refused, scope: Message, receive: Receive, send: Send) -> None:
    await problem(refused.status, refused.message, headers=refused.headers)(scope, receive, send)


EXPECTED = (
    Refused,
    FieldError,
    ValidationError,
    QueueFull,
    Unavailable,
    TimeoutError,
    HTTPException,
    Exception,
)


def _answer_to(error: Exception) -> JSONResponse:
    """The answer that an exception means."""
    match error:
        case Refused():
            return problem(error.status, error.message, headers=error.headers)
        case UnknownModel():
            return problem(404, error.message, error.field, "model_not_found")
        case FieldError(field=""):
            return problem(500, error.message)
        case FieldError():
            return problem(400, error.message, error.field)
        case ValidationError():
            return problem(400, *_of_validation(error))
        case QueueFull():
            return problem(429, str(error), code="queue_full", headers={"retry-after": "2"})
        case Unavailable():
            return problem(503, str(error), code="model_not_loaded", headers={"retry-after": "30"})
        case TimeoutError():
            return problem(504, "This took longer than a request may take. Ask for less.", code="timeout")
        case HTTPException():
            return problem(error.status_code, str(error.detail), headers=error.headers)
    return problem(500, unexpected(error))


def _of_validation(error):
    """(one sentence, the field) of pydantic's first error."""
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, first["loc"][:1]))
    where = ".".join(map(str, first["loc"]))[:100]
    if first["type"] == "extra_forbidden":
        return f"There is no parameter {where!r} here. GET /docs lists them.", name
    if first["type"] == "missing":
        return f"The parameter {where!r} is missing.", name
    text = first["msg"].removeprefix("Value error, ")
    given = repr(first["input"])
    given = given if len(given) <= 50 else f"{given[:50]}..."
    return f"{where} is {given}: {text[:1].lower()}{text[1:300]}.", name


# The application -----------------------------------------------------------------------------------------------------------


def create_application(
    drawer: Drawing,
    *,
    marker: Marker = MARKED,
    timeout: float = TIMEOUT,
    metrics: Metrics | None = None,
    mcp: bool = False,
) -> FastAPI:
    """The routes of a service, without what says who may use them (`guarded`).

    Args:
        drawer: what draws.
        marker: a `provenance.Marker` of the images.
        timeout: seconds that a request may take.
        metrics: what counts; None makes one.
        mcp: also be a tool of the Model Context Protocol, at /gradio_api/mcp/.

    Raises:
        ImportError: that needs packages which are not installed.
    """
    metrics = metrics or Metrics()
    bodies = Bodies()
    api = _Api(drawer, marker, timeout, metrics, bodies)
    tool = Tool(api.draw_for_tool, bodies) if mcp else None

    @contextlib.asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_keep_trying(drawer))
        try:
            async with tool.running() if tool else contextlib.nullcontext():
                yield
        finally:
            looking.cancel()

    application = FastAPIOffline(
        title="Kosmos-G", version=__version__, description=DESCRIPTION, lifespan=lifespan
    )
    if tool is not None:
        application.mount(PATH, tool)
    application.state.metrics = metrics
    post: dict[str, Any] = {"methods": ["POST"], "responses": DOCUMENTED}
    for path, call, title, body in (
        ("generations", api.generations, "Draw images of a prompt", Generation),
        ("edits", api.edits, "Draw images of uploaded images, or change one", Edit),
    ):
        application.add_api_route(
            f"/v1/images/{path}",
            call,
            response_model=Images,
            summary=title,
            openapi_extra=_body(body),
            **post,
        )
    text = {200: {"content": {"application/octet-stream": {}}, "description": "A file of safetensors."}}
    application.add_api_route(
        "/v1/conditions",
        api.conditions,
        methods=["POST"],
        summary="Encode a prompt: what Stable Diffusion 1.5 takes as prompt_embeds",
        response_class=Response,
        responses={**DOCUMENTED, **text},
        openapi_extra=_body(Condition),
    )
    application.add_api_route("/v1/models", api.models, summary="The model and what it takes")
    application.add_api_route("/v1/models/{model}", api.model, summary="The same of one model")
    application.add_api_route("/health", api.health, summary="Whether the process lives")
    application.add_api_route("/ready", api.ready, summary="Whether it can draw now", responses={503: {}})
    application.add_api_route("/metrics", api.metrics, summary="Numbers for Prometheus")
    for kind in EXPECTED:
        application.add_exception_handler(kind, _answer)
    return application


async def _answer(request, error):
    return _answer_to(error)


async def _keep_trying(drawer):
    while True:
        drawer.retry()
        await asyncio.sleep(LOOK_AT_MODEL)


def _body(model):
    if model is Edit:
        return {
            "requestBody": {"content": {"multipart/form-data": {"schema": edit_schema()}}, "required": True}
        }
    schema = model.model_json_schema()
    return {"requestBody": {"content": {"application/json": {"schema": _inlined(schema)}}, "required": True}}


def _inlined(schema: Any, definitions: Mapping[str, Any] | None = None) -> Any:
    """A JSON schema with its `$defs` where they are used."""
    if definitions is None:
        definitions = schema.get("$defs", {})
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(value, definitions) for name, value in schema.items() if name != "$defs"}
    return [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema


class _Api:
    def __init__(self, drawer, marker, timeout, metrics, bodies):
        self._drawer, self._marker, self._timeout, self._metrics = drawer, marker, timeout, metrics
        self._bodies, self._started = bodies, int(time.time())

    # Images ------------------------------------------------------------------------------------------------------

    async def generations(self, request: HttpRequest) -> Any:
        """Draws `n` images of a prompt, image k with the seed `seed + k`. The images of the `<i>` are `data:` URLs."""
        return await self._answer(request, Generation, self._images)

    async def edits(self, request: HttpRequest) -> Any:
        """Draws images of the uploaded images (`image`, one for each `<i>`), and changes `init_image` if it is there: by
        `strength`, or with a `mask` where that is transparent."""
        return await self._answer(request, Edit, self._images)

    async def conditions(self, request: HttpRequest) -> Any:
        """The states of a prompt and of its negative prompt, `prompt_embeds` and `negative_prompt_embeds`, (77, 768) each of
        the released size: one encoder serves many samplers."""
        return await self._answer(request, Condition, self._states)

    async def _answer(self, request, kind, finish):
        async with asyncio.timeout(self._timeout):
            with self._bodies.holding(request.headers):
                async with asyncio.timeout(READING):
                    body = await (_read_form(request) if kind is Edit else _read_json(request, kind))
                offer = await self._drawer.describe()
                asked = await asyncio.to_thread(read_request, body, offer)
                del body
                await self._drawer.prepare(asked)  # from here on it is small
            drawing = asyncio.create_task(self._drawer.draw(asked, _caller_of(request)))
            gone = asyncio.create_task(_until_gone(request))
            try:
                await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not drawing.done():  # nobody is left to answer
                    return Response(status_code=499)
                return await finish(drawing.result())
            finally:
                for task in (drawing, gone):
                    task.cancel()
                await asyncio.gather(drawing, gone, return_exceptions=True)

    async def _images(self, drawn):
        data = [
            {
                "b64_json": _as_text(await asyncio.to_thread(encode_image, image, settings, self._marker)),
                "seed": settings.seed,
            }
            for image, settings in drawn
        ]
        self._metrics.sent(len(data))
        width, height = drawn[0][0].size
        return Response(
            Images(created=int(time.time()), data=data, size=f"{width}x{height}").model_dump_json(),
            media_type="application/json",
        )

    async def draw_for_tool(self, given: dict[str, Any], request: HttpRequest | None) -> list[bytes]:
        """PNGs of fields of a Generation. Raises FieldError."""
        try:
            async with asyncio.timeout(self._timeout):
                body = Generation.model_validate(given)
                asked = await asyncio.to_thread(read_request, body, await self._drawer.describe())
                await self._drawer.prepare(asked)
                caller = None if request is None else _caller_of(request)
                drawn = await self._drawer.draw(asked, caller)
        except ValidationError as error:
            message, field = _of_validation(error)
            raise FieldError(field, message) from error
        except (QueueFull, Unavailable) as error:
            raise FieldError("run", str(error)) from error
        except TimeoutError as error:
            raise FieldError("run", "This took longer than a request may take. Ask for less.") from error
        self._metrics.sent(len(drawn))
        return [await asyncio.to_thread(encode_image, *one, self._marker) for one in drawn]

    async def _states(self, states):
        from safetensors.torch import save

        tensors = {
            name: state[0].cpu().contiguous()
            for name, state in zip(("prompt_embeds", "negative_prompt_embeds"), states, strict=True)
        }
        return Response(save(tensors, {"format": "pt"}), media_type="application/octet-stream")

    # The service -----------------------------------------------------------------------------------------------------

    async def models(self) -> Any:
        """The model, and what it takes: LoRAs, kinds of control."""
        return {"object": "list", "data": [await self._described()]}

    async def model(self, model: str) -> Any:
        """The same of one model."""
        if model != self._drawer.name:
            raise UnknownModel(model, self._drawer.name)
        return await self._described()

    async def _described(self):
        name = self._drawer.name
        own = {"id": name, "object": "model", "created": self._started, "owned_by": "kosmos-g"}
        if self._drawer.state[0] != "ready":
            return own
        offer = await self._drawer.describe()
        return {**own, "loras": offer.loras, "controls": offer.controls}

    async def health(self) -> Any:
        """200 as long as the process answers and its thread draws."""
        is_alive = getattr(getattr(self._drawer, "worker", None), "is_alive", lambda: True)()
        return JSONResponse({"status": "ok" if is_alive else "dead"}, 200 if is_alive else 503)

    async def ready(self) -> Any:
        """200 when the model is loaded; 503 while it is being loaded or cannot be, with the reason."""
        state, reason = self._drawer.state
        content = {"status": state, "model": self._drawer.name}
        if state == "failed":
            content["problem"] = reason or "It cannot be loaded."
        return JSONResponse(content, 200 if state == "ready" else 503)

    async def metrics(self) -> Any:
        """Requests, seconds, batches, images, what waits."""
        return Response(self._metrics.as_text(), media_type=self._metrics.kind)


def encode_image(image: Any, settings: Any, marker: Marker) -> bytes:
    """PIL image and its settings -> the PNG that carries them and the mark."""
    return marker.encode(image, "PNG", settings.is_composite, {PNG_KEY: settings.to_json()})


def _as_text(content):
    return base64.b64encode(content).decode("ascii")


# Reading -------------------------------------------------------------------------------------------------------------------


def _kind_of_body(request):
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_json(request, kind: type[Prompted]):
    if _kind_of_body(request) != "application/json":
        raise Refused(415, "The body is application/json.")
    length = int_or_zero(request.headers.get("content-length"))
    body = await read_body(request.receive, MAX_BODY, length)
    # a large body takes a while, and others are to be answered meanwhile
    return kind.model_validate(await asyncio.to_thread(read_json_body, body))


async def _read_form(request) -> Edit:
    if _kind_of_body(request) != "multipart/form-data":
        raise Refused(415, "The body is multipart/form-data.")
    length = int_or_zero(request.headers.get("content-length"))
    body = await read_body(request.receive, MAX_BODY, length)
    again = HttpRequest(request.scope, replay(body, request.receive))
    try:
        options = {"max_files": MAX_FILES + 2, "max_fields": 100, "max_part_size": MAX_BYTES * 4 // 3 + 1000}
        form = await again.form(**options)
    except (HTTPException, MultiPartException, FormParserError) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", None) or "it is damaged"
        raise Refused(400, f"This is not a form that can be read: {str(detail).rstrip('.')}.") from None
    given: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if name in UPLOADS:
                file = await _read_file(name, value)
                given.setdefault(name, []).append(file)
                if name != "image" and len(given[name]) > 1:
                    raise FieldError(name, f"Two files were sent as {name}. Send one.")
            elif isinstance(value, UploadFile):
                raise FieldError(name[:50], "This field is a text, and a file was sent.")
            elif name in texts:
                raise FieldError(name[:50], "This field was sent twice.")
            else:
                texts[name] = value
    finally:
        await form.close()
    for name in ("loras", "controls", "prompt"):
        text = texts.get(name)
        if text is not None and (name != "prompt" or text.lstrip()[:2] == "[{"):
            try:
                texts[name] = await asyncio.to_thread(parse_json, text)
            except (ValueError, RecursionError):
                if name != "prompt":
                    raise FieldError(name, "This field is JSON, a list of objects.") from None
    body = json.dumps(texts).encode()
    texts = await asyncio.to_thread(read_json_body, body)  # the same looks at what it names
    files = {name: files if name == "image" else files[0] for name, files in given.items()}
    return Edit.model_validate({**texts, **files})


async def _read_file(name, value):
    if isinstance(value, str):
        return File(read_data_url(value, name))
    if (value.size or 0) > MAX_BYTES:
        raise FieldError(name, f"A file has more than {MAX_BYTES // 2**20} MB.")
    return File(await value.read(), value.filename or "")


def _caller_of(request):
    address = address_of(request.scope)
    return Caller(request.scope.get("kosmos_g_client") or address, address)


async def _until_gone(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


# What stands before it -------------------------------------------------------------------------------------------------------


class Front:
    """ASGI middleware: request ids, counting, and an answer to what nobody foresaw.

    Args:
        app: the application, behind what says who may use it.
        metrics: what counts.
    """

    app: Application

    def __init__(self, app: Application, metrics: Metrics):
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, given = time.monotonic(), Headers(scope=scope).get("x-request-id", "")
        number = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        sent: list[int] = []

        async def send_numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])
                message["headers"] = [*message.get("headers", []), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_numbered)
        except Exception as error:
            if not sent:  # or it was answered, and logged there
                await _answer_to(error)(scope, receive, send_numbered)
        finally:
            status = sent[0] if sent else 499
            route = scope["path"] if scope["path"] in COUNTED else "other"
            self._metrics.answered(route, status, time.monotonic() - started)
            if status >= 500 and route != "/ready":
                logger.warning("request %s: %s %s answered %d", number, scope["method"], route, status)


class Bearer:
    """ASGI middleware that lets through who has a token.

    Args:
        app: what it stands before.
        tokens: Tokens.
    """

    app: Application

    def __init__(self, app: Application, tokens: Tokens):
        self.app, self._tokens = app, tokens

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            client = self._tokens.name_of(Headers(scope=scope).get("authorization"))
            if client is None and scope["path"] not in OPEN and not scope["path"].startswith(STATIC):
                headers = {"www-authenticate": "Bearer"}
                raise Refused(401, "A token is needed: Authorization: Bearer TOKEN.", headers)
            scope = {**scope, "kosmos_g_client": client}
        await self.app(scope, receive, send)


def guarded(application: FastAPI, access: Access, tokens: Tokens) -> Application:
    """An application behind the rules of who may use it."""
    gate = Gate(Bearer(application, tokens), access, refuse=answer_refused)
    return Front(gate, application.state.metrics)
