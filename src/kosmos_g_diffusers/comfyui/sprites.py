"""The small model that ships, for ComfyUI's samplers. ComfyUI's own loaders cannot take it: they build Stable Diffusion's sizes
alone (a context 768 wide from 320 channels, norms over 32 groups), so diffusers' modules are put where ComfyUI has its own.
"""

import logging
from contextlib import contextmanager
from typing import Any

import comfy.model_management as memory
import torch
from comfy.controlnet import ControlNet
from comfy.latent_formats import LatentFormat
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy.supported_models_base import BASE
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from ..sprites.pretrained import SPRITES, SPRITES_CONTROL, sprites_controlnet

PIXELS_A_LATENT = 4


class SpritesUNet(UNet2DConditionModel):
    """Called as ComfyUI calls a U-Net: (B, 4, h, w), (B,), (B, K, A) -> (B, 4, h, w)."""

    def forward(self, x, timesteps, context=None, control=None, **others):
        residuals = {}
        if control:
            residuals["down_block_additional_residuals"] = tuple(control["output"])
            residuals["mid_block_additional_residual"] = control["middle"][0]
        return super().forward(x, timesteps, context, **residuals).sample


class SpritesControlNet(torch.nn.Module):
    """Called as ComfyUI calls a ControlNet; what it returns is in the order that ComfyUI's U-Nets take it in."""

    def __init__(self, controlnet: ControlNetModel):
        super().__init__()
        self.controlnet, self.dtype = controlnet, controlnet.dtype

    def forward(self, x, hint, timesteps, context, **others):
        down, middle = self.controlnet(x, timesteps, context, hint, return_dict=False)
        return {"middle": [middle], "output": list(down)}


class SpritesVAE(torch.nn.Module):
    """Called as ComfyUI calls a VAE: pixels in [-1, 1], latents without the scale."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def encode(self, pixels):
        return self.vae.encode(pixels).latent_dist.mode()

    def decode(self, latents):
        return self.vae.decode(latents).sample


def load_sprites() -> tuple[ModelPatcher, VAE, ControlNet]:
    """(MODEL, VAE, CONTROL_NET) of the small model, in float32."""
    device, offload = memory.get_torch_device(), memory.unet_offload_device()
    options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    unet = SpritesUNet.from_pretrained(SPRITES, subfolder="unet", **options).eval()
    vae = AutoencoderKL.from_pretrained(SPRITES, subfolder="vae", **options).eval()
    controlnet = ControlNetModel.from_pretrained(sprites_controlnet(SPRITES_CONTROL), **options).eval()
    # disabled: the U-Net is put in below
    config = BASE(
        {
            "context_dim": unet.config.cross_attention_dim,
            "in_channels": unet.config.in_channels,
            "model_channels": unet.config.block_out_channels[0],
            "disable_unet_model_creation": True,
        }
    )
    config.latent_format = LatentFormat()
    config.latent_format.scale_factor = vae.config.scaling_factor
    model = BaseModel(config, ModelType.V_PREDICTION, device=offload)
    model.diffusion_model = unet
    control = ControlNet(SpritesControlNet(controlnet), compression_ratio=PIXELS_A_LATENT, load_device=device)
    return (
        ModelPatcher(model, load_device=device, offload_device=offload),
        _as_comfy_vae(SpritesVAE(vae)),
        control,
    )


def _as_comfy_vae(model):
    with _no_warnings():  # that there are no weights
        vae = VAE(sd={})
    vae.first_stage_model = model
    vae.downscale_ratio = vae.upscale_ratio = PIXELS_A_LATENT
    vae.device, vae.output_device, vae.vae_dtype = (
        memory.vae_device(),
        memory.intermediate_device(),
        torch.float32,
    )
    offload = memory.vae_offload_device()
    vae.patcher = ModelPatcher(model, load_device=vae.device, offload_device=offload)
    return vae


@contextmanager
def _no_warnings():
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
