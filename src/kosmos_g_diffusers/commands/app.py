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
import getpass
import logging
import os
import sys
from pathlib import Path

from ..environment import DTYPES, check_device
from ..files import check_output_folder
from ..generation import memory
from ..provenance import add_flags as add_mark_flags
from ..provenance import read_flags as read_mark_flags
from ..quantization import QUANTIZATIONS
from ..serving.queue import CAPACITY

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = "Kosmos-G folder; repeat it to offer several (default: the small model that ships, of sprites)"
    add("--model", action="append", default=[], metavar="DIR", help=models)
    add("--lora-dir", metavar="DIR", help="folder of .safetensors files to offer as LoRAs")
    add("--unet-dir", metavar="DIR", help="folder of U-Net folders to offer in the place of the model's")
    controls = "show the controls (kosmos-g control --list); the small model has canny"
    tool = "be a tool of the Model Context Protocol too, at /gradio_api/mcp/"
    add("--mcp", action="store_true", help=tool)
    add("--control", action="store_true", help=controls)
    add("--output", default="kosmos-g-app", metavar="DIR", help="folder to write into (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=7860, metavar="N", help="of the address (default: 7860)")
    add("--share", action="store_true", help="open a public address through gradio's servers")
    names = "a name that the app answers to, such as that of a reverse proxy; repeat it for several"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=names)
    lines = "ask for a name and a password: a file with a line USER:HASH for each user (htpasswd -B, or --hash-password)"
    add("--auth-file", metavar="FILE", help=lines)
    add(
        "--hash-password",
        action="store_true",
        help="ask for a name and a password, print the line for --auth-file, end",
    )
    seen = "the same for one user; others on this machine can see it: rather set KOSMOS_G_AUTH to it"
    add("--auth", metavar="USER:PASSWORD", help=seen)
    limit = "that uploads and what was drawn from take; the oldest go first (default: 2). If it is given, images count too"
    add("--disk-limit", type=float, metavar="GB", help=limit)
    add("--queue", type=int, default=CAPACITY, metavar="N", help=f"runs that may wait (default: {CAPACITY})")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on the CPU, else float16)")
    add("--quantize", choices=QUANTIZATIONS, help="weights of the text encoder (default: none)")
    memory.add_flag(add)
    add_mark_flags(add)


def run(arguments: argparse.Namespace) -> None:
    if arguments.hash_password:
        return print_hash()
    auth = read_accounts(arguments.auth, arguments.auth_file)
    check_output_folder(arguments.output)
    if arguments.mcp and auth is not None:
        raise ValueError(
            "--mcp cannot log in. Leave the password out, or use kosmos-g serve --mcp, which takes tokens."
        )
    if auth is None and (arguments.share or arguments.host not in LOCAL_HOSTS):
        note = "Note: anyone who reaches this address can use it. --auth-file FILE asks for a name and a password."
        print(note, file=sys.stderr)
    if arguments.auth is not None:
        print(
            "Note: whoever is logged in on this machine can read the password of --auth in the list of processes. "
            "KOSMOS_G_AUTH or --auth-file keeps it to yourself.",
            file=sys.stderr,
        )
    if arguments.queue < 1:
        raise ValueError(f"--queue is {arguments.queue}; expected 1 or more.")
    if arguments.disk_limit is not None and not 0 < arguments.disk_limit < 1e6:
        raise ValueError(f"--disk-limit is {arguments.disk_limit:g}; expected gigabytes, more than 0.")
    from ..serving.libraries import without_proxies

    try:
        with without_proxies():
            from ..app.page import serve
    except ImportError as error:
        install = "pip install 'kosmos-g-diffusers[app]'"
        raise ImportError(f"The app needs gradio ({error}). Run: {install}") from error
    from ..serving.access import Access
    from ..serving.models import Models
    from ..serving.service import Service
    from ..serving.store import DISK_LIMIT, Store

    if arguments.device is not None:
        check_device(arguments.device)
    Access(arguments.host, arguments.allowed_host)  # says at once which name is not one
    marker = read_mark_flags(arguments)
    folders = (arguments.model, arguments.lora_dir, arguments.unet_dir)
    held = {"quantize": arguments.quantize, "memory_flag": arguments.memory}
    models = Models(*folders, arguments.device, arguments.dtype, **held)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    # files are named from here, so that no page learns where the server keeps them
    os.chdir(arguments.output)
    is_limited = arguments.disk_limit is not None
    limit = int(arguments.disk_limit * 1e9) if is_limited else DISK_LIMIT
    service = Service(models, Store(".", limit, prunes_images=is_limited), arguments.queue, marker)
    try:
        serve(
            service,
            arguments.control,
            arguments.host,
            arguments.port,
            arguments.share,
            auth,
            allowed_hosts=arguments.allowed_host,
            mcp=arguments.mcp,
        )
    finally:
        service.close()


def read_accounts(text: str | None, file: str | None = None) -> dict[str, str] | None:
    """Who may log in -> {user: password or hash}; None where nobody has to.

    Args:
        text: of --auth.
        file: of --auth-file. Without both, the variable KOSMOS_G_AUTH counts, and is forgotten: what the app starts would
            have it too.

    Raises:
        ValueError: a text that is not USER:PASSWORD, a file that cannot be used, or both.
    """
    from ..serving.passwords import VARIABLE, read_file, read_line

    variable = os.environ.pop(VARIABLE, None)
    if file is not None:
        if text is not None:
            raise ValueError("--auth and --auth-file were given. Pass one of them.")
        return read_file(file)
    name = "--auth" if text is not None else VARIABLE
    account = read_auth(variable if text is None else text, name)
    if account is not None and account[1].startswith(("$2", "$argon2")):
        account = read_line(":".join(account), name)
    return None if account is None else dict([account])


def read_auth(text: str | None, name: str = "--auth") -> tuple[str, str] | None:
    """ "user:password" -> (user, password); None stays None. ValueError for anything else, which begins with `name`."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    user = user.strip()  # as of those who log in
    if not (user and colon and password):
        raise ValueError(f"{name} is not of the form USER:PASSWORD, such as anna:a-long-password.")
    return user, password


def print_hash() -> None:
    """Ask for a name and a password, or read USER:PASSWORD from a pipe, and print the line that --auth-file takes.

    Raises:
        ValueError: no password, or two different ones.
        ImportError: argon2-cffi is not installed.
    """
    from ..serving.passwords import hash_password

    if sys.stdin.isatty():
        print("User: ", end="", file=sys.stderr, flush=True)
        user = sys.stdin.readline().strip()
        password = getpass.getpass("Password: ")
        if getpass.getpass("Once more: ") != password:
            raise ValueError("The two passwords differ. Run it again.")
    else:
        user, colon, password = sys.stdin.readline().rstrip("\r\n").partition(":")
        if not colon:  # a password alone
            user, password = "", user
    if ":" in user or not password:
        raise ValueError("Expected a name without a colon, and a password: kosmos-g app --hash-password")
    print(f"{user}:{hash_password(password)}" if user else hash_password(password))
