"""The folder in ComfyUI's custom_nodes: written, brought up to date and taken out. What the user has put there or changed stays.

Needs neither ComfyUI nor torch, except `export_sprites`.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..files import partial_folder, read_json, write_bytes
from ..sprites.pretrained import HEART, SPRITES, STAR

TESTED = ("0.3.64",)  # versions of ComfyUI that `make test-comfyui` passed with
FOLDER = "kosmos_g"  # in custom_nodes
SOURCE = Path(__file__).with_name("custom_node")
MANIFEST = ".installed.json"  # relative path -> SHA-256 of what was written
PARTS = ("main.py", "nodes.py", "comfy", "custom_nodes")  # of every ComfyUI
LORA_RANK = 4


@dataclass(frozen=True)
class Outcome:
    """What `install` and `uninstall` did: a folder, whether anything changed there, and files of the user's that stay."""

    folder: Path
    changed: bool
    kept: tuple[str, ...]


def find_comfyui(path: str | Path) -> Path:
    """The root of a ComfyUI. Raises ValueError unless it is one; the message says where one is, if that is near."""
    root = Path(path)
    if all((root / part).exists() for part in PARTS):
        return root.resolve()
    inside = root / "ComfyUI"
    hint = f" Did you mean {str(inside)!r}?" if inside.is_dir() else ""
    raise ValueError(
        f"{str(path)!r} is not a ComfyUI: expected a folder with {', '.join(PARTS)}. Pass the folder that main.py is in.{hint}"
    )


def version_of(root: Path) -> str | None:
    """What comfyui_version.py says, or None."""
    try:
        text = (root / "comfyui_version.py").read_text(encoding="utf-8", errors="replace")[:1000]
    except OSError:
        return None
    found = re.search(r"""__version__\s*=\s*["']([\w.]+)["']""", text)
    return found and found[1]


def install(path: str | Path) -> Outcome:
    """Write the folder, or bring one that was written before up to date; files that the user changed since then are kept.

    Raises:
        ValueError: no ComfyUI, or a folder of that name that was not written by this.
    """
    folder = find_comfyui(path) / "custom_nodes" / FOLDER
    ours = {name.as_posix(): (SOURCE / name).read_bytes() for name in _files(SOURCE)}
    new = {name: hash_bytes(data) for name, data in ours.items()}
    if not folder.exists() and not folder.is_symlink():
        with partial_folder(folder) as part:
            for name, data in ours.items():
                write_bytes(Path(part) / FOLDER / name, data)
            _write_manifest(Path(part) / FOLDER, new)
            (Path(part) / FOLDER).rename(folder)
        return Outcome(folder, True, ())
    # what uninstall has left for the user is not refused
    old = {} if _is_leftover(folder, ours) else _manifest(folder)
    changed, kept = [], []
    for name in sorted({*old, *new}):
        file = folder / name
        present = hash_bytes(file.read_bytes()) if file.is_file() else None
        if present == new.get(name):
            continue
        if present is not None and present != old.get(name):
            kept.append(name)
            continue
        changed.append(name)
        if name in ours:
            write_bytes(file, ours[name])
        else:
            file.unlink(missing_ok=True)
    _write_manifest(folder, {**new, **{name: old.get(name, new.get(name)) for name in kept}})
    _drop_empty(folder)
    return Outcome(folder, bool(changed), tuple(kept))


def uninstall(path: str | Path) -> Outcome:
    """Take out what `install` wrote; what the user has added or changed stays.

    Raises:
        ValueError: no ComfyUI, nothing installed, or a folder that was not written by this.
    """
    folder = find_comfyui(path) / "custom_nodes" / FOLDER
    if not folder.exists() and not folder.is_symlink():
        raise ValueError(f"The nodes are not installed there: there is no {folder}.")
    for name, written in _manifest(folder).items():
        file = folder / name
        if file.is_file() and hash_bytes(file.read_bytes()) == written:
            file.unlink()
    (folder / MANIFEST).unlink()
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    kept = tuple(name.as_posix() for name in _files(folder))
    _drop_empty(folder)
    return Outcome(folder, True, kept)


def export_sprites(path: str | Path) -> list[Path]:
    """Write what the workflows of the small model need next to the nodes: their images and a LoRA. Returns the files.

    Raises:
        ValueError: no ComfyUI, or a file of that name with other contents.
    """
    from safetensors.torch import save

    root = find_comfyui(path)
    files = {
        root / "input" / "kosmos_g_star.png": Path(STAR).read_bytes(),
        root / "input" / "kosmos_g_heart.png": Path(HEART).read_bytes(),
        root / "models" / "loras" / "kosmos_g_sprites.safetensors": save(_sprites_lora()),
    }
    for file, data in files.items():
        # a LoRA of an earlier release of the small model has the same names in it
        ours = file.suffix == ".safetensors" and file.is_file() and b"lora_unet_" in file.read_bytes()[:4096]
        if file.exists() and not ours and file.read_bytes() != data:
            raise ValueError(f"{file} is there already and is another file. Move it away first.")
    for file, data in files.items():
        write_bytes(file, data)
    return list(files)


def _sprites_lora():
    """A LoRA to try with: it takes away half of what the cross-attention adds, as far as a low rank can.

    Made of the weights, so that it fits whatever small model ships; in kohya's spelling, which ComfyUI reads for any U-Net.
    """
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for name, weight in load_file(Path(SPRITES) / "unet" / "diffusion_pytorch_model.safetensors").items():
        if name.endswith("attn2.to_out.0.weight"):
            u, s, v = torch.linalg.svd(weight.float())
            module = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            up = -0.5 * u[:, :LORA_RANK] * s[:LORA_RANK]
            tensors[f"{module}.lora_up.weight"] = up.half().contiguous()
            tensors[f"{module}.lora_down.weight"] = v[:LORA_RANK].half().contiguous()
            tensors[f"{module}.alpha"] = torch.tensor(float(LORA_RANK))
    return tensors


def _files(folder):
    return sorted(
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name != MANIFEST
    )


def hash_bytes(data: bytes) -> str:
    """SHA-256, as the list of files has it."""
    return hashlib.sha256(data).hexdigest()


def _manifest(folder):
    """What was written there. ValueError if it is not a folder of ours: a link, a clone, somebody else's."""
    try:
        if folder.is_symlink():
            raise ValueError("it is a link")
        written = read_json(folder / MANIFEST, "")
        sound = isinstance(written, dict) and all(
            isinstance(digest, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
            for name, digest in written.items()
        )
        if not sound:
            raise ValueError("its list of files is damaged")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} was not written by kosmos-g comfyui install, and stays as it is. Move it away, or remove it yourself."
        ) from error
    return written


def _is_leftover(folder, ours):
    return folder.is_dir() and not any((folder / name).exists() for name in (MANIFEST, *ours))


def _write_manifest(folder, written):
    write_bytes(folder / MANIFEST, json.dumps(written, indent=1, sort_keys=True).encode())


def _drop_empty(folder):
    for inside in sorted((place for place in [folder, *folder.rglob("*")] if place.is_dir()), reverse=True):
        if not any(inside.iterdir()):
            inside.rmdir()
