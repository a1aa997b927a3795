"""Low-rank adapters (LoRA, by peft) of a text encoder: made for training, saved, put onto a pipeline, merged, removed.

Adapted are all linear layers of the language model (queries, keys, values and outputs of attention, both layers of the
feed-forward networks) and of AlignerNet M (the same, in its cross-attention as well, and its input projection). The
vision tower, the resampler, embeddings and norms stay as they are: states of images, and so image words, stay valid.

An adapter folder has peft's own format: adapter_config.json and adapter_model.safetensors. Next to them base.json says which
model it belongs to, see adapter_base.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from ..conversion.folder import locate
from ..files import follow_umask, write_text
from ..modeling_kosmos_g import KosmosGTextEncoder
from .adapter_base import CARD, check_base, describe_base, is_hub_id, write_card
from .adapter_base import FILE as BASE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..modeling_kosmos_g import KosmosGTextEncoder

FOLDER = "adapter"  # in a checkpoint
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CONFIG, BASE, CARD)
NAME = "default"  # peft's own
PREFIX = "base_model.model."  # of peft's files
LAYERS = r"(language_model|aligner)\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)|aligner\.input_projection"


def add_adapter(
    text_encoder: "KosmosGTextEncoder",
    rank: int,
    frozen_dtype: torch.dtype | None = None,
    seed: int = 0,
    base_name: str = "",
) -> None:
    """Put a fresh adapter onto an encoder, in place; only it will train. At first it changes nothing.

    Args:
        text_encoder: KosmosGTextEncoder.
        base_name: of the model, which the adapter keeps with a hash of its weights.
        rank: of the two matrices of each layer; their product counts once (lora_alpha = rank).
        frozen_dtype: torch.float16 or torch.bfloat16 keeps the weights of all linear layers so, which takes half the
            memory and changes nothing under autocast to this dtype, where they would be rounded at every use.
        seed: of the adapter's weights; torch's global random state is left as it was.

    Raises:
        ValueError: the encoder has an adapter already.
        ImportError: peft is not installed.
    """
    _import_peft()
    _check_adapter(text_encoder, False)
    base = describe_base(text_encoder, base_name)
    inject_adapter(text_encoder, rank, frozen_dtype, seed)
    text_encoder.adapter_base = base


def inject_adapter(
    text_encoder: "KosmosGTextEncoder", rank: int, frozen_dtype: torch.dtype | None = None, seed: int = 0
) -> None:
    """As `add_adapter`, without looking at the weights, which may have no values."""
    peft = _import_peft()
    if frozen_dtype is not None:
        for module in text_encoder.modules():
            if isinstance(module, torch.nn.Linear):
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(frozen_dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        peft.inject_adapter_in_model(config, text_encoder, NAME)
    for name, parameter in text_encoder.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def save_adapter(
    text_encoder: "KosmosGTextEncoder",
    folder: str | Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter of an encoder into `folder`.

    Args:
        text_encoder: with an adapter.
        folder: to write; is made.
        state_dict: weights to write instead of the encoder's own, under the names of its `state_dict()`.

    Raises:
        ValueError: the encoder has no adapter.
    """
    peft = _import_peft()
    _check_adapter(text_encoder, True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(text_encoder, state_dict=state_dict, adapter_name=NAME)
    weights = {PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config, base = text_encoder.peft_config[NAME], getattr(text_encoder, "adapter_base", None)
    if base is not None:
        config.base_model_name_or_path = base["name"] if is_hub_id(base["name"]) else None
        write_text(folder / BASE, json.dumps(base, indent=2) + "\n")
        write_card(folder, base, config.r)
    config.save_pretrained(folder)
    follow_umask(folder)


def load_adapter(pipeline_or_encoder: "DiffusionPipeline | KosmosGTextEncoder", folder: str | Path) -> None:
    """Put the adapter in `folder` onto a pipeline's text encoder, in place. It works at once; the weights stay as they are.

    `merge_adapter` makes it part of the weights, `remove_adapter` takes it off; before one of them the encoder cannot be
    saved.

    Args:
        pipeline_or_encoder: any pipeline with a KosmosGTextEncoder, or the encoder.
        folder: an adapter folder or a Hub id of one, or a checkpoint of `kosmos-g train instruct --lora-rank` with one in it.

    Raises:
        ValueError: no adapter there, one of another model (by the hash of its weights; one of an earlier version does not have
            it, and is taken with a note), or the encoder has one already.
        ImportError: peft is not installed.
    """
    peft = _import_peft()
    encoder, folder = _encoder_of(pipeline_or_encoder), find_adapter(folder)
    _check_adapter(encoder, False)
    config = peft.PeftConfig.from_pretrained(str(folder))
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    modules, wrong = dict(encoder.named_modules()), []
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} of the adapter in {folder} holds values that are not finite. Take another checkpoint: this one is "
                "damaged, or its training went astray."
            )
        layer, _, half = name.partition(".lora_")
        side, width = (1, "in_features") if half.startswith("A") else (0, "out_features")
        if tensor.ndim != 2 or tensor.shape[side] != getattr(modules.get(layer), width, None):
            wrong.append(f"{name} {tuple(tensor.shape)}")
    if wrong or not weights:
        raise ValueError(
            f"{len(wrong)} of {len(weights)} weights of the adapter in {folder} fit no layer of this encoder"
            f"{', such as ' + wrong[0] if wrong else ''}. Pass the model it was trained on."
        )
    base = check_base(encoder, folder)
    config.inference_mode = True
    peft.inject_adapter_in_model(config, encoder, NAME)
    result = peft.set_peft_model_state_dict(encoder, weights, NAME)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        remove_adapter(encoder)
        raise ValueError(
            f"The adapter in {folder} does not have the weights that its {CONFIG} promises: {len(missing)} are missing and "
            f"{len(result.unexpected_keys)} are not its own, such as {(missing or result.unexpected_keys)[0]}. Get it again."
        )
    encoder.adapter_base = base
    encoder.requires_grad_(False)
    encoder.eval()


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> str:
    """Upload an adapter with its model card to the Hub, from where `load_adapter(pipe, repo_id)` takes it.

    Args:
        folder: as `load_adapter`.
        repo_id: "owner/name"; made if it is not there. The other keywords are those of huggingface_hub.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: no adapter there.
    """
    folder, api = find_adapter(folder), HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options = {"commit_message": commit_message, "create_pr": create_pr, "allow_patterns": FILES}
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def find_adapter(folder: str | Path) -> Path:
    """The folder of an adapter's files: `folder`, the one in a checkpoint, or a download. ValueError if they are not there."""
    if is_hub_id(str(folder)):
        folder = locate(folder, "adapter", "what kosmos-g train instruct --lora-rank writes", FILES)
    folder = Path(folder)
    if (folder / FOLDER / CONFIG).is_file():
        folder = folder / FOLDER
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"There is no {name} in {folder}. Pass the folder of an adapter, or a checkpoint of "
                "kosmos-g train instruct --lora-rank."
            )
    return folder


def merge_adapter(pipeline_or_encoder: "DiffusionPipeline | KosmosGTextEncoder") -> None:
    """Make the adapter part of the weights, in place: outputs stay the same to rounding, and it costs nothing more.

    Raises:
        ValueError: the encoder has no adapter.
    """
    _unload(pipeline_or_encoder, merge=True)


def remove_adapter(pipeline_or_encoder: "DiffusionPipeline | KosmosGTextEncoder") -> None:
    """Take the adapter off, in place: the encoder is exactly as before. Raises ValueError if it has none."""
    _unload(pipeline_or_encoder, merge=False)


def _unload(pipeline_or_encoder, merge):
    _import_peft()
    from peft.tuners.lora import LoraLayer

    encoder = _encoder_of(pipeline_or_encoder)
    _check_adapter(encoder, True)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            if merge:
                module.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, module.get_base_layer())
    del encoder.peft_config
    vars(encoder).pop("adapter_base", None)


def _encoder_of(pipeline_or_encoder):
    encoder = getattr(pipeline_or_encoder, "text_encoder", pipeline_or_encoder)
    # by name: a pipeline that was loaded as remote code has a class of its own
    if type(encoder).__name__ != KosmosGTextEncoder.__name__:
        raise TypeError(
            f"{type(pipeline_or_encoder).__name__} was given. Expected a pipeline with a KosmosGTextEncoder, or the encoder."
        )
    return encoder


def _check_adapter(text_encoder, expected):
    if (NAME in getattr(text_encoder, "peft_config", {})) == expected:
        return
    if expected:
        raise ValueError("This text encoder has no adapter. Put one on with load_adapter.")
    raise ValueError("This text encoder has an adapter already. Call merge_adapter or remove_adapter first.")


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need the package peft: pip install -U peft") from error
    return peft
