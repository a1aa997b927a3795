"""Programs of others work with the service: OpenAI's Python client, the reference client of the Model Context Protocol."""

import asyncio
import base64
import contextlib
import io
import socket
from urllib.parse import urlsplit

import httpx
import numpy as np
import PIL.Image
import pytest
from support.app import serving, wait_for

pytest.importorskip("fastapi_offline", reason="pip install 'kosmos-g-diffusers[serve]'")
from support.service import data_url, images_of, offering, pixels, png_bytes  # noqa: E402

from kosmos_g_diffusers.generation.png import read_settings  # noqa: E402
from kosmos_g_diffusers.provenance import read_mark  # noqa: E402
from kosmos_g_diffusers.serve.tokens import Tokens  # noqa: E402

TOKEN = "a-token-that-is-long-enough"
TOOL = "/gradio_api/mcp/"
PLACES = ("/etc/passwd", "http://localhost:1/x.png", "file:///etc/passwd", "x.png")


# OpenAI's client -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app():
    with offering(tokens=Tokens([TOKEN])) as running:
        running.http.headers["authorization"] = f"Bearer {TOKEN}"
        yield running


@pytest.fixture(scope="module")
def client(app):
    openai = pytest.importorskip("openai", reason="pip install openai")
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key=TOKEN, max_retries=0)


def decoded(answer):
    return [base64.b64decode(image.b64_json) for image in answer.data]


def test_openai_client_draws(app, client, photos, tmp_path):
    extra = {
        "seed": 5,
        "steps": 2,
        "negative_prompt": "red",
        "guidance_scale": 3,
        "images": [data_url(photos[0])],
    }
    answer = client.images.generate(prompt="a <i>", n=2, size="64x64", model="sprites", extra_body=extra)
    assert (
        len(answer.data) == 2 and answer.created and answer.size == "64x64" and answer.output_format == "png"
    )
    (tmp_path / "image.png").write_bytes(decoded(answer)[1])
    settings = read_settings(tmp_path / "image.png")
    assert (settings.seed, settings.negative_prompt, settings.guidance) == (6, "red", 3)
    same = app.http.post("/v1/images/generations", json={"prompt": "a <i>", "n": 2, "size": "64x64", **extra})
    for one, other in zip(decoded(answer), images_of(same), strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_openai_client_edits(client, photos, tmp_path):
    files = [(f"{name}.png", png_bytes(photo)) for name, photo in zip("ab", photos, strict=False)]
    answer = client.images.edit(image=files, prompt="<i> in <i>", extra_body={"seed": 5, "steps": 2})
    (tmp_path / "image.png").write_bytes(decoded(answer)[0])
    assert [image.path for image in read_settings(tmp_path / "image.png").images] == ["a.png", "b.png"]
    single = client.images.edit(image=files[0], prompt="a <i>", extra_body={"seed": 5, "steps": 2})
    assert len(single.data) == 1
    photo = photos[3].resize((64, 64))
    masked = photo.copy()
    masked.putalpha(PIL.Image.new("L", photo.size, 0))
    changed = client.images.edit(
        image=files[0],
        mask=("mask.png", png_bytes(masked)),
        prompt="a <i>",
        extra_body={"seed": 5, "steps": 2, "init_image": data_url(photo), "strength": 1.0},
    )
    (tmp_path / "image.png").write_bytes(decoded(changed)[0])
    settings = read_settings(tmp_path / "image.png")
    assert settings.strength == 1 and settings.mask.path == "mask.png" and settings.init_image is not None


def test_openai_client_gets_its_own_errors(app, client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="multiples of 8") as caught:
        client.images.generate(prompt="a hat", size="63x63")
    assert caught.value.param == "size" and caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.images.generate(prompt="a hat", model="dall-e-3")
    with pytest.raises(openai.AuthenticationError, match="token"):
        openai.OpenAI(base_url=f"{app.url}/v1", api_key="wrong-" + TOKEN, max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == ["sprites"]
    assert client.models.retrieve("sprites").owned_by == "kosmos-g"


# The reference client of MCP ---------------------------------------------------------------------------------------------


def talk(url, conversation, headers=None):
    mcp = pytest.importorskip("mcp", reason="pip install 'kosmos-g-diffusers[mcp]'")
    from mcp.client.streamable_http import streamablehttp_client

    async def run():
        async with streamablehttp_client(url, headers=headers) as (reading, writing, _):
            async with mcp.ClientSession(reading, writing) as session:
                await session.initialize()
                return await conversation(session)

    return asyncio.run(run())


@pytest.fixture(scope="module", params=["serve", "app"])
def tool(request, tmp_path_factory):
    """(address of the tool, headers) of a service, and of the app."""
    pytest.importorskip("mcp", reason="pip install 'kosmos-g-diffusers[mcp]'")
    pytest.importorskip("gradio", reason="pip install 'kosmos-g-diffusers[app]'")
    with contextlib.ExitStack() as stack:
        if request.param == "serve":
            running = stack.enter_context(offering(tokens=Tokens([TOKEN]), mcp=True))
            yield running.url + TOOL, {"authorization": f"Bearer {TOKEN}"}
        else:
            running = stack.enter_context(serving(tmp_path_factory.mktemp("tool"), mcp=True))
            yield running.url + TOOL, {}


def test_tool_draws_with_settings_and_mark(tool, photos, tmp_path):
    async def conversation(session):
        listed = await session.list_tools()
        arguments = {"prompt": "a <i>", "images": [data_url(photos[0])], "seed": 4, "n": 2.0}
        return listed, await session.call_tool("draw_image", arguments)

    listed, result = talk(tool[0], conversation, tool[1])
    (known,) = listed.tools
    assert known.name == "draw_image" and "<i>" in known.description
    assert set(known.inputSchema["required"]) == {"prompt"} and "images" in known.inputSchema["properties"]
    assert not result.isError and [part.type for part in result.content] == ["image", "image"]
    for index, part in enumerate(result.content):
        path = tmp_path / f"{index}.png"
        path.write_bytes(base64.b64decode(part.data))
        assert read_settings(path).seed == 4 + index and read_settings(path).prompt == "a <i>"
        assert read_mark(path) is not None
        assert PIL.Image.open(io.BytesIO(path.read_bytes())).size == (64, 64)


def test_tool_tells_mistakes_and_opens_nothing(tool):
    async def conversation(session):
        asked = [{"prompt": "a <i>", "images": [place]} for place in PLACES]
        asked += [{"prompt": "a <i>"}, {"prompt": ""}, {"prompt": "a hat", "width": 63, "height": 64}]
        asked += [{"prompt": "a hat", "width": 1e9, "height": 64.0}, {"prompt": "a hat", "seed": 1e300}]
        return [await session.call_tool("draw_image", arguments) for arguments in asked]

    results = talk(tool[0], conversation, tool[1])
    texts = [result.content[0].text for result in results]
    assert all(result.isError for result in results)
    assert all("Addresses are not opened here" in text for text in texts[: len(PLACES)])
    assert not any("Traceback" in text or "\n" in text.strip() for text in texts)
    assert not any("went wrong" in text for text in texts)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "/etc/passwd"},
        {"type": "image", "url": "http://localhost:1/"},
        {"type": "image_url", "image_url": {"url": "http://localhost:1/"}},
    ],
)
def test_call_that_names_a_place_is_refused(tool, part):
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    call["params"] = {"name": "draw_image", "arguments": {"prompt": [part]}}
    headers = {**tool[1], "accept": "application/json, text/event-stream"}
    answer = httpx.post(tool[0], json=call, headers=headers)
    assert answer.status_code == 400 and "traceback" not in answer.text.lower()
    assert (
        httpx.post(tool[0], json=call, headers={**headers, "origin": "http://evil.example"}).status_code
        == 403
    )
    assert httpx.post(tool[0] + "sse", json={}, headers=headers).status_code in (404, 405)


def test_calls_of_the_tool_hold_little_memory_together(tool):
    place = urlsplit(tool[0])
    head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in tool[1].items())

    def ask():
        call = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        headers = {**tool[1], "accept": "application/json, text/event-stream"}
        return httpx.post(tool[0], json=call, headers=headers).status_code

    with contextlib.ExitStack() as stack:
        for _ in range(5):  # each may become 64 MB
            connection = socket.create_connection((place.hostname, place.port), timeout=30)
            stack.enter_context(contextlib.closing(connection))
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n".encode())
        wait_for(lambda: ask() == 503)
    wait_for(lambda: ask() == 200)
    many = b'{"jsonrpc": "2.0", "method": "ping", "params": [' + b"{}," * 100_000 + b"1]}"
    answer = httpx.post(tool[0], content=many, headers={**tool[1], "content-type": "application/json"})
    assert answer.status_code == 413 and "too many values" in answer.text


def test_tool_of_a_service_with_tokens_asks_for_one(app):
    with offering(tokens=Tokens([TOKEN]), mcp=True, wait=False) as running:
        assert httpx.post(running.url + TOOL, json={}).status_code == 401
    assert app.http.post(TOOL, json={}).status_code == 404  # it was not asked for
