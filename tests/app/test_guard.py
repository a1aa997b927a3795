"""What a stranger can do with a running app: raw requests, as a browser or gradio_client would never send them."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import PIL.Image
import pytest
from support.app import serving, slow_steps, wait_for

httpx = pytest.importorskip("httpx", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")
pytest.importorskip("gradio", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")

from kosmos_g_diffusers.app.page import Page  # noqa: E402  it needs gradio

CAT = Path(__file__).parents[2] / "examples" / "images" / "cat.jpg"
FILE = "/gradio_api/file="


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    (folder / "private.png").write_bytes(CAT.read_bytes())  # next to the folders that are served
    with serving(folder) as running:
        yield running


@pytest.fixture
def http(app):
    with httpx.Client(base_url=app.url, timeout=60) as client:
        yield client


def upload(http, *files):
    return http.post("/gradio_api/upload", files=[("files", (name, body)) for name, body in files])


def call(http, app, images, prompt="<i>", **changes):
    """Ask for a run as gradio's own page does, with `images` as the value of its field; returns all that comes back."""
    config = http.get("/config").json()
    run = next(entry for entry in config["dependencies"] if entry["api_name"] == "generate")
    components = {entry["id"]: entry for entry in config["components"]}
    values = [components[index]["props"].get("value") for index in run["inputs"]]
    names = ["session", *app.fields]
    values[names.index("prompt")] = prompt
    values[names.index("pictures")] = images
    values[names.index("steps")] = 1
    for name, value in changes.items():
        values[names.index(name)] = value
    body = {"data": values, "fn_index": run["id"], "session_hash": os.urandom(4).hex()}
    answer = http.post("/gradio_api/queue/join", json=body)
    if answer.status_code != 200:
        return answer.text
    told = ""
    with http.stream(
        "GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}
    ) as stream:
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line:
                return told
    return told


@pytest.fixture(scope="module", autouse=True)
def fields(app):
    names = list(Page(app.service, controls=True).fields)
    app.fields = names
    return names


def reference(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}


def test_uploaded_image_is_drawn_with(app, http):
    path = upload(http, ("cat.jpg", CAT.read_bytes())).json()[0]
    assert not os.path.isabs(path)
    told = call(http, app, [reference(path)])
    assert '"success":true' in told and "images/" in told
    assert str(app.folder) not in told


@pytest.mark.parametrize(
    "path",
    [
        "{folder}/private.png",
        "private.png",
        "../private.png",
        "uploads/../private.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "file://{folder}/private.png",
        "http://127.0.0.1:{port}/cat.png",
        "https://example.org/cat.png",
        "//127.0.0.1:{port}/cat.png",
    ],
)
def test_string_in_the_place_of_an_image_is_never_opened(app, http, path, monkeypatch):
    asked = []
    for name in ("ssrf_protected_download", "async_ssrf_protected_download", "save_file_to_cache"):
        monkeypatch.setattr(f"gradio.processing_utils.{name}", lambda *args, **kwargs: asked.append(args))
    opened = []
    original = PIL.Image.open
    monkeypatch.setattr(
        PIL.Image, "open", lambda *args, **kwargs: (opened.append(args), original(*args, **kwargs))[1]
    )
    path = path.format(folder=app.folder, port=app.url.rpartition(":")[2])
    forms = (
        [reference(path)],
        [{**reference("uploads/x.png"), "url": path}],
        [path],
        path,
        [{"path": path}],
        {"path": path, "url": path},
    )
    for images in forms:
        told = call(http, app, images)
        assert '"success":true' not in told and "images/" not in told
        assert str(app.folder) not in told.replace(path, "")
    control = {"control_1_kind": "tile", "control_1_picture": {**reference(path), "url": path}}
    assert '"success":true' not in call(http, app, None, prompt="x", **control)
    change = {"init_image": {**reference(path), "url": path}}
    assert '"success":true' not in call(http, app, None, prompt="x", **change)
    assert '"success":true' not in call(http, app, None, prompt="x", lora=path)
    assert '"success":true' not in call(http, app, None, prompt="x", lora_2=path)
    assert '"success":true' not in call(http, app, None, prompt="x", model=path)
    assert not asked and not opened


def test_words_that_look_like_files_are_words(app, http, monkeypatch):
    opened, original = [], PIL.Image.open
    monkeypatch.setattr(
        PIL.Image,
        "open",
        lambda file, *args, **kw: (opened.append(str(file)), original(file, *args, **kw))[1],
    )
    for text in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png"):
        assert '"success":true' in call(http, app, None, prompt=text, negative_prompt=text)
    # only what was drawn, for its settings
    assert opened and all(Path(path).parent.name == "images" for path in opened)


@pytest.mark.parametrize(
    "name",
    [
        "{folder}/private.png",
        "private.png",
        "images/../private.png",
        "images/..%2fprivate.png",
        "uploads/%2e%2e/private.png",
        "./private.png",
        "/etc/passwd",
        "//etc/passwd",
        "http://127.0.0.1:1/x.png",
        "file:///etc/passwd",
        "inputs/",
        ".gradio/certificate.pem",
        "{package}/app.py",
    ],
)
def test_only_the_output_folder_is_served(app, http, name):
    package = Path(__file__).parents[2] / "src" / "kosmos_g_diffusers"
    answer = http.get(FILE + name.format(folder=app.folder, package=package))
    assert answer.status_code in (403, 404)
    assert str(app.folder) not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/stream/x/y/z/playlist.m3u8",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
        "/gradio_api/dev/reload",
        "/gradio_api/vibe-code/",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/../../etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/routes.py",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(http, path):
    assert http.get(path).status_code in (403, 404)


@pytest.mark.parametrize(
    "path", ["component_server", "process_recording", "vibe-edit/", "stream/x", "undo-vibe-edit/"]
)
def test_posts_that_the_page_does_not_need_are_closed(http, path):
    assert http.post(f"/gradio_api/{path}", json={}).status_code == 404


def bomb(side):
    """A PNG of a few kilobytes that says it has side x side pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("large.png", bomb(7_000), "49 million pixels; it may have 40 million"),
        ("bomb.png", bomb(20_000), "million pixels"),
        ("huge.png", bomb(2**31 - 1), "pi"),
        ("page.html", b"<script>alert(1)</script>", "not an image"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        ("page.png", b"<script>alert(1)</script>", "not an image that can be read"),
        ("weights.pt", b"\x80\x04", "not an image"),
    ],
)
def test_upload_that_is_not_an_image_of_a_sane_size_is_refused_and_deleted(app, http, name, body, message):
    before = set((app.folder / "uploads").rglob("*.*"))
    answer = upload(http, (name, body))
    assert answer.status_code in (413, 415) and message in answer.text
    assert not [path for path in set((app.folder / "uploads").rglob("*.*")) - before if path.is_file()]
    assert str(app.folder) not in answer.text


def test_uploads_are_limited_in_number_and_bytes(app, http):
    small = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(small, "PNG")
    files = [(f"{index}.png", small.getvalue()) for index in range(11)]
    assert len(upload(http, *files[:10]).json()) == 10
    assert upload(http, *files).status_code == 413
    answer = upload(http, ("large.png", b"\0" * (21 * 2**20)))
    assert answer.status_code == 413
    answer = http.post(
        "/gradio_api/queue/join", json={"data": ["x" * (5 * 2**20)], "fn_index": 0, "session_hash": "a"}
    )
    assert answer.status_code == 413


def test_body_without_a_length_is_limited_too(http):
    def endless():
        for _ in range(300):
            yield b" " * 2**20

    answer = http.post(
        "/gradio_api/queue/join", content=endless(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_file_of_another_cannot_act_as_a_page(app, http):
    path = upload(http, ("cat.jpg", CAT.read_bytes())).json()[0]
    headers = http.get(FILE + path).headers
    assert headers["x-content-type-options"] == "nosniff" and "sandbox" in headers["content-security-policy"]


def test_page_that_is_not_the_first_of_its_process_may_tell_that_it_was_opened(app, http):
    for entry in http.get("/config").json()["dependencies"]:
        if [app.blocks._id, "load"] in entry["targets"]:
            body = {
                "data": [],
                "fn_index": entry["id"],
                "trigger_id": app.blocks._id,
                "session_hash": "opening",
            }
            if not entry["inputs"]:
                assert http.post("/gradio_api/run/predict", json=body).status_code == 200
    body["trigger_id"] = 10**6
    assert http.post("/gradio_api/run/predict", json=body).status_code == 400


def test_answers_to_nonsense_hold_no_trace(app, http):
    for body in (
        "{",
        "[" * 100_000,
        '{"data": [{"path": 5}]}',
        '{"data": 1, "fn_index": 999, "session_hash": "x"}',
        "null",
    ):
        for path in ("queue/join", "run/predict", "call/generate", "cancel"):
            answer = http.post(
                f"/gradio_api/{path}", content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code >= 400 or path == "cancel"
            assert "Traceback" not in answer.text and "site-packages" not in answer.text


def test_page_and_configuration_tell_no_path(app, http):
    told = http.get("/").text + http.get("/config").text + http.get("/gradio_api/info").text
    for secret in (
        str(app.folder),
        str(Path(__file__).parents[2]),
        os.path.expanduser("~") + "/",
        "site-packages",
    ):
        assert secret not in told


def test_app_listens_on_this_machine_alone(app):
    with open("/proc/net/tcp", encoding="ascii") as table:
        port = f":{int(app.url.rpartition(':')[2]):04X}"
        listening = [
            line.split()[1] for line in table if line.split()[1].endswith(port) and line.split()[3] == "0A"
        ]
    assert listening == [f"0100007F{port}"]  # 127.0.0.1
    assert app.blocks.share_url is None


def test_page_that_is_closed_ends_its_run(app, http):
    with slow_steps(app.service, 0.2) as steps:
        config = http.get("/config").json()
        run = next(entry for entry in config["dependencies"] if entry["api_name"] == "generate")
        components = {entry["id"]: entry for entry in config["components"]}
        values = [components[index]["props"].get("value") for index in run["inputs"]]
        names = ["session", *app.fields]
        values[names.index("prompt")], values[names.index("steps")] = "a hat", 200
        body = {"data": values, "fn_index": run["id"], "session_hash": "closing"}
        http.post("/gradio_api/queue/join", json=body)
        with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "closing"}) as stream:
            next(line for line in stream.iter_lines() if "Step 2" in line)
        wait_for(lambda: app.service.worker._running is None, seconds=30)
        assert len(steps) < 100


def test_password_is_asked_for(tmp_path):
    with (
        serving(tmp_path, auth=("anna", "secret")) as app,
        httpx.Client(base_url=app.url, timeout=60) as http,
    ):
        assert upload(http, ("cat.jpg", CAT.read_bytes())).status_code == 401
        assert http.get("/config").status_code == 401
        assert http.get(FILE + "images/x.png").status_code == 401
        assert (
            http.post(
                "/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}
            ).status_code
            == 401
        )
        assert json.dumps("components") not in http.get("/").text or '"components":[]' in http.get("/").text
        assert http.post("/login", data={"username": "anna", "password": "wrong"}).status_code == 400
        assert http.post("/login", data={"username": "anna", "password": "secret"}).status_code == 200
        assert http.get("/config").status_code == 200
