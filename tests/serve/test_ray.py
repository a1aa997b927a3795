"""examples/serve_ray.py with a Ray of its own on this machine: a replica that dies costs nobody an image."""

import importlib.util
import os
import socket
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.app import wait_for

ray = pytest.importorskip("ray", reason="pip install 'kosmos-g-diffusers[ray]'")
pytest.importorskip("fastapi_offline", reason="pip install 'kosmos-g-diffusers[serve]'")
from support.service import data_url, images_of, pixels  # noqa: E402

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_ray.py"
CLIENTS, REQUESTS = 4, 5


@pytest.fixture(scope="module")
def url(build_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "toy"
    build_pipe().save_pretrained(folder)
    spec = importlib.util.spec_from_file_location("serve_ray", EXAMPLE)
    module = sys.modules["serve_ray"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)  # replicas have no such file on their path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: os.environ[name] for name in ("PYTHONPATH", "HF_HUB_OFFLINE") if name in os.environ}
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {**environment, "OMP_NUM_THREADS": "1"}}
    )
    from ray import serve

    module.serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(module.build(str(folder), replicas=(2, 2)))
    address = f"http://127.0.0.1:{port}"
    wait_for(lambda: httpx.get(f"{address}/ready").status_code == 200, 300)
    yield address
    serve.shutdown()
    ray.shutdown()


def replicas():
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor for actor in found if "#Replica#" in actor["name"]]


def test_no_accepted_request_is_lost_with_a_replica(url, photos):
    body = {"prompt": "a <i>", "images": [data_url(photos[0])], "steps": 8}
    answers, errors = {}, []

    def client(number):
        for count in range(REQUESTS):
            seed = number * REQUESTS + count
            try:
                answer = httpx.post(f"{url}/v1/images/generations", json={**body, "seed": seed}, timeout=300)
                answers[seed] = images_of(answer)[0]
            except Exception as error:  # noqa: BLE001
                errors.append(repr(error))

    threads = [threading.Thread(target=client, args=[number]) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) > 2, 300)
    before = {actor["name"] for actor in replicas()}
    assert len(before) == 2
    victim = replicas()[0]
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    for thread in threads:
        thread.join()
    assert not errors and len(answers) == CLIENTS * REQUESTS
    wait_for(lambda: len({actor["name"] for actor in replicas()} - {victim["name"]}) == 2, 300)
    again = httpx.post(f"{url}/v1/images/generations", json={**body, "seed": 3}, timeout=300)
    assert np.abs(pixels(images_of(again)[0]).astype(int) - pixels(answers[3])).max() <= 1


def test_mistakes_are_sentences_there_too(url):
    for change, status in (
        ({"images": ["/etc/passwd"]}, 400),
        ({"prompt": "a <my-dog>"}, 400),
        ({"model": "x"}, 404),
    ):
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a <i>", **change}, timeout=300)
        assert answer.status_code == status and answer.json()["error"]["message"].endswith(".")
    assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 421
    assert httpx.post(f"{url}/v1/conditions", json={"prompt": "a hat"}, timeout=300).status_code == 200
