"""The machine and the packages: devices, the dtype that suits each, names of dtypes, versions.

torch is imported when a function needs it: what only lists names stays light.
"""

import sys

__version__ = "0.1.0"

DTYPES = ("float32", "float16", "bfloat16")  # names of torch's dtypes that models are loaded in


def as_dtype(name):
    """The torch dtype of a name of DTYPES."""
    import torch

    return getattr(torch, name)


def default_device():
    """The accelerator of this machine, or "cpu"."""
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def check_device(device):
    """ValueError if `device` names no device, or one that this machine does not have."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"{str(device)!r} is not a device. Pass --device with a name such as cpu, cuda, cuda:1 or mps."
        ) from error
    if kind not in ("cpu", default_device()):
        raise ValueError(f"The device {str(device)!r} is not there; {default_device()!r} is. Pass --device.")


def default_dtype(device, half="float16"):
    """The name of the dtype for a device: "float32" on any CPU, `half` on an accelerator."""
    return "float32" if str(device).partition(":")[0] == "cpu" else half


def package_versions():
    """Versions of the packages that decide the pixels, by name of their modules."""
    import diffusers
    import PIL
    import torch
    import transformers

    modules = (sys.modules[__package__], torch, diffusers, transformers, PIL)
    return {module.__name__: str(module.__version__) for module in modules}
