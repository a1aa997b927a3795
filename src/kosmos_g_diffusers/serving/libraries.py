"""What draws, imported when it is first needed: the app answers before torch, diffusers and transformers are there.

By one thread at a time: libraries whose modules import each other in circles break when two threads import them at once.
"""

import threading
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


def _module(name):
    with _importing:
        return import_module(f"..{name}", __package__)
