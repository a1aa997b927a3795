"""The text encoder that stage 2 imitates: the one that the Stable Diffusion was trained with."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from ..files import first_line
from ..loading import IncompleteWeights, load_pretrained

# Where `kosmos-g init` puts them: `text_encoder` of its folder is Kosmos-G's own
MODEL_FOLDER, TOKENIZER_FOLDER = "clip_text_encoder", "clip_tokenizer"
VARIANT = "target"  # in the names of its files, which diffusers downloads with a pipeline otherwise, and none reads them


def target_config(source: str | Path) -> CLIPTextConfig:
    """CLIPTextConfig of the text encoder in `source`, without reading weights; see `load_target`."""
    subfolder, _ = _subfolders(source)
    try:
        values, _ = CLIPTextConfig.get_config_dict(str(source), subfolder=subfolder)
        if not values:  # some releases of transformers say nothing when there is no file
            raise OSError("no config.json")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no {subfolder} in {source}, or it cannot be read ({first_line(error)}). Pass a folder that "
            "kosmos-g init wrote, or a Stable Diffusion in diffusers' layout, its folder or Hub id."
        ) from error
    if values.get("model_type") not in ("clip_text_model", "clip"):
        raise ValueError(
            f"The text encoder of {source} is of the type {values.get('model_type')!r}; conditions are aligned to "
            "'clip_text_model'. Pass the Stable Diffusion 1.x or 2.x that shall draw."
        )
    return CLIPTextConfig.from_dict(values)


def load_target(
    source: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[CLIPTextModel, PreTrainedTokenizerBase]:
    """Read the text encoder to imitate and its tokenizer.

    Args:
        source: a folder that `kosmos-g init` wrote, or a Stable Diffusion in diffusers' layout, its folder or Hub id.
        dtype: of the weights.

    Returns:
        (CLIPTextModel, its tokenizer).

    Raises:
        ValueError: `source` holds no CLIP text encoder, or one with weights missing.
    """
    target_config(source)
    subfolder, tokenizer = _subfolders(source)
    try:
        # version 0.1.0 wrote it without
        variant = VARIANT if any((Path(source) / subfolder).glob(f"*.{VARIANT}*")) else None
        options = {"subfolder": subfolder, "variant": variant, "dtype": dtype, "whole": False}
        model = load_pretrained(CLIPTextModel, source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder=tokenizer)
    except IncompleteWeights as error:
        raise ValueError(
            f"The text encoder of {source} lacks {len(error.names)} weights, such as {error.names[0]}. Were they saved by "
            "a newer transformers? Save them with the installed one, or upgrade it."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The text encoder of {source} or its tokenizer cannot be read ({first_line(error)}). Download it again."
        ) from error
    return model.eval(), tokenizer


def _subfolders(source):
    if (Path(source) / MODEL_FOLDER).is_dir():
        return MODEL_FOLDER, TOKENIZER_FOLDER
    return "text_encoder", "tokenizer"
