"""Open Kosmos-G in a browser.

The page takes prompts of words and images, settings, controls, LoRAs and image words, and shows each image while it
is being drawn. Images are written to --output with their settings inside; kosmos-g generate --from IMAGE makes them
again. Without --model the small model that ships draws, which knows sprites alone: enough to try the page. Only this
machine can reach the page unless --host or --share says otherwise; then give it a password. Ctrl-C ends it.

examples:
  kosmos-g app
  kosmos-g app --model ./kosmos-g --lora-dir ./loras --control
  kosmos-g app --model ./kosmos-g --host 0.0.0.0 --auth anna:a-long-password
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from ..environment import DTYPES, check_device
from ..files import check_output_folder
from ..provenance import add_flags as add_mark_flags
from ..provenance import read_flags as read_mark_flags
from ..serving.queue import CAPACITY

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = "Kosmos-G folder; repeat it to offer several (default: the small model that ships, of sprites)"
    add("--model", action="append", default=[], metavar="DIR", help=models)
    add("--lora-dir", metavar="DIR", help="folder of .safetensors files to offer as LoRAs")
    add("--unet-dir", metavar="DIR", help="folder of U-Net folders to offer in the place of the model's")
    controls = "show the controls (kosmos-g control --list); the small model has canny"
    add("--control", action="store_true", help=controls)
    add("--output", default="kosmos-g-app", metavar="DIR", help="folder to write into (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=7860, metavar="N", help="of the address (default: 7860)")
    add("--share", action="store_true", help="open a public address through gradio's servers")
    add("--auth", metavar="USER:PASSWORD", help="ask for a name and a password")
    add("--queue", type=int, default=CAPACITY, metavar="N", help=f"runs that may wait (default: {CAPACITY})")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on the CPU, else float16)")
    add_mark_flags(add)


def run(arguments: argparse.Namespace) -> None:
    auth = read_auth(arguments.auth)
    check_output_folder(arguments.output)
    if auth is None and (arguments.share or arguments.host not in LOCAL_HOSTS):
        note = "Note: anyone who reaches this address can use it. --auth USER:PASSWORD asks for one."
        print(note, file=sys.stderr)
    if arguments.queue < 1:
        raise ValueError(f"--queue is {arguments.queue}; expected 1 or more.")
    try:
        from ..app.page import serve
    except ImportError as error:
        install = "pip install 'kosmos-g-diffusers[app]'"
        raise ImportError(f"The app needs gradio ({error}). Run: {install}") from error
    from ..serving.models import Models
    from ..serving.service import Service
    from ..serving.store import Store

    if arguments.device is not None:
        check_device(arguments.device)
    marker = read_mark_flags(arguments)
    folders = (arguments.model, arguments.lora_dir, arguments.unet_dir)
    models = Models(*folders, arguments.device, arguments.dtype)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    # files are named from here, so that no page learns where the server keeps them
    os.chdir(arguments.output)
    service = Service(models, Store("."), arguments.queue, marker)
    try:
        serve(service, arguments.control, arguments.host, arguments.port, arguments.share, auth)
    finally:
        service.close()


def read_auth(text: str | None) -> tuple[str, str] | None:
    """ "user:password" -> (user, password); None stays None. ValueError for anything else."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ValueError("--auth is not of the form USER:PASSWORD, such as anna:a-long-password.")
    return user, password
