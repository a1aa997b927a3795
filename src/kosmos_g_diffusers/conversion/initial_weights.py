"""The official code's random weights, for an AlignerNet or a whole model that starts from nothing."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from transformers.models.kosmos2.modeling_kosmos2 import (
    Kosmos2ImageToTextProjection,
    Kosmos2TextFFN,
    Kosmos2TextTransformer,
    KosmosTextAttention,
)

from ..modeling_aligner_n import AlignerNetN
from ..modeling_kosmos_g import AlignerNet, KosmosGTextEncoderConfig

Module = TypeVar("Module", bound=nn.Module)

SCALED = ("fc1.", "fc2.", "out_proj.", "v_proj.")


def build_fresh(
    module_class: Callable[[KosmosGTextEncoderConfig], Module],
    config: KosmosGTextEncoderConfig,
    seed: int = 0,
) -> Module:
    """AlignerNet or AlignerNetN of a KosmosGTextEncoderConfig with fresh weights; see `reset_weights`."""
    with torch.random.fork_rng(devices=[]):
        return reset_weights(module_class(config), seed)


@torch.no_grad()
def reset_weights(module: Module, seed: int = 0) -> Module:
    """Give a module fresh random weights, in place, as torchscale and fairseq do for the official model.

    Projections are Xavier-uniform; values, outputs and feed-forward layers are then scaled by the depth (Magneto,
    arXiv 2210.06423); learned queries and positions have deviation 1, token embeddings deviation 1 after their scale.
    With transformers' deviation of 0.02 for everything, small models hardly tell one prompt from another. The vision
    tower keeps its weights: transformers gives it CLIP's.

    Args:
        module: KosmosGTextEncoder, AlignerNet, AlignerNetN or a part of them.
        seed: the same seed gives the same weights; torch's global random state is left as it was.

    Returns:
        The module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        for part in module.modules():
            _reset(part)
        for part in module.modules():
            for layers, scale in _stacks(part):
                for name, parameter in layers.named_parameters():
                    if any(scaled in name for scaled in SCALED):
                        parameter.mul_(scale)
    return module


def _reset(part):
    if isinstance(part, KosmosTextAttention):
        gains = {part.q_proj: 0.5, part.k_proj: 0.5, part.v_proj: 0.5, part.out_proj: 1.0}
        for linear, gain in gains.items():
            linear.reset_parameters()
            nn.init.xavier_uniform_(linear.weight, gain=gain**0.5)
        nn.init.zeros_(part.out_proj.bias)
    elif isinstance(part, Kosmos2TextFFN):
        part.fc1.reset_parameters()
        part.fc2.reset_parameters()
    elif isinstance(part, Kosmos2TextTransformer):
        embedding = part.embed_tokens
        nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5)
        embedding.weight[embedding.padding_idx].zero_()
    elif isinstance(part, Kosmos2ImageToTextProjection):
        part.dense.reset_parameters()
        nn.init.normal_(part.latent_query)
    elif isinstance(part, (AlignerNet, AlignerNetN)):
        linear = part.input_projection if isinstance(part, AlignerNet) else part.output_projection
        linear.reset_parameters()
        nn.init.normal_(part.position_embedding.weight)
        nn.init.normal_(part.query_embeds)


def _stacks(part):
    """(layers, factor) of a module: torchscale's for an encoder-decoder, a decoder and an encoder of their own."""
    if isinstance(part, Kosmos2TextTransformer):
        depth = len(part.layers)
        return [(part.layers, math.sqrt(math.log(2 * depth)))]
    if isinstance(part, (AlignerNet, AlignerNetN)):
        depth = len(part.query_layers)
        queries = (part.query_layers, math.sqrt(math.log(3 * depth)))
        if isinstance(part, AlignerNetN):
            return [queries, (part.output_layers, math.sqrt(math.log(2 * depth)))]
        return [queries, (part.encoder_layers, math.sqrt(math.log(3 * depth) * math.log(2 * depth) / 3))]
    return []
