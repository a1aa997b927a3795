"""What draws, imported when it is first needed: the app answers before torch, diffusers and transformers are there.

By one thread at a time: libraries whose modules import each other in circles break when two threads import them at once.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

_importing = threading.Lock()


def drawing() -> ModuleType:
    """The module `generation.generate`."""
    return _module("generation.generate")


def controlling() -> ModuleType:
    """The module `control.controls`."""
    return _module("control.controls")


def reading() -> ModuleType:
    """The module `processing_kosmos_g`."""
    return _module("processing_kosmos_g")


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Hide the variables that name proxies while gradio is imported: it makes clients for the web, which are never used here,
    and a proxy of a kind that they do not know, such as SOCKS, is an error."""
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _module(name):
    with _importing:
        return import_module(f"..{name}", __package__)
