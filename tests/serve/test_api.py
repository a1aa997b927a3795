"""The service over HTTP: what it draws is what `kosmos-g generate` draws, what it refuses is a sentence."""

import base64
import io
import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load
from support.app import slow_steps, wait_for
from support.loras import make_lora, with_prefix

pytest.importorskip("fastapi_offline", reason="pip install 'kosmos-g-diffusers[serve]'")
from support.service import data_url, images_of, offering, pixels, png_bytes  # noqa: E402

from kosmos_g_diffusers import KosmosGPipeline  # noqa: E402
from kosmos_g_diffusers.generation.generate import add_loras, generate_images, pipeline_for  # noqa: E402
from kosmos_g_diffusers.generation.png import read_settings  # noqa: E402
from kosmos_g_diffusers.generation.schedulers import make_scheduler  # noqa: E402
from kosmos_g_diffusers.generation.settings import LoraInput  # noqa: E402
from kosmos_g_diffusers.provenance import COMPOSITE, DRAWN, read_mark  # noqa: E402
from kosmos_g_diffusers.serve import batches  # noqa: E402
from kosmos_g_diffusers.serve.tokens import Tokens  # noqa: E402

GENERATIONS, EDITS, CONDITIONS = "/v1/images/generations", "/v1/images/edits", "/v1/conditions"
QUICK = {"steps": 2, "seed": 3}
TOKEN = "a-token-that-is-long-enough"


@pytest.fixture(scope="module")
def app():
    with offering() as running:
        yield running


@pytest.fixture(scope="module")
def own(app):
    """The served model, loaded once more."""
    return KosmosGPipeline.from_pretrained(app.folder)


@pytest.fixture
def saved(tmp_path):
    """Function from the bytes of a PNG to its settings."""

    def save(content):
        path = tmp_path / "image.png"
        path.write_bytes(content)
        return read_settings(path)

    return save


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text
    (name,) = answer.json()
    error = answer.json()[name]
    assert name == "error" and set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and error["message"].endswith(".")
    return error


# What is drawn -------------------------------------------------------------------------------------------------------


def test_image_is_that_of_generate_with_its_settings_and_mark(app, own, photos, saved, tmp_path):
    body = {**QUICK, "prompt": "a <i> in a <i> hat", "negative_prompt": "red", "guidance_scale": 3}
    body |= {"size": "48x64", "scheduler": "euler", "images": [data_url(photo) for photo in photos[:2]]}
    answer = app.http.post(GENERATIONS, json=body)
    (content,) = images_of(answer)
    settings = saved(content)
    assert (settings.prompt, settings.negative_prompt, settings.seed) == ("a <i> in a <i> hat", "red", 3)
    assert (settings.width, settings.height, settings.scheduler, settings.steps) == (48, 64, "euler", 2)
    assert len(settings.images) == 2 and settings.guidance == 3
    assert answer.json()["size"] == "48x64" and answer.json()["data"][0]["seed"] == 3
    own.scheduler = make_scheduler("euler", own.scheduler.config)
    ((image, expected),) = generate_images(own, settings, photos[:2])
    assert np.array_equal(pixels(content), np.asarray(image))
    assert replace(expected, versions={}) == replace(settings, versions={})
    assert read_mark(tmp_path / "image.png").source_type == DRAWN


def test_null_is_the_default_as_in_openais_api(app):
    names = "n size response_format output_format quality background style moderation stream guidance_scale scheduler loras controls"
    given = {**QUICK, "prompt": "a hat", "images": None, "user": None, "model": None, "negative_prompt": None}
    answer = app.http.post(GENERATIONS, json={**given, **dict.fromkeys(names.split())})
    assert images_of(answer) == images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat"}))
    assert error_of(app.http.post(GENERATIONS, json={**given, "colour": None}))["param"] == "colour"


def test_images_of_one_request_have_the_seeds_that_follow(app, saved):
    several = images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat", "n": 3}))
    assert [saved(content).seed for content in several] == [3, 4, 5]
    for content in several:
        alone = {"prompt": "a hat", "steps": 2, "seed": saved(content).seed}
        (same,) = images_of(app.http.post(GENERATIONS, json=alone))
        assert np.abs(pixels(same).astype(int) - pixels(content)).max() <= 1
    assert not np.array_equal(pixels(several[0]), pixels(several[1]))


def test_seed_that_was_not_given_is_drawn_and_told(app, saved):
    answers = [app.http.post(GENERATIONS, json={"prompt": "a hat", "steps": 1}) for _ in range(2)]
    seeds = [saved(images_of(answer)[0]).seed for answer in answers]
    assert seeds[0] != seeds[1] == answers[1].json()["data"][0]["seed"]


def test_uploads_data_urls_and_chat_content_are_the_same_images(app, photos, saved):
    text = {**QUICK, "prompt": "<i> in <i>"}
    given = {**text, "images": [data_url(photo) for photo in photos[:2]]}
    (expected,) = images_of(app.http.post(GENERATIONS, json=given))
    files = [("image", (f"{name}.png", png_bytes(photo))) for name, photo in zip("ab", photos, strict=False)]
    (uploaded,) = images_of(app.http.post(EDITS, data=text, files=files))
    assert [image.path for image in saved(uploaded).images] == ["a.png", "b.png"]
    listed = [("image[]", file) for _, file in files]
    (as_list,) = images_of(app.http.post(EDITS, data=text, files=listed))
    content = [
        {"type": "image_url", "image_url": {"url": data_url(photos[0])}},
        {"type": "text", "text": "in"},
        {"type": "image_url", "image_url": {"url": data_url(photos[1])}},
    ]
    (chat,) = images_of(app.http.post(GENERATIONS, json={**text, "prompt": content}))
    message = [{"role": "user", "content": content}]
    (said,) = images_of(app.http.post(GENERATIONS, json={**text, "prompt": message}))
    for other in (uploaded, as_list, chat, said):
        assert np.array_equal(pixels(other), pixels(expected))


@pytest.mark.parametrize("mask", [None, "transparent", "light"])
def test_image_is_changed_as_our_pipelines_change_it(app, own, photos, saved, tmp_path, mask):
    photo, files = photos[3].resize((64, 64)), {}
    hole = PIL.Image.new("L", (64, 64))
    hole.paste(255, (0, 0, 32, 64))
    if mask == "transparent":
        shown = photo.copy()
        shown.putalpha(hole.point(lambda value: 255 - value))
        files["mask"] = png_bytes(shown)
    elif mask == "light":
        files["mask"] = png_bytes(hole)
    files["init_image"] = ("photo.png", png_bytes(photo))
    data = {"prompt": "a hat", "steps": 4, "seed": 1, "strength": 0.5, "guidance_scale": 2}
    (content,) = images_of(app.http.post(EDITS, data=data, files=files))
    settings = saved(content)
    assert (settings.strength, settings.init_image.path) == (0.5, "photo.png")
    assert (settings.mask is not None) == (mask is not None)
    pipe = pipeline_for(own, settings)
    pipe.scheduler = make_scheduler("dpm", own.scheduler.config)
    options = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    if mask is not None:
        options |= {"mask_image": hole, "height": 64, "width": 64}
    generator = torch.Generator().manual_seed(1)
    (expected,) = pipe("a hat", image=photo, generator=generator, **options).images
    assert np.abs(pixels(content) / 255 - expected).max() < 2 / 255
    assert read_mark(tmp_path / "image.png").source_type == COMPOSITE
    changed = [photo] if mask is None else [photo, hole]
    ((again, _),) = generate_images(pipe, settings, [], changed=changed)
    assert np.array_equal(np.asarray(again), pixels(content))


def test_controls_and_their_images_decide(app, photos, saved):
    control = {"kind": "canny", "image": data_url(photos[3].resize((64, 64)))}
    (drawn,) = images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat", "controls": [control]}))
    (plain,) = images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat"}))
    assert saved(drawn).controls[0].name == "canny"
    assert not np.array_equal(pixels(drawn), pixels(plain))
    form = {**QUICK, "prompt": "a hat", "controls": json.dumps([control])}
    (same,) = images_of(app.http.post(EDITS, data=form, files={"user": (None, "me")}))
    assert np.array_equal(pixels(same), pixels(drawn))


def test_loras_act_together_with_their_scales(photos, saved, build_pipe, tmp_path):
    from safetensors.torch import save_file

    loras = tmp_path / "loras"
    loras.mkdir()
    with offering() as app:
        unet = KosmosGPipeline.from_pretrained(app.folder).unet
    for seed, name in enumerate(("one", "two")):
        save_file(with_prefix(make_lora(unet, seed)), loras / f"{name}.safetensors")
    with offering(lora_folder=loras) as app:
        assert app.http.get("/v1/models").json()["data"][0]["loras"] == ["one.safetensors", "two.safetensors"]
        body, pictures = {**QUICK, "prompt": "a hat", "scheduler": "ddim"}, []
        asked = [{"name": "one.safetensors", "scale": 0.5}, {"name": "two.safetensors", "scale": 1.5}]
        for given in (asked, asked[:1], asked[1:], [], asked):
            (content,) = images_of(app.http.post(GENERATIONS, json={**body, "loras": given}))
            pictures.append(pixels(content))
            assert [(lora.path, lora.scale) for lora in saved(content).all_loras] == [
                (lora["name"], lora["scale"]) for lora in given
            ]
        own = KosmosGPipeline.from_pretrained(app.folder)
    add_loras(own, [LoraInput(str(loras / lora["name"]), lora["scale"]) for lora in asked])
    own.scheduler = make_scheduler("ddim", own.scheduler.config)
    settings = replace(saved(content), lora=None, loras=())
    ((expected, _),) = generate_images(own, settings, [])
    assert np.array_equal(pictures[0], np.asarray(expected)) and np.array_equal(pictures[0], pictures[4])
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_conditions_are_those_of_encode_prompt(app, own, photos):
    body = {"prompt": "a <i>", "images": [data_url(photos[0])], "negative_prompt": "red"}
    answer = app.http.post(CONDITIONS, json=body)
    assert answer.status_code == 200
    found = load(answer.content)
    expected = own.encode_prompt("a <i>", images=[photos[0]], negative_prompt="red")
    for name, states in zip(("prompt_embeds", "negative_prompt_embeds"), expected, strict=True):
        assert found[name].shape == (77, own.text_encoder.config.aligner_hidden_size)
        assert torch.allclose(found[name], states[0], atol=1e-5)


def test_images_whose_states_are_known_are_not_encoded_again(app, photos):
    body = {**QUICK, "prompt": "a <i>", "images": [data_url(photos[2])]}
    images_of(app.http.post(GENERATIONS, json=body))
    before = [app.models.vision_cache_count(name) for name in ("hits", "misses")]
    images_of(app.http.post(GENERATIONS, json={**body, "prompt": "the <i> hat"}))
    after = [app.models.vision_cache_count(name) for name in ("hits", "misses")]
    assert after == [before[0] + 1, before[1]]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [{"type": "image", "path": "/etc/passwd"}],
        [{"type": "image", "url": "http://localhost/x.png"}],
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        [{"type": "image_url", "image_url": "https://example.org/x.png"}],
        [{"type": "image", "image": "/etc/passwd"}],
        [{"type": "image", "source": {"type": "url", "url": "http://localhost/"}}],
        [{"role": "user", "content": [{"type": "image", "path": "x.png"}]}],
        [{"type": "image", "image": {"path": "x.png"}}],
    ],
)
def test_no_path_and_no_address_is_opened(app, prompt):
    for answer in (
        app.http.post(GENERATIONS, json={**QUICK, "prompt": prompt}),
        app.http.post(CONDITIONS, json={"prompt": prompt}),
        app.http.post(EDITS, files={"prompt": (None, json.dumps(prompt))}),
    ):
        assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "http://localhost/x.png", "file:///etc/passwd", "x.png", ""]
)
def test_images_are_no_places(app, place):
    for name in (GENERATIONS, CONDITIONS):
        answer = app.http.post(name, json={"prompt": "<i>", "images": [place]})
        assert "Addresses are not opened here" in error_of(answer)["message"]
    for field in ("image", "init_image", "mask"):
        answer = app.http.post(EDITS, files={"prompt": (None, "a hat"), field: (None, place)})
        assert error_of(answer)["param"] == field
    control = {"kind": "canny", "image": place}
    assert (
        error_of(app.http.post(GENERATIONS, json={"prompt": "x", "controls": [control]}))["param"]
        == "controls"
    )


@pytest.mark.parametrize(
    "change, param, words",
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": ""}, "prompt", "Say what to draw"),
        ({"prompt": "<i>"}, "prompt", "1 '<i>' marks but 0 images"),
        ({"prompt": "a <my-dog>"}, "prompt", "names no image word"),
        ({"prompt": "a " * 1500}, "prompt", "tokens long"),
        ({"prompt": "x\ud800"}, None, "surrogate"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": "many"}, "n", "integer"),
        ({"size": "65x64"}, "size", "multiples of 8"),
        ({"size": "\uff16\uff14x64"}, "size", "multiples of 8"),
        ({"size": "4096x4096"}, "size", "1024"),
        ({"steps": 10_000}, "steps", "less than or equal to 250"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"guidance_scale": float("1e9")}, "guidance_scale", "30"),
        ({"scheduler": "best"}, "scheduler", "expected one of"),
        ({"colour": "red"}, "colour", "There is no parameter 'colour'"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"stream": True}, "stream", "False"),
        ({"prompt": "<i>", "images": ["data:image/png;base64,AAAA"]}, "images", "not an image"),
        ({"images": ["data:image/png;base64,?"]}, "images", "data: URL"),
        ({"loras": [{"name": "x"}]}, "loras", "There is no LoRA 'x'"),
        ({"controls": [{"kind": "x", "image": "data:,"}]}, "controls", "data: URL"),
    ],
)
def test_mistakes_are_a_sentence_with_the_field(app, change, param, words):
    content = json.dumps({**QUICK, "prompt": "a hat", **change})
    answer = app.http.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert error["param"] == param and words in error["message"]


def test_other_bodies_methods_and_models_are_sentences(app):
    http = app.http
    assert "application/json" in error_of(http.post(GENERATIONS, content=b"{}"), 415)["message"]
    assert (
        "JSON"
        in error_of(http.post(GENERATIONS, content=b"{", headers={"content-type": "application/json"}))[
            "message"
        ]
    )
    assert error_of(http.post(EDITS, json={"prompt": "x"}), 415)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert "form" in error_of(http.post(EDITS, content=b"--y\r\n", headers=broken))["message"]
    assert (
        error_of(
            http.post(EDITS, data={"prompt": "x"}, files={"mask": png_bytes(PIL.Image.new("L", (8, 8)))})
        )["param"]
        == "init_image"
    )
    assert (
        error_of(http.post(GENERATIONS, json={"prompt": "x", "model": "dall-e-3"}), 404)["code"]
        == "model_not_found"
    )
    assert error_of(http.get("/v1/models/x"), 404)
    for method, path, status in (("GET", GENERATIONS, 405), ("GET", "/nothing", 404), ("DELETE", "/", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_large_images_are_refused_by_their_headers(app):
    bomb = io.BytesIO()
    PIL.Image.new("1", (8000, 8000)).save(bomb, "PNG")
    answer = app.http.post(EDITS, data={"prompt": "<i>"}, files={"image": bomb.getvalue()})
    assert "million pixels" in error_of(answer)["message"]
    answer = app.http.post(
        GENERATIONS, content=b" " * (65 * 2**20), headers={"content-type": "application/json"}
    )
    assert "64 MB" in error_of(answer, 413)["message"]


def resident(name):
    return (
        int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1e6
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not count it")
def test_many_large_images_take_little_memory(app):
    large = io.BytesIO()
    PIL.Image.new("1", (6000, 6000), 1).save(large, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(large.getvalue()).decode()}"
    controls = [{"kind": kind, "image": url} for kind in ("canny", "canny", "canny")]
    form = {**QUICK, "prompt": "<i> and <i>", "controls": json.dumps(controls), "strength": 1}
    files = [(name, large.getvalue()) for name in ("image", "image", "init_image", "mask")]
    images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat"}))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    answers = []

    def ask():
        answers.append(app.http.post(EDITS, data=form, files=files))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        images_of(answer)
    assert resident("VmHWM") - before < 1.0


def test_large_images_count_until_they_are_made_small(app, monkeypatch, photos):
    entered, goes_on = [], threading.Event()

    def wait_and_prepare(*given):
        entered.append(given)
        assert goes_on.wait(60)
        return prepare(*given)

    prepare = batches.prepare
    monkeypatch.setattr(batches, "prepare", wait_and_prepare)
    form = {"files": {"init_image": png_bytes(photos[0])}, "data": {**QUICK, "prompt": "a hat"}}
    request = app.http.build_request("POST", EDITS, **form)
    kind, body, answers = request.headers["content-type"], request.read(), []

    def ask():  # without a length, so that each counts as the largest
        answer = app.http.post(EDITS, content=iter([body]), headers={"content-type": kind})
        answers.append(answer)
        return answer

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(entered) == 4)
        assert "too many requests" in error_of(ask(), 503)["message"]
    finally:
        goes_on.set()
        for thread in threads:
            thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [503]


# Who may ask ---------------------------------------------------------------------------------------------------------


def test_other_names_and_sites_are_refused_everywhere(app):
    for method, path in (("POST", GENERATIONS), ("GET", "/health"), ("GET", "/docs"), ("GET", "/metrics")):
        foreign = app.http.request(method, path, headers={"host": "evil.example"})
        assert error_of(foreign, 421)
        for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert error_of(app.http.request(method, path, headers=headers), 403)


def test_service_with_tokens_asks_for_one():
    with offering(tokens=Tokens([TOKEN, f"another-{TOKEN}"]), wait=False) as app:
        http = app.http
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert http.get(path).status_code in (200, 503)
        for headers in (
            {},
            {"authorization": f"Bearer {TOKEN}x"},
            {"authorization": f"Basic {TOKEN}"},
            {"authorization": "Bearer"},
        ):
            for path in ("/metrics", "/v1/models", "/nothing"):
                assert error_of(http.get(path, headers=headers), 401)["type"] == "authentication_error"
            assert error_of(http.post(GENERATIONS, json={"prompt": "x"}, headers=headers), 401)
        for token in (TOKEN, f"another-{TOKEN}"):
            assert http.get("/v1/models", headers={"authorization": f"bearer {token}"}).status_code == 200


# The service ---------------------------------------------------------------------------------------------------------


def test_every_answer_has_the_id_of_its_request(app):
    for path in ("/health", "/nothing", GENERATIONS):
        assert len(app.http.get(path).headers["x-request-id"]) == 16
        assert app.http.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for other in ("no id", "\xe9" * 8, "x" * 101, ""):
            given = app.http.get(path, headers={"x-request-id": other.encode("latin-1")}).headers[
                "x-request-id"
            ]
            assert given.isascii() and len(given) == 16


def test_documents_list_what_is_there_and_ask_no_other_server(app):
    schema = app.http.get("/openapi.json").json()
    body = schema["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "images", "seed", "steps", "guidance_scale", "negative_prompt", "n"} <= set(
        body["properties"]
    )
    form = schema["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "init_image", "mask", "strength"} <= set(form["properties"])
    page = app.http.get("/docs")
    assert page.status_code == 200 and "https://" not in page.text and "http://" not in page.text
    assert app.http.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200


def test_metrics_count(app):
    images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat"}))
    text = app.http.get("/metrics").text
    assert f'kosmos_g_requests_total{{route="{GENERATIONS}",status="200"}}' in text
    assert "kosmos_g_batch_images_count" in text and "kosmos_g_ready 1.0" in text
    assert "kosmos_g_vision_cache_misses" in text


def test_model_that_cannot_be_loaded_is_told_and_tried_again(build_pipe, tmp_path, monkeypatch):
    from kosmos_g_diffusers.serve import application, drawer

    monkeypatch.setattr(drawer, "RETRY", 0.2)
    monkeypatch.setattr(application, "LOOK_AT_MODEL", 0.1)
    folder = tmp_path / "model"
    with offering([folder], toy=False, wait=False) as app:
        told = wait_for(lambda: (answer := app.http.get("/ready").json())["status"] == "failed" and answer)
        assert "There is no model" in told["problem"] and str(tmp_path) not in told["problem"]
        assert app.http.get("/ready").status_code == 503 and app.http.get("/health").status_code == 200
        answer = app.http.post(GENERATIONS, json={"prompt": "a hat"})
        assert "cannot be loaded" in error_of(answer, 503)["message"]
        assert app.http.get("/v1/models").json()["data"][0]["id"] == "model"
        build_pipe().save_pretrained(tmp_path / "whole")
        (tmp_path / "whole").rename(folder)
        wait_for(lambda: app.http.get("/ready").status_code == 200)
        images_of(app.http.post(GENERATIONS, json={**QUICK, "prompt": "a hat"}))


def test_request_whose_client_has_gone_is_not_drawn_to_its_end(app):
    import httpx

    with slow_steps(app.service.drawer, 0.05) as steps:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{app.url}{GENERATIONS}", json={"prompt": "a hat", "steps": 250}, timeout=1.0)
        wait_for(lambda: not app.service.drawer.worker._is_busy())
        assert len(steps) < 250


def test_request_that_takes_too_long_is_ended():
    with offering(timeout=0.5) as app, slow_steps(app.service.drawer, 0.05) as steps:
        error = error_of(app.http.post(GENERATIONS, json={"prompt": "a hat", "steps": 250}), 504)
        assert error["code"] == "timeout"
        wait_for(lambda: not app.service.drawer.worker._is_busy())
        assert len(steps) < 250


def test_full_queue_is_told_and_the_others_get_their_images():
    with offering(capacity=2, batch=1) as app, slow_steps(app.service.drawer, 0.05):
        answers, body = [], {"prompt": "a hat", "steps": 10}

        def ask():
            answers.append(app.http.post(GENERATIONS, json=body))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused and len(answers) - len(refused) >= 2
        for answer in refused:
            assert error_of(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"]


def test_command_ends_its_requests_and_itself_when_it_is_told_to(tmp_path):
    import signal
    import socket
    import subprocess
    import sys

    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "kosmos_g_diffusers",
        "serve",
        "--port",
        str(port),
        "--model",
        str(tmp_path / "none"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f":{port}/docs" in process.stdout.readline()
        note = process.stderr.readline()
        assert "There is no model in 'none'" in note and "lives on" in note
        assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
