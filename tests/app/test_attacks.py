"""Attacks on a running app that once went through, and their neighbours; what is refused before is in test_guard.py."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest
from PIL.ImageFile import ImageFile
from support.app import serving, slow_steps, wait_for

from kosmos_g_diffusers.generation.png import read_settings

httpx = pytest.importorskip("httpx", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")
gradio_client = pytest.importorskip("gradio_client", reason="pip install 'kosmos-g-diffusers[app]'")
pytest.importorskip("gradio", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")

from kosmos_g_diffusers.serving import images as images_module  # noqa: E402
from kosmos_g_diffusers.serving import queue, uploads  # noqa: E402

CAT = Path(__file__).parents[2] / "examples" / "images" / "cat.jpg"
API = "/gradio_api"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("attacks")) as running:
        yield running


@pytest.fixture
def http(app):
    with httpx.Client(base_url=app.url, timeout=60) as client:
        yield client


@pytest.fixture
def connect(app, tmp_path):
    def connect():
        folder = tmp_path / "downloads"
        return gradio_client.Client(app.url, verbose=False, analytics_enabled=False, download_files=folder)

    return connect


def send(http, *files):
    return http.post(f"{API}/upload", files=[("files", (name, body)) for name, body in files])


def reference(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}


def values_of(http, name="generate", **changes):
    """(index of a function, its values as the page begins with them and with changes)."""
    config = http.get("/config").json()
    entry = next(entry for entry in config["dependencies"] if entry["api_name"] == name)
    components = {component["id"]: component for component in config["components"]}
    values = [components[index]["props"].get("value") for index in entry["inputs"]]
    parameters = http.get(f"{API}/info").json()["named_endpoints"][f"/{name}"]["parameters"]
    names = ["session", *(parameter["parameter_name"] for parameter in parameters)]
    for field, value in changes.items():
        values[names.index(field)] = value
    return entry["id"], values


def join(http, session=None, name="generate", given=None, **changes):
    """Join the queue without listening, with what `values_of` gave before; returns the answer."""
    index, values = given or values_of(http, name, **changes)
    body = {"data": values, "fn_index": index, "session_hash": session or secrets.token_hex(8)}
    return http.post(
        f"{API}/queue/join", content=json.dumps(body), headers={"content-type": "application/json"}
    )


def call(http, name="generate", **changes):
    """Ask and listen; returns the last message."""
    session = secrets.token_hex(8)
    answer = join(http, session, name, **changes)
    if answer.status_code != 200:
        return answer.json()
    with http.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return json.loads(line.removeprefix("data:"))
    return None


def png(width, height, mode="RGB", **options):
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height)).save(file, "PNG", **options)
    return file.getvalue()


def uploads_of(app):
    found = os.walk(app.folder / "uploads")  # which bears with folders that are deleted meanwhile
    return {Path(folder, name) for folder, _, names in found for name in names if "examples" not in folder}


# 1. Other sites ------------------------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", f"{API}/info"),
    ("GET", f"{API}/file=uploads/x/cat.png"),
    ("GET", f"{API}/queue/data?session_hash=abc"),
    ("GET", f"{API}/heartbeat/abc"),
    ("GET", f"{API}/startup-events"),
    ("GET", f"{API}/upload_progress?upload_id=a"),
    ("GET", f"{API}/call/generate/abc"),
    ("GET", "/logout"),
    ("GET", "/theme.css"),
    ("POST", f"{API}/upload"),
    ("POST", f"{API}/queue/join"),
    ("POST", f"{API}/run/predict"),
    ("POST", f"{API}/call/generate"),
    ("POST", f"{API}/cancel"),
    ("POST", f"{API}/reset"),
    ("POST", f"{API}/component_server"),
    ("POST", "/login"),
    ("OPTIONS", f"{API}/upload"),
    ("GET", "/nothing"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_is_closed_to_other_sites(app, http, method, path):
    port = app.url.rpartition(":")[2]
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for status, headers in (
        (421, {"host": "evil.example"}),
        (421, {"host": f"evil.example:{port}"}),
        (421, {"x-forwarded-host": "evil.example"}),
        (403, {"origin": "https://evil.example"}),
        (403, {"origin": "null"}),
        (403, {"origin": f"http://localhost:{port}"}),
        (403, {"sec-fetch-site": "cross-site"}),
        (403, {"sec-fetch-site": "same-site"}),
    ):
        answer = http.request(method, path, headers={**headers, **(preflight if method == "OPTIONS" else {})})
        assert answer.status_code == status
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert "components" not in answer.text


def test_own_page_is_answered_without_leave_for_anybody_else(app, http):
    answer = http.get("/config", headers={"origin": app.url, "sec-fetch-site": "same-origin"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-frame-options"] == "DENY"
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert http.get("/", headers=headers).status_code == 200  # a link to it


def handshake(app, **headers):
    """First line of the answer to a websocket's beginning."""
    host, port = app.url.removeprefix("http://").split(":")
    given = {"Host": f"{host}:{port}", "Upgrade": "websocket", "Connection": "Upgrade"}
    given |= {"Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(), "Sec-WebSocket-Version": "13"}
    lines = ["GET /gradio_api/queue/join HTTP/1.1", *(f"{a}: {b}" for a, b in {**given, **headers}.items())]
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return connection.recv(1000).decode().partition("\r\n")[0]


def test_websockets_are_closed(app):
    for headers in ({}, {"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        assert " 101 " not in handshake(app, **headers) and re.search(
            " 4[0-9][0-9] ", handshake(app, **headers)
        )


# 2. Memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoding(monkeypatch):
    """How many images are decoded at the same time, at most."""
    count, most, lock = [0], [0], threading.Lock()

    def watch(original):
        def load(image, *args):
            if image.width * image.height < 500_000:
                return original(image, *args)
            with lock:
                count[0] += 1
                most[0] = max(most[0], count[0])
            try:
                time.sleep(0.02)
                return original(image, *args)
            finally:
                with lock:
                    count[0] -= 1

        return load

    monkeypatch.setattr(ImageFile, "load", watch(ImageFile.load))
    return most


def test_one_image_is_decoded_at_a_time_whatever_asks_for_it(app, http, decoding):
    path = send(http, ("large.png", png(1200, 900))).json()[0]
    strokes = f"data:image/png;base64,{base64.b64encode(png(64, 64, 'RGBA')).decode()}"
    line = next(
        entry
        for entry in http.get("/config").json()["dependencies"]
        if entry["targets"][0][1] == "load" and len(entry["inputs"]) == 4
    )  # the line below the prompt
    files = [reference(send(http, ("large.png", png(1200, 900 + n))).json()[0]) for n in range(4)]

    def ask(number):
        with httpx.Client(base_url=app.url, timeout=120) as client:
            if number % 2:
                body = {
                    "data": [None, "<i>", files, "sprites"],
                    "fn_index": line["id"],
                    "session_hash": f"s{number}",
                }
                return client.post(f"{API}/run/predict", json=body).status_code
            changes = {"kind": "tile", "picture": reference(path), "strokes": strokes}
            call(client, "preview_control_1", **changes)
            return 200

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(ask, range(8))) == {200}
    assert decoding == [1]


def test_what_would_be_drawn_too_large_is_refused_by_the_header(app, connect, http, monkeypatch):
    client = connect()
    for fields, message in (
        ({"control_1_picture": png(2048, 2048), "control_1_ready": True}, "1024 are possible"),
        ({"control_1_picture": png(8 * 700, 700), "height": 1024}, "1024 are possible"),
        ({"control_1_strokes": png(3000, 3000, "RGBA")}, "The strokes have 3000 x 3000 pixels"),
        ({"init_image": png(8 * 700, 700), "height": 1024}, "1024 are possible"),
        ({"mask": png(3000, 3000, "RGBA")}, "The strokes have 3000 x 3000 pixels"),
    ):
        for name, content in fields.items():
            if name in ("control_1_picture", "init_image"):
                file = Path(client.output_dir) / f"{secrets.token_hex(4)}.png"
                file.write_bytes(content)
                fields[name] = gradio_client.handle_file(str(file))
            elif name in ("control_1_strokes", "mask"):
                fields[name] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        if any(name.startswith("control_1") for name in fields):
            fields["control_1_kind"] = "tile"
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(prompt="a hat", steps=4, **fields, api_name="/generate")


def test_images_with_wide_channels_may_have_fewer_pixels(http):
    file = io.BytesIO()
    PIL.Image.new("I;16", (4000, 3000)).save(file, "PNG")
    answer = send(http, ("deep.png", file.getvalue()))
    assert answer.status_code == 413 and "more than 8 bits a channel has 12 million pixels" in answer.text


def test_images_of_a_prompt_are_small_before_the_next_is_opened(app, http, monkeypatch):
    kept, original = [], images_module.open_square

    def watch(*args):
        kept.append(original(*args))
        return kept[-1]

    monkeypatch.setattr("kosmos_g_diffusers.serving.job.open_square", watch)
    paths = send(http, ("a.png", png(1200, 900)), ("b.png", png(900, 1300))).json()
    told = call(http, prompt="<i> and <i>", pictures=[reference(path) for path in paths], steps=1)
    assert told["success"] and {image.size[0] for image in kept} == {kept[0].height}


def test_call_of_many_small_values_is_refused(http):
    data = ["[" * 1 + "1," * 0] * 10 + [[[]] * 30_000]
    answer = http.post(f"{API}/queue/join", json={"data": data, "fn_index": 0, "session_hash": "a"})
    assert answer.status_code == 413 and "too many values" in answer.text


# 3. Disk -------------------------------------------------------------------------------------------------------------


def half_an_upload(app, size=200_000):
    """Begin an upload and break it off when half of it has been sent."""
    host, port = app.url.removeprefix("http://").split(":")
    head = (
        f"POST {API}/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: multipart/form-data; boundary=xx\r\n"
        f"Content-Length: {size}\r\n\r\n--xx\r\n"
        'Content-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
    )
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(head.encode() + b"x" * (size // 2))
    return connection


def test_upload_that_is_broken_off_is_deleted_at_once(app):
    before = uploads_of(app)
    connections = [half_an_upload(app) for _ in range(5)]
    wait_for(lambda: len(uploads_of(app)) >= len(before) + 5)
    for connection in connections:
        connection.close()
    wait_for(lambda: uploads_of(app) == before, seconds=10)
    assert not [
        path for path in (app.folder / "uploads").iterdir() if path.is_dir() and not [*path.iterdir()]
    ]


def test_upload_that_falls_silent_is_broken_off(app, monkeypatch):
    monkeypatch.setattr(uploads, "SILENCE", 0.3)
    before = uploads_of(app)
    connection = half_an_upload(app)
    assert b" 408 " in connection.recv(100)
    assert uploads_of(app) == before
    connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--xx",
        b"--xx\r\n\r\nx\r\n--xx--",
        b'--xx\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx',
        b"--xx\r\n" + b"A: b\r\n" * 5000 + b"\r\n--xx--",
        b"garbage" * 100,
    ],
)
def test_upload_that_is_no_form_leaves_nothing(app, http, body):
    before = uploads_of(app)
    headers = {"content-type": "multipart/form-data; boundary=xx"}
    assert http.post(f"{API}/upload", content=body, headers=headers).status_code == 400
    assert http.post(f"{API}/upload", content=body).status_code == 400
    assert uploads_of(app) == before


def test_name_of_an_upload_leads_nowhere(app, http):
    for name in (
        "../../x.png",
        "..\\x.png",
        ".png",
        "/etc/x.png",
        "a\0b.png",
        "é ü.png",
        "." * 300 + "x.png",
    ):
        answer = send(http, (name, png(8, 8)))
        path = answer.json()[0]
        assert re.fullmatch(r"uploads/[0-9a-f]{32}/[^/]+\.png", path)
        assert (app.folder / path).is_file() and http.get(f"{API}/file={path}").status_code == 200


def test_files_that_lie_there_are_not_copied(app, http):
    paths = send(http, *((f"{n}.png", png(8, 8 + n)) for n in range(3))).json()
    images = [reference(path) for path in paths]

    def draw():
        assert call(http, prompt="<i><i><i>", pictures=images, steps=1)["success"]

    draw()
    before = uploads_of(app), {*(app.folder / "inputs").iterdir()}
    for _ in range(5):
        draw()
    assert (uploads_of(app), {*(app.folder / "inputs").iterdir()}) == before
    inodes = {path.stat().st_ino for path in before[1]}
    assert {(app.folder / path).stat().st_ino for path in paths} <= inodes


def test_full_disk_is_told_and_history_marks_what_was_removed(tmp_path):
    noise = io.BytesIO()
    PIL.Image.frombytes("RGB", (148, 147), os.urandom(148 * 147 * 3)).save(noise, "PNG")
    with (
        serving(tmp_path, limit=3 * 69_632) as app,
        httpx.Client(base_url=app.url, timeout=60) as http,
    ):
        paths = [send(http, (f"{number}.png", noise.getvalue())).json()[0] for number in range(8)]
        assert [(tmp_path / path).exists() for path in paths[:6]] == [False] * 6  # the oldest went
        assert call(http, prompt="<i>", pictures=[reference(paths[-1])], steps=1)["success"]
        drawn = next((tmp_path / "images").iterdir())
        told = call(http, prompt="<i>", pictures=[reference(paths[0])], steps=1)
        assert not told["success"] and "no longer on the server" in told["output"]["error"]
        app.service.store.limit = 69_632
        answer = send(http, ("x.png", noise.getvalue()))
        assert answer.status_code == 507 and "disk space of this server is used up" in answer.text
        assert drawn.exists() and str(tmp_path) not in answer.text

        from kosmos_g_diffusers.app.actions import REMOVED, Actions

        actions = Actions(app.service, [])
        assert [caption for _, caption in actions.gallery([drawn])] == [f"seed {read_settings(drawn).seed}"]
        drawn.unlink()
        assert actions.gallery([drawn]) == []  # by hand
        app.service.store.removed.add(drawn.name)
        ((shown, caption),) = actions.gallery([drawn])
        assert caption == REMOVED and Path(tmp_path, shown).is_file()


# 4. Fairness -----------------------------------------------------------------------------------------------------------


def test_one_session_cannot_fill_the_queue(app, connect):
    greedy, honest = connect(), connect()
    with slow_steps(app.service, 0.05):
        jobs = [greedy.submit(prompt="a hat", steps=40, api_name="/generate") for _ in range(10)]
        wait_for(lambda: len(app.service.worker._waiting) == 2 and app.service.worker._running)
        wait_for(lambda: sum(job.done() for job in jobs) == 7)
        mine = honest.submit(prompt="a hat", steps=1, api_name="/generate")
        assert "Done" in mine.result()[2]
        assert sum(not job.done() for job in jobs) >= 1  # its turn came before theirs
        greedy.predict(api_name="/cancel")
        told = [str(job.exception()) for job in jobs if job.exception()]
    assert len(told) == 7 and all("full for you: 2 of your runs are waiting" in text for text in told)


def test_run_that_nobody_listens_for_is_not_drawn(app, connect, http, monkeypatch):
    before, given = (
        len([*(app.folder / "images").iterdir()]),
        values_of(http, prompt="a hat", num_images=8, steps=250),
    )
    for number in range(10):
        assert join(http, f"deaf{number}", given=given).status_code == 200
    started = time.monotonic()
    assert "Done" in connect().predict(prompt="a hat", steps=1, api_name="/generate")[2]
    assert time.monotonic() - started < 60
    monkeypatch.setattr(queue, "LISTENER_COMES", 0.5)
    workers = (app.service.reading, app.service.worker)
    wait_for(lambda: not any(worker._waiting or worker._running for worker in workers))
    assert len([*(app.folder / "images").iterdir()]) == before + 1


def test_run_of_the_simple_endpoint_is_drawn_when_its_stream_is_opened(app, http):
    _, values = values_of(http, prompt="a hat", steps=1)
    event = http.post(f"{API}/call/generate", json={"data": values[1:]}).json()["event_id"]
    time.sleep(0.5)
    told = http.get(f"{API}/call/generate/{event}").text
    assert "event: complete" in told and "images/" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": "<i>", "pictures": [reference("uploads/" + "0" * 32 + "/gone.png")]},
            "no longer on the server",
        ),
        ({"prompt": "<i>", "pictures": [reference(None)]}, "A file was named that was not uploaded here"),
        ({"prompt": "<i>", "pictures": [{"meta": {"_type": "gradio.FileData"}}]}, ""),
        ({"prompt": "a \ud800 hat"}, "half of a surrogate pair"),
        ({"negative_prompt": "\udfff", "prompt": "x"}, "half of a surrogate pair"),
        ({"scheduler": "\ud83d", "prompt": "x"}, "half of a surrogate pair"),
        ({"prompt": [{"type": "image", "image": "/etc/passwd"}]}, "prompt: This is not a text"),
        ({"prompt": "x", "negative_prompt": {"image": "/etc/passwd"}}, "negative_prompt: This is not a text"),
        ({"prompt": "x", "regions": [1]}, "regions: This is not a text"),
        ({"prompt": "x", "steps": "many"}, ""),
        ({"prompt": "x", "steps": 1e400}, ""),
        ({"prompt": "x", "steps": -(10**30)}, ""),
        ({"prompt": "x", "model": {"path": "uploads/x"}}, ""),
        ({"prompt": "x", "pictures": "uploads/x/y.png"}, ""),
        (
            {"prompt": "x", "control_1_kind": "tile", "control_1_picture": reference("uploads/x/y.png")},
            "no longer",
        ),
        ({"prompt": "x", "control_1_kind": "tile", "control_1_strokes": 5}, ""),
        ({"prompt": "x", "control_1_kind": ["tile"]}, ""),
        ({"prompt": "x", "init_image": reference("uploads/x/y.png")}, "no longer"),
        ({"prompt": "x", "mask": 5}, ""),
        ({"prompt": "x", "strength": "much", "init_image": reference("uploads/x/y.png")}, ""),
        ({"prompt": "x", "lora_2": ["none"]}, ""),
    ],
)
def test_nonsense_is_answered_with_a_sentence_and_leaves_no_traceback(http, capfd, caplog, changes, message):
    told = call(http, **changes)
    text = told.get("error") or told["output"]["error"]
    assert isinstance(text, str) and len(text) > 20 and message in text
    logged = capfd.readouterr()
    assert "Traceback" not in logged.err + logged.out + caplog.text


# 5. Passwords ------------------------------------------------------------------------------------------------------------


def test_guesses_end_soon_and_the_cookie_is_for_the_page_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("kosmos_g_diffusers.serving.passwords.WAITS", (0.0, 0.05))
    with serving(tmp_path, auth=("anna", "secret")) as app:

        async def guesses():
            async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
                ask = [
                    client.post("/login", data={"username": "anna", "password": str(number)})
                    for number in range(100)
                ]
                return [answer.status_code for answer in await asyncio.gather(*ask)]

        with httpx.Client(base_url=app.url, timeout=60) as http:
            answer = http.post("/login", data={"username": "anna", "password": "secret"})
            cookies = answer.headers.get_list("set-cookie")
            assert cookies and all(
                "HttpOnly" in text and "samesite=strict" in text.lower() for text in cookies
            )
            assert http.get("/config").status_code == 200
            statuses = asyncio.run(guesses())
            assert statuses.count(400) == 10 and statuses.count(429) == 90
            assert "log-in of 'anna'" in caplog.text and "refused" in caplog.text
            answer = http.post("/login", data={"username": "anna", "password": "secret"})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
            assert http.get("/config").status_code == 200  # who is in stays in
        with httpx.Client(base_url=app.url, timeout=60) as stranger:
            for method, path in ROUTES:
                if path not in ("/", "/theme.css", "/login", "/logout", "/nothing"):
                    assert stranger.request(method, path).status_code in (401, 404, 405)
            for body in ({"username": "anna"}, {}, {"username": ["a", "b"], "password": ""}):
                assert stranger.post("/login", data=body).status_code in (400, 429)
            files = {"username": ("a", b"b"), "password": ("a", b"b")}
            assert stranger.post("/login", files=files).status_code == 400
            headers = {"x-forwarded-for": "9.9.9.9"}  # an address that anyone can claim
            form = {"username": "anna", "password": "x"}
            assert stranger.post("/login", data=form, headers=headers).status_code == 429


# 6. Files of others --------------------------------------------------------------------------------------------------------


def test_refusing_an_upload_takes_nothing_from_another_session(app, http):
    cat = CAT.read_bytes()
    (mine,) = send(http, ("cat.jpg", cat)).json()
    for bad in (("x.html", b"<b>"), ("x.png", b"<b>"), ("x.png", png(7000, 7000))):
        assert send(http, ("cat.jpg", cat), bad).status_code in (413, 415)
        assert (app.folder / mine).read_bytes() == cat
    (other,) = send(http, ("cat.jpg", cat)).json()
    assert mine != other  # what a file holds does not tell where it lies
    assert call(http, prompt="<i>", pictures=[reference(mine)], steps=1)["success"]


def test_saved_words_have_a_name_that_nobody_can_guess(connect):
    client = connect()
    client.predict(name="cat", pictures=[gradio_client.handle_file(str(CAT))], api_name="/add_word")
    answer = client.submit(api_name="/save_words")
    path = Path(answer.result())
    assert path.is_file() and path.suffix == ".safetensors"
    assert path.parent.name != "uploads"


# 8. Kinds of content ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["application/JSON", "Application/Json; charset=utf-8", "text/plain", "application/ld+json", None]
)
def test_call_is_looked_through_whatever_it_is_called(app, http, kind, capfd, caplog):
    headers = {} if kind is None else {"content-type": kind}
    body = json.dumps({"data": [[reference("/etc/passwd")]], "fn_index": 0, "session_hash": "abc"})
    for path in ("queue/join", "run/predict", "call/generate"):
        answer = http.post(f"{API}/{path}", content=body, headers=headers)
        assert answer.status_code in (400, 415) and len(answer.json()["error"]) > 20
    logged = capfd.readouterr()
    assert "Traceback" not in logged.err + caplog.text


CONTENT = [
    {"data": [{"type": "image", "path": "/etc/passwd"}]},
    {"data": [{"type": "image", "url": "https://example.org/x.png"}]},
    {"data": [{"type": "image", "url": "file:///etc/passwd"}]},
    {"data": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]},
    {"data": [{"type": "image_url", "image_url": "http://127.0.0.1/x.png"}]},
    {"data": [{"type": "image_url", "image_url": 5}]},
    {"data": [[[{"role": "user", "content": [{"type": "image", "path": "../x.png"}]}]]]},
    {"data": ["x"], "event_data": {"path": "/etc/passwd"}},
]


@pytest.mark.parametrize("content", CONTENT)
def test_chat_content_that_names_a_place_is_refused(http, content):
    for path in ("queue/join", "run/predict", "api/predict", "call/generate", "call/v2/generate"):
        body = {**content, "fn_index": 0, "session_hash": "abc"}
        answer = http.post(f"{API}/{path}", json=body)
        assert answer.status_code == 400 and len(answer.json()["error"]) > 20


def test_random_calls_never_fail_in_the_server(app, http, capfd, caplog):
    """Bodies of right and wrong parts, for every function and route."""
    import random

    drawn = random.Random(0)
    indices = [entry["id"] for entry in http.get("/config").json()["dependencies"]]
    parts = [None, 0, -1, 1.5, True, "", "x", "\u0000", [], {}, [None], ["a"] * 60, {"a": 1}, 10**40]
    parts += [{"index": 5, "value": 1}, {"index": [1], "value": None}, reference("uploads/a/b.png"), [[1, 2]]]
    paths = ["queue/join", "run/predict", "api/generate", "run/generate", "call/generate", "call/v2/generate"]
    paths += ["call/v2/cancel", "call/nothing", "call/v2/nothing", "run/nothing", "cancel", "reset"]
    for _ in range(300):
        body = {"data": [drawn.choice(parts) for _ in range(drawn.choice([0, 1, 2, 4, 5]))]}
        for name in (
            "fn_index",
            "session_hash",
            "event_data",
            "trigger_id",
            "event_id",
            "simple_format",
            "batched",
        ):
            if drawn.random() < 0.6:
                body[name] = drawn.choice(
                    [*parts, drawn.choice(indices), drawn.choice(indices), "abc", "abc"]
                )
        if drawn.random() < 0.1:
            body["data"] = drawn.choice(parts)
        path = drawn.choice(paths)
        answer = http.post(f"{API}/{path}", json=body)
        assert answer.status_code < 500, (path, body, answer.text)
        if answer.status_code >= 400:
            assert "null" not in answer.text.partition('"error"')[2][:8], (path, body, answer.text)
    for session in ("nobody", "", "a" * 500):
        with contextlib.suppress(httpx.HTTPError):
            http.get(f"{API}/queue/data", params={"session_hash": session}, timeout=5)
    logged = capfd.readouterr()
    assert "Traceback" not in logged.err + logged.out
    assert "Traceback" not in caplog.text


# 9. Runs beside each other -----------------------------------------------------------------------------------------------


def test_runs_of_all_schedulers_with_words_that_are_added_meanwhile_are_as_when_drawn_alone(app, connect):
    clients = [connect() for _ in range(6)]
    names = ["dpm", "euler", "ddim", "unipc"]
    jobs = [(number % 6, names[number % 4], number) for number in range(24)]

    def draw(job):
        number, scheduler, seed = job
        fields = {"prompt": "a hat", "steps": 3, "surprise": False, "seed": seed, "scheduler": scheduler}
        images, *_ = clients[number].predict(**fields, api_name="/generate")
        return PIL.Image.open(images[0]["image"]).tobytes(), read_settings(images[0]["image"])

    def add(number):
        cat = [gradio_client.handle_file(str(CAT))]
        return clients[number % 6].predict(name=f"w{number}", pictures=cat, api_name="/add_word")

    by_client = [[job for job in jobs if job[0] == number] for number in range(6)]
    with ThreadPoolExecutor(12) as threads:
        words = [threads.submit(add, number) for number in range(6)]
        drawn = [
            result
            for results in threads.map(lambda own: list(map(draw, own)), by_client)
            for result in results
        ]
        assert all(word.result() for word in words)
    flat = [job for own in by_client for job in own]
    for job, (_, settings) in zip(flat, drawn, strict=True):
        assert (settings.scheduler, settings.seed) == job[1:]
    alone = dict(zip(flat[::5], map(draw, flat[::5]), strict=True))
    for job, (pixels, _) in zip(flat, drawn, strict=True):
        if job in alone:
            assert pixels == alone[job][0]
    assert len({pixels for pixels, _ in drawn}) == 24
