"""A real ComfyUI: its server with folders of its own, so that the one that is given stays as it is."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

OWN = ("custom_nodes", "models", "input", "output", "user", "temp", ".git")  # not those of the given one
SECONDS = 300  # to start, or to run a prompt


def python_of(comfyui):
    """ComfyUI's Python: COMFYUI_PYTHON, that of an environment next to it, or this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return os.environ["COMFYUI_PYTHON"]
    places = [comfyui / name / "bin" / "python" for name in ("venv", ".venv")]
    return str(next(filter(Path.is_file, places), sys.executable))


class Server:
    """A ComfyUI on a CPU at `url`, until the block ends; `root` is a folder that looks like it and can be installed into."""

    def __init__(self, comfyui, folder):
        self.comfyui, self.root = Path(comfyui).resolve(), Path(folder)
        for name in OWN[:-1]:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for entry in self.comfyui.iterdir():
            if entry.name not in OWN:
                (self.root / entry.name).symlink_to(entry)
        example = self.comfyui / "input" / "example.png"
        if example.is_file():
            shutil.copy(example, self.root / "input")

    def __enter__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        place = Path(__file__).parents[2] / "src"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        command = [python_of(self.comfyui), str(self.comfyui / "main.py"), "--cpu", "--port", str(port)]
        command += ["--listen", "127.0.0.1", "--base-directory", str(self.root), "--disable-api-nodes"]
        self.log = self.root / "server.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.root)
        self._wait(lambda: self.get("/system_stats"), "start")
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(60)

    def _wait(self, ask, what):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"ComfyUI ended:\n{self.log.read_text()[-3000:]}"
            try:
                if answer := ask():
                    return answer
            except OSError:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not {what}:\n{self.log.read_text()[-3000:]}")

    def fetch(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get(self, path):
        return json.loads(self.fetch(path))

    def send(self, path, value):
        """What the server answers, an empty answer as None; answers of errors are answers."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(value).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read()
        return json.loads(said) if said else None

    def post(self, prompt):
        """What the server answers to a prompt in API form: `prompt_id`, or `error` and `node_errors`."""
        return self.send("/prompt", {"prompt": prompt})

    def wait_for(self, number):
        return self._wait(lambda: self.get(f"/history/{number}").get(number), f"finish {number}")

    def run(self, prompt):
        """The history of a prompt that was run to its end: `outputs`, and `status` with an error if there was one."""
        answer = self.post(prompt)
        assert "prompt_id" in answer, answer
        return self.wait_for(answer["prompt_id"])

    def images(self, prompt):
        """Paths of the images that a prompt saved. AssertionError if it failed."""
        history = self.run(prompt)
        assert history["status"]["status_str"] == "success", history["status"]
        places = [one for output in history["outputs"].values() for one in output.get("images", ())]
        return [self.root / place["type"] / place["subfolder"] / place["filename"] for place in places]
