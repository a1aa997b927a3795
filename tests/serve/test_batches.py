"""What is drawn together is what is drawn alone; what does not belong together is drawn apart."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.app import put_toy, slow_steps, wait_for

pytest.importorskip("fastapi_offline", reason="pip install 'kosmos-g-diffusers[serve]'")
from contextlib import ExitStack  # noqa: E402

from support.service import data_url, images_of, offering, png_bytes  # noqa: E402

from kosmos_g_diffusers.generation.schedulers import SCHEDULERS  # noqa: E402
from kosmos_g_diffusers.serve import batches  # noqa: E402
from kosmos_g_diffusers.serve.requests import Edit, File, Generation, Offer, read_request  # noqa: E402
from kosmos_g_diffusers.serving.models import Models  # noqa: E402

CLOSE = 1e-4


@pytest.fixture(scope="module")
def models():
    with ExitStack() as stack:
        put_toy(stack)
        models = Models()
        models.load()
        yield models


@pytest.fixture
def offer(models):
    size = models.pipe.get_processor().image_size
    return Offer("sprites", True, size, (), ("canny", "scribble"), "cpu", "float32", True)


def latents(models, requests, most=16, **options):
    for request in requests:
        request.encoded = None
    batches.encode(models, requests)
    drawn = {
        id(request): found
        for request, found in batches.draw(models, requests, most, output_type="latent", **options)
    }
    return [drawn[id(request)] for request in requests]


def asked(models, offer, body):
    request = read_request(body, offer)
    batches.prepare(models, request)
    return request


def different(photos, **common):
    """Bodies that differ in all that may differ in a batch."""
    images = [data_url(photo) for photo in photos]
    return [
        {"prompt": "a hat", "seed": 5, **common},
        {"prompt": "a <i> in the style of <i>", "images": images[:2], "seed": 7, "n": 2, **common},
        {
            "prompt": "an <i> on a painting",
            "images": images[2:3],
            "negative_prompt": "red <i>",
            "seed": 5,
            **common,
        },
        {"prompt": "furniture", "negative_prompt": "red <i>", "seed": 11, **common},
    ]


def assert_together_as_alone(models, requests, tolerance=CLOSE):
    together = latents(models, requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = latents(models, [request], most=1)
        assert found.shape == alone.shape and len(found) == request.settings.num_images
        assert (found - alone).abs().max() <= tolerance
    assert all((found[0] - together[0][0]).abs().max() > 0.01 for found in together[1:])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_requests_are_drawn_together_as_alone(models, offer, photos, scheduler):
    bodies = different(photos, steps=4, scheduler=scheduler, size="48x64")
    requests = [asked(models, offer, Generation(**body)) for body in bodies]
    assert len({batches.kind_of(request) for request in requests}) == 1
    assert_together_as_alone(models, requests)


@pytest.mark.parametrize("guidance", [0.5, 12])
def test_with_and_without_guidance(models, offer, photos, guidance):
    bodies = different(photos, steps=6, guidance_scale=guidance)
    assert_together_as_alone(models, [asked(models, offer, Generation(**body)) for body in bodies])


@pytest.mark.parametrize("kinds", [["canny"], ["canny", "scribble"]])
def test_controls_have_an_image_of_each_request(models, offer, photos, kinds):
    requests = []
    for seed, photo in enumerate(photos[1:]):
        image = data_url(photo.resize((64, 64)))
        controls = [{"kind": kind, "image": image, "scale": 0.5, "ready": kind != "canny"} for kind in kinds]
        body = Generation(prompt="a hat", seed=seed, steps=3, controls=controls)
        requests.append(asked(models, offer, body))
    assert len({batches.kind_of(request) for request in requests}) == 1
    assert_together_as_alone(models, requests)


@pytest.mark.parametrize("has_mask", [False, True])
def test_changed_images_are_those_of_each_request(models, offer, photos, has_mask):
    requests = []
    for seed, photo in enumerate(photos):
        photo = photo.resize((64, 64))
        mask = (
            File(png_bytes(photo.convert("L").point(lambda value: 255 * (value > 90)))) if has_mask else None
        )
        body = Edit(
            prompt="a hat", seed=seed, steps=4, strength=0.6, init_image=File(png_bytes(photo)), mask=mask
        )
        requests.append(asked(models, offer, body))
    assert_together_as_alone(models, requests)


def test_what_differs_is_drawn_apart(models, offer, photos):
    first = asked(models, offer, Generation(prompt="a hat", seed=0, steps=2))
    image = data_url(photos[0].resize((64, 64)))
    others = [
        {"steps": 3},
        {"size": "48x64"},
        {"scheduler": "euler"},
        {"guidance_scale": 2},
        {"controls": [{"kind": "canny", "image": image}]},
        {"controls": [{"kind": "canny", "image": image, "scale": 0.5}]},
    ]
    kinds = {batches.kind_of(first)}
    for change in others:
        kinds.add(
            batches.kind_of(
                asked(models, offer, Generation(**{"prompt": "x", "seed": 0, "steps": 2, **change}))
            )
        )
    for strength in (0.5, 0.6):
        changed = Edit(
            prompt="x", steps=2, strength=strength, init_image=File(png_bytes(photos[0].resize((64, 64))))
        )
        kinds.add(batches.kind_of(asked(models, offer, changed)))
    assert len(kinds) == len(others) + 3
    same = asked(models, offer, Generation(prompt="y", negative_prompt="z", seed=9, steps=2, size="64x64"))
    assert batches.kind_of(same) == batches.kind_of(first)
    lora = replace(first.settings, lora="x")
    assert batches.kind_of(SimpleNamespace(**{**vars(first), "settings": lora})) != batches.kind_of(first)


@pytest.mark.parametrize(
    ("size", "most", "together"), [("auto", 2, 2), ("48x64", 2, 2), ("128x64", 4, 2), ("128x128", 3, 1)]
)
def test_many_images_are_drawn_in_parts_of_as_many_pixels(models, offer, size, most, together):
    request = asked(models, offer, Generation(prompt="a hat", seed=0, steps=2, n=5, size=size))
    calls = []
    with torch.no_grad():
        unet = models.pipe.unet
        forward = unet.forward
        unet.forward = lambda sample, *args, **kwargs: (
            calls.append(len(sample)),
            forward(sample, *args, **kwargs),
        )[1]
        try:
            (found,) = latents(models, [request], most=most)
        finally:
            del unet.forward
    assert found.shape[0] == 5 and max(calls) == 2 * together  # with guidance


def test_prompt_that_cannot_be_read_fails_alone(models, offer):
    good, bad = (
        asked(models, offer, Generation(prompt=text, steps=1, seed=0)) for text in ("a hat", "a " * 900)
    )
    batches.encode(models, [good, bad])
    assert good.error is None and good.encoded is not None
    assert "tokens long" in str(bad.error) and bad.encoded is None


def test_too_little_memory_for_all_is_enough_for_one(models, offer, monkeypatch):
    requests = [asked(models, offer, Generation(prompt="a hat", steps=1, seed=seed)) for seed in range(3)]
    expected = latents(models, requests)
    forward = models.pipe.unet.forward

    def little(sample, *args, **kwargs):
        if len(sample) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(models.pipe.unet, "forward", little)
    for found, before in zip(latents(models, requests), expected, strict=True):
        assert torch.allclose(found, before, atol=CLOSE)


def test_image_that_is_not_finite_fails_alone(models, offer, monkeypatch):
    requests = [asked(models, offer, Generation(prompt="a hat", steps=1, seed=seed)) for seed in range(2)]
    batches.encode(models, requests)
    decode = models.pipe.vae.decode

    def spoilt(sample, *args, **kwargs):
        output = decode(sample, *args, **kwargs)
        output[0][-1] = float("nan")
        return output

    monkeypatch.setattr(models.pipe.vae, "decode", spoilt)
    results = dict(batches.draw(models, requests, 8))
    assert len(results[requests[0]]) == 1
    assert "seed 1" in str(results[requests[1]])


# The thread that draws ------------------------------------------------------------------------------------------------


def test_those_who_wait_are_drawn_together_and_nobody_waits_for_company():
    sizes = []
    with offering() as app:
        app.service.drawer.told = sizes.append
        with slow_steps(app.service.drawer, 0.2):
            answers = []

            def ask(seed, steps=3):
                body = {"prompt": "a hat", "steps": steps, "seed": seed}
                answers.append(images_of(app.http.post("/v1/images/generations", json=body)))

            first = threading.Thread(target=ask, args=[0])
            first.start()
            wait_for(lambda: sizes == [1])  # alone, at once
            others = [threading.Thread(target=ask, args=[seed, 2]) for seed in range(1, 6)]
            for thread in others:
                thread.start()
            for thread in [first, *others]:
                thread.join()
        assert len(answers) == 6 and sizes == [1, 5]


def test_batch_goes_on_for_those_who_are_still_there(photos):
    import httpx

    sizes = []
    with offering() as app:
        app.service.drawer.told = sizes.append
        with slow_steps(app.service.drawer, 0.1) as steps:
            url = f"{app.url}/v1/images/generations"
            results = {}

            def ask(seed, timeout):
                try:
                    body = {"prompt": "a hat", "steps": 20, "seed": seed}
                    results[seed] = httpx.post(url, json=body, timeout=timeout).status_code
                except httpx.ReadTimeout:
                    results[seed] = "gone"

            blocker = threading.Thread(target=ask, args=[0, 60])
            blocker.start()
            wait_for(lambda: sizes == [1])
            pair = [threading.Thread(target=ask, args=[seed, 60 if seed == 1 else 3.5]) for seed in (1, 2)]
            for thread in pair:
                thread.start()
            for thread in [blocker, *pair]:
                thread.join()
        assert results[0] == results[1] == 200 and results[2] in ("gone", 200)
        assert len(steps) == 40
