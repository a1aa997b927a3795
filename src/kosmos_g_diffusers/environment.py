"""The machine and the packages: devices, the dtype that suits each, names of dtypes, versions, how much is said.

Heavy packages are imported when they are needed: a function here imports torch itself, and `lazy_names` and `lazy_module` give
a package of ours names and modules that cost nothing before they are used.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"

DTYPES = ("float32", "float16", "bfloat16")  # names of torch's dtypes that models are loaded in

VERBOSITY = (
    "KOSMOS_G_VERBOSITY"  # environment variable; kosmos-g -v sets it, so that worker processes see it too
)
VERBOSITIES = ("quiet", "verbose")


def verbose() -> bool:
    """Whether to show what other libraries say, and whole tracebacks: KOSMOS_G_VERBOSITY is "verbose", not "quiet" or unset.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(VERBOSITY) or VERBOSITIES[0]
    if value not in VERBOSITIES:
        raise ValueError(f"{VERBOSITY} is {value[:100]!r}; expected {' or '.join(VERBOSITIES)}.")
    return value == "verbose"


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are imported when they are first used (PEP 562).

    Its modules, too, are there without an import of their own, as if the package had imported them.

    Args:
        package: its `__name__`.
        modules: module, relative to the package -> names that it gives, as words of one string.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name):
        if name in module_of:
            value = getattr(import_module(module_of[name], package), name)
        elif name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            module = sys.modules[package]
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__():
        return sorted({*vars(sys.modules[package]), *module_of})

    return __getattr__, __dir__


class LazyModule(ModuleType):
    """A module whose code runs when it is first asked for a name that every module does not have.

    importlib.util.LazyLoader's would also run it for `__file__`, which `inspect` asks of everything in `sys.modules`, even in
    the middle of `import torch`.
    """

    lock: Any = threading.RLock()
    running: set[str] = set()  # modules whose code runs in the thread that holds the lock

    def __getattr__(self, name: str) -> Any:
        if name == "__all__" or not name.startswith("__"):
            self.run()
        return ModuleType.__getattribute__(self, name)

    def __dir__(self) -> list[str]:
        self.run()
        return ModuleType.__dir__(self)

    def run(self) -> None:
        with LazyModule.lock:
            if type(self) is not LazyModule or self.__name__ in LazyModule.running:
                return
            LazyModule.running.add(self.__name__)
            try:
                self.__spec__.loader.exec_module(self)
                self.__class__ = ModuleType
            finally:
                LazyModule.running.remove(self.__name__)


def lazy_module(name: str) -> None:
    """Put a module into `sys.modules` without running its code, for those who look it up there and do not import it."""
    if name not in sys.modules:
        sys.modules[name] = module_from_spec(find_spec(name))
        sys.modules[name].__class__ = LazyModule


def as_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a name of DTYPES."""
    import torch

    return getattr(torch, name)


def default_device() -> str:
    """The accelerator of this machine, or "cpu"."""
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def check_device(device: "str | torch.device") -> None:
    """ValueError if `device` names no device, or one that this machine does not have."""
    if str(device) == "cpu":
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"{str(device)!r} is not a device. Pass --device with a name such as cpu, cuda, cuda:1 or mps."
        ) from error
    if kind not in ("cpu", default_device()):
        raise ValueError(f"The device {str(device)!r} is not there; {default_device()!r} is. Pass --device.")


def default_dtype(device: "str | torch.device", half: str = "float16") -> str:
    """The name of the dtype for a device: "float32" on any CPU, `half` on an accelerator."""
    return "float32" if str(device).partition(":")[0] == "cpu" else half


def free_memory(device: "str | torch.device") -> int | None:
    """Bytes that are free on a device, in the machine for "cpu"; None where torch does not know."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        if find_spec("psutil"):  # comes with accelerate
            import psutil

            return psutil.virtual_memory().available
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else None
    module = torch.get_device_module(kind)
    with suppress(
        AssertionError, RuntimeError
    ):  # drivers that cannot tell; whether they can draw shows later
        if hasattr(module, "mem_get_info"):
            # what torch's allocator holds without a tensor in it is free as well
            unused = module.memory_reserved(device) - module.memory_allocated(device)
            return module.mem_get_info(torch.device(device))[0] + unused
        if hasattr(module, "recommended_max_memory"):  # Apple's chips share the memory of the machine
            return module.recommended_max_memory() - module.current_allocated_memory()
    return None


def describe_devices() -> str:
    """One line about the devices that torch sees: names, memory, and what this torch was built for."""
    import torch

    kind = default_device()
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    parts = [f"{name} {version}" for name, version in builds.items() if version]
    if kind == "cpu":
        return ", ".join(["cpu", torch.backends.cpu.get_cpu_capability(), *parts])
    module = torch.get_device_module(kind)
    if hasattr(module, "get_device_properties"):
        for index in range(module.device_count()):
            properties = module.get_device_properties(index)
            parts.append(f"{kind}:{index} {properties.name}, {properties.total_memory / 2**30:.1f} GiB")
            if hasattr(module, "mem_get_info"):
                parts[-1] += f", {module.mem_get_info(index)[0] / 2**30:.1f} GiB of it free"
    elif hasattr(module, "recommended_max_memory"):  # Apple's chips share the memory of the machine
        parts.append(f"up to {module.recommended_max_memory() / 2**30:.1f} GiB")
    return ", ".join([kind, *parts])


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the pixels, by name of their modules."""
    import diffusers
    import PIL
    import torch
    import transformers

    modules = (sys.modules[__package__], torch, diffusers, transformers, PIL)
    return {module.__name__: str(module.__version__) for module in modules}
