"""Pipelines of the released size with random weights, and their tiny stand-ins."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn

from kosmos_g_diffusers import (
    KosmosGPipeline,
    KosmosGTextEncoder,
    KosmosGTextEncoderConfig,
    KosmosGTokenizer,
    environment,
)
from kosmos_g_diffusers.testing import build_tiny_pipeline

PHOTOS = [Path(__file__).parents[2] / "examples" / "images" / name for name in ("cat.jpg", "coffee.jpg")]
DTYPES = {name: environment.as_dtype(name) for name in environment.DTYPES}

# stable-diffusion-v1-5: unet/config.json, vae/config.json and scheduler/scheduler_config.json
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def build_at_random(build, dtype, seed=0):
    """A model in evaluation mode whose weights are drawn from N(0, 0.02) in `dtype`, with no other copy made.

    Norms are the identity, biases zero, and learned queries N(0, 1) as the model itself begins with. Buffers that no
    checkpoint holds (positions) are as the model computes them.
    """
    generator = torch.Generator().manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            weights = torch.empty(empty.shape, dtype=dtype)
            if name == "bias":
                weights.zero_()
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                weights.fill_(1)
            else:
                weights.normal_(0, 1 if "quer" in name else 0.02, generator=generator)
            setattr(module, name, nn.Parameter(weights, requires_grad=False))
    return nn.Module.to(model.eval(), dtype)  # the buffers; diffusers' own `to` would warn


def build_tokenizer(words=()):
    """A tokenizer with the 64,007 entries of the released one: `words`, characters, and pieces that no prompt holds."""
    pieces = ["▁", *map(chr, range(33, 127)), *sorted({f"▁{word}" for word in words if len(word) > 1})]
    pieces += [f"▁filler{number}" for number in range(64001 - 4 - len(pieces))]
    return KosmosGTokenizer.from_vocabulary([(piece, -6.0) for piece in pieces])


def build_text_encoder(dtype):
    return build_at_random(lambda: KosmosGTextEncoder(KosmosGTextEncoderConfig()), dtype)


def build_unet(dtype):
    return build_at_random(lambda: UNet2DConditionModel(**UNET), dtype)


def build_vae(dtype):
    return build_at_random(lambda: AutoencoderKL(**VAE), dtype)


def build_full_size(dtype, words=()):
    return assemble(build_text_encoder(dtype), build_unet(dtype), build_vae(dtype), words)


def build_tiny(dtype, words=()):
    """The package's tiny random pipeline in `dtype`; its tokenizer has words of its own."""
    pipe = build_tiny_pipeline()
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        nn.Module.to(model.requires_grad_(False), dtype)
    return pipe


def assemble(text_encoder, unet, vae, words=()):
    return KosmosGPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(words),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def encoder_stages(encoder):
    """The stages of a prompt's way through the encoder, as `StageClock` takes them."""
    vision, text, aligner = encoder.vision_model.model, encoder.language_model.model, encoder.aligner
    return {
        "vision": (vision.embeddings, encoder.image_to_text_projection),
        "language model": (text.embed_tokens, text.layer_norm),
        "aligner": (aligner, aligner.final_layer_norm),
    }
