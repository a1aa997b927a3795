"""Kosmos-G for diffusers: prompts of words and images for everything made for Stable Diffusion 1.5."""

from .conversion import convert_checkpoint
from .environment import __version__
from .modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig
from .pipeline_kosmos_g import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
)
from .processing_kosmos_g import KosmosGProcessor, KosmosGTokenizer
from .sprites.pretrained import SPRITES

__all__ = [
    "KosmosGControlNetImg2ImgPipeline",
    "KosmosGControlNetInpaintPipeline",
    "KosmosGControlNetPipeline",
    "KosmosGImg2ImgPipeline",
    "KosmosGInpaintPipeline",
    "KosmosGPipeline",
    "KosmosGProcessor",
    "KosmosGTextEncoder",
    "KosmosGTextEncoderConfig",
    "KosmosGTokenizer",
    "SPRITES",
    "__version__",
    "convert_checkpoint",
]
