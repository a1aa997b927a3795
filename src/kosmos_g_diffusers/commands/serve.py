"""Draw for other programs, over HTTP.

The service speaks OpenAI's image API: POST /v1/images/generations and /v1/images/edits, with images of the prompt, seed,
steps and so on in further fields; POST /v1/conditions encodes a prompt alone. GET /docs lists all of it. Requests
that wait are drawn together. Without --model the small model that ships draws, which knows sprites alone. A model that cannot be
loaded is tried again; GET /ready says what is wrong. Only this machine reaches the service unless --host says otherwise;
then it needs tokens: --token-file FILE or the variable KOSMOS_G_TOKENS. Ctrl-C ends it.

examples:
  kosmos-g serve
  kosmos-g serve --model ./kosmos-g --lora-dir ./loras --batch 4
  kosmos-g serve --model ./kosmos-g --host 0.0.0.0 --token-file tokens --allowed-host draw.example.org
  curl -s localhost:8000/v1/images/generations -H "Content-Type: application/json" \\
      -d '{"prompt": "a large red striped star on a white background", "seed": 1}'
"""

import argparse
import logging
import signal
import sys

from ..environment import DTYPES
from ..fields import check_value
from ..provenance import add_flags as add_mark_flags
from ..provenance import read_flags as read_mark_flags

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
INSTALL = "pip install 'kosmos-g-diffusers[serve]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="DIR", help="Kosmos-G folder (default: the small model that ships, of sprites)")
    add("--lora-dir", metavar="DIR", help="folder of .safetensors files to offer as LoRAs")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="of the address (default: 8000)")
    names = "a name that the service answers to, such as that of a reverse proxy; repeat it for several"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=names)
    tokens = "take requests with a token of this file alone, which has one a line (or KOSMOS_G_TOKENS)"
    add("--token-file", metavar="FILE", help=tokens)
    together = "images of the model's own size that are drawn together, of larger ones fewer (default: 8)"
    add("--batch", type=int, default=8, metavar="N", help=together)
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    limit = "that a request may take, waiting included (default: 600)"
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help=limit)
    add("--mcp", action="store_true", help="be a tool of the Model Context Protocol too, at /gradio_api/mcp/")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on the CPU, else float16)")
    add_mark_flags(add)


def run(arguments: argparse.Namespace) -> None:
    check_value("--batch", arguments.batch, int, low=1, high=256)
    check_value("--queue", arguments.queue, int, low=1, high=10_000)
    check_value("--timeout", arguments.timeout, float, low=1, high=86_400)
    try:
        from ..serve.server import Service
    except ImportError as error:
        raise ImportError(f"The service needs more packages ({error}). Run: {INSTALL}") from error
    from ..serve.tokens import MAKE, VARIABLE, read_tokens
    from ..serving.models import Models

    tokens = read_tokens(arguments.token_file)
    if not tokens and arguments.host not in LOCAL_HOSTS:
        raise ValueError(
            f"--host {arguments.host} lets other machines in, and there is no token. Pass --token-file FILE with one a line, or "
            f"set {VARIABLE}. {MAKE}"
        )
    marker = read_mark_flags(arguments)
    folders = [] if arguments.model is None else [arguments.model]
    held = {"must_exist": False, "memory_flag": "off"}
    models = Models(folders, arguments.lora_dir, None, arguments.device, arguments.dtype, **held)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    service = Service(
        models,
        arguments.host,
        arguments.port,
        tokens,
        arguments.allowed_host,
        marker,
        arguments.batch,
        arguments.queue,
        arguments.timeout,
        arguments.mcp,
    )
    signal.signal(signal.SIGTERM, lambda *_: service.end())
    try:
        service.start()
        print(
            f"The service answers at {service.url}, its documents at {service.url}docs. Ctrl-C ends it.",
            flush=True,
        )
        told = False
        while not service.is_ending(1.0):
            if models.state == "failed" and not told:
                told = True
                note = f"Note: {models.problem} The service lives on, says so at /ready and tries again."
                print(note, file=sys.stderr, flush=True)
    finally:
        service.close()
