"""The service as the tests run it: in this process, on a free port, with a toy in the place of the small model."""

import base64
import io
import socket
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import httpx
import numpy as np
import PIL.Image
from support.app import PATIENCE, put_toy, wait_for

from kosmos_g_diffusers.serving.models import Models


@contextmanager
def offering(model_folders=(), toy=True, wait=True, lora_folder=None, **options):
    """A running service: `url`, `http` (a client), `service`, `models`, `folder` (of the toy).

    Args:
        toy: take the toy for the small model that ships.
        wait: until the model is loaded.
        options: of Service.
    """
    from kosmos_g_diffusers.serve.server import Service

    with ExitStack() as stack:
        folder = put_toy(stack) if toy else None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        models = Models(model_folders, lora_folder, must_exist=False)
        service = Service(models, port=port, **options)
        stack.callback(service.close)
        service.start()
        url = f"http://127.0.0.1:{port}"
        http = stack.enter_context(httpx.Client(base_url=url, timeout=2 * PATIENCE))
        if wait:
            wait_for(lambda: http.get("/ready").status_code == 200)
        yield SimpleNamespace(url=url, http=http, service=service, models=models, folder=folder)


def png_bytes(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image):
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def images_of(answer):
    """Bytes of the PNGs of an answer."""
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]


def pixels(content):
    return np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
