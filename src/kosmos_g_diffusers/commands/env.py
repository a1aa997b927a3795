"""Print versions, device, memory and model card, to paste into an issue.

Versions are read from what pip has recorded and the model from the headers of its files: no weights are loaded, and a
broken or missing package is named instead of ending the report. Paths are cut to ~ and file names; of the environment
variables only a few that change how torch and diffusers work are shown, and no tokens.

examples:
  kosmos-g env
  kosmos-g env --model ./kosmos-g
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from itertools import islice
from pathlib import Path

from ..environment import __version__
from ..sprites.pretrained import SPRITES

PACKAGE = "kosmos-g-diffusers"
CORE = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "pillow", "requests")
# not ours to require, and often what a problem depends on
OTHERS = ("numpy", "tokenizers", "torchvision", "bitsandbytes", "xformers")
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"),
    "KOSMOS_G_VERBOSITY",
)
SECONDS = 120  # for torch to start and find its devices
MOST_LETTERS = 200  # of a value that a file or a library says
MOST_COMPONENTS = 20
MOST_TEXT_BYTES = 2**20  # of an index, a card or a module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="folder (default: the small model that ships)")


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.model or SPRITES)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {arguments.model!r}. Pass --model with a Kosmos-G folder.")
    for line in [*_software(), *_machine(), *_model(folder)]:
        print(line)


# Software and machine ------------------------------------------------------------------------------------------------


def _software():
    yield f"- {PACKAGE}: {__version__}{_origin()}"
    kind = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    yield f"- Python: {platform.python_version()}, {platform.python_implementation()}, {kind}"
    needed, extras = _requirements()
    for name, versions in needed.items():
        yield f"- {name}: {_version(name) or 'not installed'}{versions and f' (needed: {versions})'}"
    names = sorted({*extras, *OTHERS} - {*needed}, key=str.lower)
    installed = {name: _version(name) for name in names}
    yield "- Extras: " + ", ".join(f"{name} {version}" for name, version in installed.items() if version)
    yield "- Not installed: " + ", ".join(name for name, version in installed.items() if not version)


def _origin():
    """How the package was installed, without the address that it came from, which may hold a token."""
    try:
        origin = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
        editable = origin.get("dir_info", {}).get("editable")
    except metadata.PackageNotFoundError:
        return ", not installed by pip"
    except Exception:  # damaged metadata
        return ""
    return f", commit {_shown(commit)}" if commit else ", editable" if editable else ""


def _requirements():
    """(core package -> versions that it needs, names of the packages of all extras but `dev`)."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except Exception:  # not installed, or damaged metadata
        lines = []
    core, extras = dict.fromkeys(CORE, ""), set()
    for line in lines:
        name, versions, extra = re.match(r"([\w.-]+)[^<>=!~;]*([^;]*)(.*)", line).groups()
        if "extra" not in extra:
            core[name] = versions.strip()
        elif name != PACKAGE and "dev" not in extra:
            extras.add(name)
    return core, extras


def _version(name):
    """What pip has recorded, without importing the package; None if it is not there."""
    try:
        return metadata.version(name) or "unknown"
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # damaged metadata make the reader raise nearly anything
        return "unknown, its metadata cannot be read"


def _machine():
    yield f"- System: {platform.platform()}, {os.cpu_count()} CPU cores, {_memory()}"
    yield f"- Device: {_devices()}"
    given = [f"{name}={_shown(os.environ[name])}" for name in VARIABLES if name in os.environ]
    yield "- Environment: " + (", ".join(given) or "nothing of note")


def _memory():
    try:
        import psutil

        memory = psutil.virtual_memory()
        return f"{memory.total / 2**30:.1f} GiB of memory, {memory.available / 2**30:.1f} GiB of it available"
    except Exception:  # an extra
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return f"{total / 2**30:.1f} GiB of memory"
        except (AttributeError, ValueError, OSError):  # Windows
            return "unknown memory"


def _devices():
    """Asked in a process of its own: a torch that is broken, or built for another CPU, ends that and not this one."""
    ask = "from kosmos_g_diffusers.environment import describe_devices; print(describe_devices())"
    # -P and the path of this process: nothing from the working folder is imported
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", ask],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown, torch does not start: {_shown(error)}"
    said = (answer.stdout if answer.returncode == 0 else answer.stderr).strip().splitlines()
    if answer.returncode or not said:
        return (
            f"unknown, torch does not start: {_shown(said[-1] if said else f'exit code {answer.returncode}')}"
        )
    return _shown(said[-1])


# Model ---------------------------------------------------------------------------------------------------------------


def _model(folder):
    if str(folder) == SPRITES:
        yield "- Model: the small model that ships"
    else:
        yield f"- Model: {_shown(folder)}"
    index = _index(folder / "model_index.json")
    kind = index.get("_class_name", "unknown, there is no model_index.json that can be read")
    kind = kind[-1] if isinstance(kind, list) and kind else kind
    yield f"  - pipeline: {_shown(kind)}, written by diffusers {_shown(index.get('_diffusers_version'))}"
    header, sources = _card(folder / "README.md")
    parts = {
        name: place[1]
        for name, place in index.items()
        if re.fullmatch(r"[a-z]\w*", name) and isinstance(place, list) and len(place) == 2 and place[1]
    }
    for name, kind in islice(parts.items(), MOST_COMPONENTS):
        source = f", from {sources[name]}" if name in sources else ""
        yield f"  - {name}: {_shown(kind)}{_weights(folder / name)}{source}"
    yield f"  - card: {header}"
    yield f"  - code in the folder: {_code(folder)}"


def _index(path):
    try:
        index = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return index if isinstance(index, dict) else {}


def _weights(folder):
    """Number of parameters by dtype, from the headers of the files."""
    counts = Counter()
    try:
        from safetensors import safe_open

        for path in filter(Path.is_file, sorted(folder.glob("*.safetensors"))):
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    except Exception as error:  # safetensors itself may be broken
        return f", weights cannot be read: {_shown(error)}"
    return "".join(f", {count:,} parameters of {dtype}" for dtype, count in counts.items())


def _card(path):
    """(the header of a model card, component -> where its weights come from)."""
    text = _text(path)
    if text is None:
        return "none", {}
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    # of other keys nothing is known: they may be personal
    wanted = re.findall(
        r"^(?:base_model|license|pipeline_tag):(?: .*|(?:\n- .*)+)$", header.group(1) if header else "", re.M
    )
    rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    sources = {row[0]: _shown(row[3]) for row in rows if len(row) == 5}
    return "; ".join(_shown(" ".join(entry.split())) for entry in wanted) or "without a header", sources


def _code(folder):
    """Whether the modules that a saved folder carries are those of this package."""
    package = Path(__file__).parents[1]
    paths = sorted([*folder.glob("*_kosmos_g.py"), *folder.glob("*/*_kosmos_g.py")])
    if not paths:
        return "none"
    other = [path for path in paths if _text(path) != _text(package / path.name)]
    names = ", ".join(path.relative_to(folder).as_posix() for path in other)
    return _shown(f"differs from this package's: {names}") if other else "as in this package"


def _text(path):
    """A short text file; None if it is not one."""
    try:
        if path.is_file() and path.stat().st_size <= MOST_TEXT_BYTES:
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    return None


def _shown(value):
    """One short printable line, without the folders of this machine and of whoever uses it."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    for place, sign in ((sys.prefix, "[python]"), (os.path.realpath(Path.home()), "~"), (Path.home(), "~")):
        if len(str(place)) > 3:  # no root of a file system
            text = re.sub(re.escape(str(place)) + r"(?!\w)", lambda _, sign=sign: sign, text)
    text = re.sub(r"(?<![\w~.:/\]])(?:[A-Za-z]:)?[/\\](?:[^/\\\s'\"]+[/\\])+", ".../", text)
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " ..."
