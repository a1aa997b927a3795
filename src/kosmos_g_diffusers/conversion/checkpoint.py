"""Reads the weights of an official checkpoint, a pickle that is hostile until proven otherwise.

`torch.load(weights_only=True)` builds tensors, containers and nothing else but what is allow-listed. fairseq writes its
settings next to the weights, as an argparse.Namespace or as omegaconf nodes. Both are read as inert data: every name on
the list stands for a class of this file, whether or not omegaconf is installed, so that no foreign class is ever built.
"""

import _compat_pickle
import pickletools
import re
import warnings
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals


class _Inert:
    """Stands for a class or function that a pickle names: keeps what it is given and does nothing."""

    def __new__(cls, *args):
        instance = super().__new__(cls)
        instance.arguments = args
        return instance

    def __setstate__(self, state):
        self.state = state  # as a whole: no attribute is set by a name that the file chooses


def _empty_dict(*args):
    """Stands for collections.defaultdict, which omegaconf's metadata hold; torch fills plain dicts only."""
    return {}


# Names in a pickle that are read as inert data. Only what fairseq writes belongs here.
INERT_NAMES: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.tupleconfig": ("TupleConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata", "SCMode"),
    "omegaconf.nodes": (
        *("AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode"),
        *("IntegerNode", "InterpolationResultNode", "PathNode", "StringNode"),
    ),
    # a node's metadata name the type of its value, such as `Dict[str, int]`; getitem is how the brackets are pickled
    "builtins": ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple", "type"),
    "typing": ("Any", "Dict", "List", "Optional", "Tuple", "Union"),
    "_operator": ("getitem",),
    "pathlib": ("PosixPath", "WindowsPath"),
}


def _stand_ins():
    """torch's allow-list knows an entry by its module and name: give the stand-ins those of the originals."""
    _empty_dict.__module__ = "collections"
    _empty_dict.__name__ = _empty_dict.__qualname__ = "defaultdict"
    names = [(module, name) for module, names in INERT_NAMES.items() for name in names]
    return [type(name, (_Inert,), {"__module__": module}) for module, name in names] + [_empty_dict]


STAND_INS: list[Any] = _stand_ins()


@contextmanager
def _allow_only(allowed):
    """Allow `allowed` and what torch itself allows, but not what other libraries or the user allowed elsewhere."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(allowed)
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def is_mapped(path: Path) -> bool:
    """Whether `read_checkpoint` maps the file into memory, so that reading it again costs nothing."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(4) == b"PK\x03\x04"


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a fairseq checkpoint (its entry `model`), or of a safetensors file with the same keys.

    Nothing that the file brings is executed. Files of torch's present format are mapped: a tensor is read from disk
    when it is used, and what is not used (the state of the optimizer) never is.

    Args:
        path: of a file written by `torch.save`, or ending in .safetensors.

    Returns:
        dict of key -> dense CPU tensor.

    Raises:
        ValueError: there is no such file; it is empty, cut short or of another kind; it names a class that fairseq does
            not write (the message says which); it has no `model`, or something else than tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file at {path}. Pass the path of the official .pt file.")
    try:
        if path.suffix == ".safetensors":
            checkpoint = {"model": load_file(path)}
        else:
            with _allow_only(STAND_INS), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error tells what makes a file unreadable
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # damaged bytes make an unpickler raise nearly anything
        raise ValueError(_refusal(path, error)) from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not weights:
        held = sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} holds {held} and no weights under 'model'. Pass a checkpoint that fairseq saved, or "
            "torch.save({'model': state_dict}, path) with the official key names."
        )
    strange = [
        f"{key!r} ({type(value).__name__})"
        for key, value in weights.items()
        if not isinstance(key, str) or not _is_dense_tensor(value)
    ]
    if strange:
        raise ValueError(
            f"'model' of {path} has {len(strange)} entries that are not dense tensors under a name: "
            f"{', '.join(strange[:8])}. Expected the state dict of a model alone: remove them, or pass another checkpoint."
        )
    return dict(weights)


def _is_dense_tensor(value):
    kinds = (torch.Tensor, torch.nn.Parameter)  # no subclass: those bring code along
    return type(value) in kinds and value.layout is torch.strided and value.device.type == "cpu"


def _refusal(path, error):
    """What to tell a user whose checkpoint raised `error`."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    names = [_present_name(named.group(1))] if named else _foreign_names(path)
    if names:
        return (
            f"{path} was refused, nothing in it was run: it names {', '.join(names[:8])}, and expected are only tensors, "
            "containers, argparse.Namespace and omegaconf's nodes. If you trust where the file comes from, load it in the "
            "environment that wrote it and save its weights alone: torch.save({'model': checkpoint['model']}, path)."
        )
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a checkpoint, or was cut short: "
        f"{type(error).__name__}: {reason[0][:200] if reason else 'the file ends too early'}. Expected a .pt file written "
        "by torch.save: compare its size with the original's and download it again."
    )


def _present_name(name):
    """Full name in Python 3 of what a pickle names: protocol 2 writes some by their old names, torch cuts `builtins`."""
    module, _, name = name.rpartition(".")
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module) or 'builtins'}.{name}"


def _foreign_names(path):
    """Names that a pickle refers to in ways torch does not even parse (protocol 4 and above); reading runs nothing."""
    names, strings = [], []
    try:
        with ExitStack() as stack:
            if zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                stream = archive.open(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
            else:
                stream = path.open("rb")
            for operation, argument, _ in pickletools.genops(stack.enter_context(stream)):
                if operation.name in ("GLOBAL", "INST"):
                    names.append(_present_name(argument.replace(" ", ".")))
                elif operation.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:
        # not a pickle at all, or only the beginning of one: the names so far are all there is to tell
        pass
    known = {f"{cls.__module__}.{cls.__qualname__}" for cls in STAND_INS}
    usual = ("torch.", "collections.", "_codecs.")
    return [name for name in names if name not in known and not name.startswith(usual)]
