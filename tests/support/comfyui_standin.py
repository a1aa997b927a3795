"""A small stand-in of what the nodes touch in ComfyUI, for tests without one; `tests/comfyui/test_server.py` has the real one.

Links carry what ComfyUI's carry: IMAGE a tensor (B, H, W, C) in [0, 1], CONDITIONING [[states, options]], MODEL something with
`model.model_config.unet_config`.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

import torch

OURS = ("nodes", "encoder", "sprites", "checks")


class Part:
    """An input or output of a schema, as it was declared."""

    def __init__(self, kind, id=None, **options):
        self.kind, self.id, self.options = kind, id, options


def type_named(name):
    return SimpleNamespace(
        Input=lambda id, **options: Part(name, id, **options), Output=lambda **options: Part(name, **options)
    )


class Schema:
    def __init__(self, **options):
        self.__dict__.update({"inputs": [], "outputs": [], "is_output_node": False, **options})


class NodeOutput:
    def __init__(self, *args):
        self.args = args


class FolderPaths(ModuleType):
    """models/, output/ and what is registered below them."""

    def __init__(self, root):
        super().__init__("folder_paths")
        self.models_dir = str(root / "models")
        self._output, self._places = str(root / "output"), {}

    def get_output_directory(self):
        return self._output

    def add_model_folder_path(self, kind, path):
        self._places.setdefault(kind, []).append(path)

    def get_folder_paths(self, kind):
        return self._places[kind]

    def get_filename_list(self, kind):
        return sorted(
            name for place in self._places[kind] if os.path.isdir(place) for name in os.listdir(place)
        )

    def get_full_path(self, kind, name):
        return next(
            (path for place in self._places[kind] if os.path.isfile(path := os.path.join(place, name))), None
        )

    def get_full_path_or_raise(self, kind, name):
        path = self.get_full_path(kind, name)
        if path is None:
            raise FileNotFoundError(name)
        return path

    def get_save_image_path(self, prefix, folder):
        full = os.path.join(folder, os.path.dirname(prefix))
        os.makedirs(full, exist_ok=True)
        return full, os.path.basename(prefix), 1 + len(os.listdir(full)), os.path.dirname(prefix), prefix


class Module(torch.nn.Module):
    """What a ModelPatcher may wrap: ComfyUI sets `device` on it."""


class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        model.device = load_device
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


class BaseModel(Module):
    def __init__(self, model_config, model_type, device=None):
        super().__init__()
        self.model_config, self.model_type = model_config, model_type


class BASE:
    def __init__(self, unet_config):
        self.unet_config = unet_config


class ControlNet:
    def __init__(self, control_model, compression_ratio, load_device):
        self.patcher = ModelPatcher(control_model, load_device, load_device)
        self.control_model, self.compression_ratio = control_model, compression_ratio


def install_standin(monkeypatch, root):
    """Put the stand-in where `import` finds it, until the test ends; returns the package's nodes as a module."""
    cpu, loaded = torch.device("cpu"), []
    io = SimpleNamespace(ComfyNode=object, Schema=Schema, NodeOutput=NodeOutput, Custom=type_named)
    for name in ("Image", "Model", "Vae", "ControlNet", "Conditioning", "String", "Float", "Combo"):
        setattr(io, name, type_named(name.upper()))
    memory = {
        name: lambda: cpu
        for name in (
            *(
                "text_encoder_device",
                "text_encoder_offload_device",
                "intermediate_device",
                "get_torch_device",
            ),
            *("unet_offload_device", "vae_device", "vae_offload_device"),
        )
    }
    memory["load_models_gpu"] = lambda models, force_full_load=False: loaded.extend(models)
    memory["loaded"] = loaded
    contents = {
        "comfy_api": {},
        "comfy_api.latest": {"io": io, "ComfyExtension": object},
        "comfy": {},
        "comfy.model_management": memory,
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.controlnet": {"ControlNet": ControlNet},
        "comfy.latent_formats": {"LatentFormat": type("LatentFormat", (), {})},
        "comfy.model_base": {"BaseModel": BaseModel, "ModelType": SimpleNamespace(V_PREDICTION="v")},
        "comfy.sd": {"VAE": lambda sd: SimpleNamespace()},
        "comfy.supported_models_base": {"BASE": BASE},
    }
    modules = {"folder_paths": FolderPaths(root)}
    for name, values in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(values)
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, modules[name])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    import kosmos_g_diffusers.comfyui as package

    for name in OURS:  # those of an earlier test hold its stand-in
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    from kosmos_g_diffusers.comfyui import nodes

    return nodes


def run_node(node, **inputs):
    """The single output of a node, run as ComfyUI does: validated first, links as None."""
    validate = getattr(node, "validate_inputs", None)
    if validate is not None:
        plain = (str, int, float)
        answer = validate(
            **{name: value if isinstance(value, plain) else None for name, value in inputs.items()}
        )
        if answer is not True:
            raise ValueError(answer)
    args = node.execute(**inputs).args
    return args[0] if len(args) == 1 else args
