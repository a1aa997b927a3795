"""What `init`, and `convert` for a checkpoint of stage 1, write: a pipeline folder whose AlignerNet is new, to be trained.

Next to what a pipeline reads, the folder holds AlignerNet N and the text encoder to imitate with its tokenizer.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import CLIPTextConfig

from ..modeling_aligner_n import AlignerNetN
from ..modeling_kosmos_g import AlignerNet, KosmosGTextEncoderConfig
from .folder import SHARD_SIZE, Base, write_model, write_pipeline
from .initial_weights import build_fresh
from .target import MODEL_FOLDER, TOKENIZER_FOLDER, VARIANT, load_target, target_config

if TYPE_CHECKING:
    from ..pipeline_kosmos_g import KosmosGPipeline

NEW_ALIGNER = "a new AlignerNet, which has not been trained"


def base_target(base: Base) -> CLIPTextConfig:
    """Configuration of a base's own text encoder, which a new AlignerNet will imitate.

    Raises:
        ValueError: it cannot be read, or the base's U-Net reads conditions of another width.
    """
    target = target_config(base.source)
    width = base.parts["unet"].config.cross_attention_dim
    if width != target.hidden_size:
        raise ValueError(
            f"The U-Net of {base.source} reads conditions of width {width}, its text encoder gives {target.hidden_size}. "
            "Pass a base whose parts belong together, of Stable Diffusion 1.x or 2.x."
        )
    return target


def aligner_sizes(target: CLIPTextConfig, max_position_embeddings: int) -> dict[str, int]:
    """Settings of a KosmosGTextEncoderConfig for an AlignerNet that imitates `target` behind such a language model."""
    return {
        "aligner_hidden_size": target.hidden_size,
        "aligner_attention_heads": target.num_attention_heads,
        "aligner_ffn_dim": target.intermediate_size,
        # the official 32,768 rows would be 16 times what the language model can fill
        "aligner_max_positions": 2 + max_position_embeddings,
        "num_queries": target.max_position_embeddings,
    }


def fresh_aligner_weights(
    config: KosmosGTextEncoderConfig, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """name in the text encoder -> tensor, of a new AlignerNet M."""
    aligner = build_fresh(AlignerNet, config, seed).to(dtype)
    return {f"aligner.{name}": tensor for name, tensor in aligner.state_dict().items()}


def write_to_train(
    folder: Path,
    pipeline: "KosmosGPipeline",
    weights: Mapping[str, Callable[[], dict[str, torch.Tensor]]],
    provenance: Mapping[str, str],
    source: str | Path,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Write the folder.

    Args:
        pipeline, weights, provenance: see `write_pipeline`.
        source: the base, whose text encoder is to be imitated.
        dtype: of AlignerNet N and of that text encoder.
        seed: of AlignerNet M; N has the next one.
    """
    clip, clip_tokenizer = load_target(source, dtype)
    write_pipeline(folder, pipeline, weights, provenance)
    config = pipeline.text_encoder.config
    write_model(build_fresh(AlignerNetN, config, seed + 1).to(dtype), folder / "aligner_n")
    write_model(clip, folder / MODEL_FOLDER, max_shard_size=SHARD_SIZE, variant=VARIANT)
    clip_tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
