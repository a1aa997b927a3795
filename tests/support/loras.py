"""LoRAs of random weights in several spellings, and what they should draw: weights merged by hand."""

import copy

import numpy as np
import pytest
import torch
from support.composing import borrow

from kosmos_g_diffusers import KosmosGPipeline

peft = pytest.importorskip("peft")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "ff.net.2", "conv1")
RANK = 4


def make_lora(unet, seed=0, targets=EVERYWHERE, use_dora=False):
    """Random layers for a U-Net, as peft spells them: `...to_q.lora_A.weight`."""
    unet = copy.deepcopy(unet)
    torch.manual_seed(seed)
    unet.add_adapter(
        peft.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=list(targets),
            init_lora_weights=False,
            use_dora=use_dora,
        )
    )
    layers = peft.get_peft_model_state_dict(unet)
    for name, value in layers.items():
        if "magnitude" in name:  # else DoRA would begin as the plain LoRA
            value.mul_(torch.linspace(0.5, 1.5, len(value)))
    return layers


def with_prefix(layers):
    return {f"unet.{name}": value for name, value in layers.items()}


def to_kohya(layers, alpha=RANK):
    """As kohya-ss/sd-scripts writes them: names with underscores, and an alpha for each module."""
    renamed = {}
    for name, value in layers.items():
        module, _, part = name.partition(".lora_")
        module = "lora_unet_" + module.replace(".", "_")
        renamed[f"{module}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        renamed[f"{module}.alpha"] = torch.tensor(float(alpha))
    return renamed


DIFFUSERS_TEXT_ENCODER = {
    f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{part}_proj.lora_linear_layer.{side}.weight": value
    for layer in range(2)
    for part in "qv"
    for side, value in (("down", torch.ones(4, 768)), ("up", torch.ones(768, 4)))
}


def merge_by_hand(unet, *weighted):
    """A copy of the U-Net with (layers, weight) added to its own weights, as the papers of LoRA and DoRA define it."""
    unet = copy.deepcopy(unet)
    for layers, weight in weighted:
        for name in [name for name in layers if "lora_A" in name]:
            module = unet.get_submodule(name.removesuffix(".lora_A.weight"))
            up = layers[name.replace("lora_A", "lora_B")]
            merged = module.weight + weight * (up.flatten(1) @ layers[name].flatten(1)).view_as(module.weight)
            magnitude = layers.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
            if magnitude is not None:
                merged = magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
            module.weight.data = merged.detach()
    return unet


def picture_of(pipe, draw, unet, prompt="<dog> in a hat"):
    """What the pipeline draws with another U-Net."""
    return draw(borrow(KosmosGPipeline, pipe, unet=unet), prompt)


def differ(first, second):
    return np.abs(first - second).max() > 1e-3


def equal(first, second):
    np.testing.assert_allclose(first, second, atol=1e-4, rtol=0)
    return True
