"""Kosmos-G for diffusers: prompts of words and images for everything made for Stable Diffusion 1.5."""

from typing import TYPE_CHECKING

from .environment import __version__, lazy_module, lazy_names
from .quiet import hold_back_notes
from .sprites.pretrained import SPRITES

if TYPE_CHECKING:
    from .conversion import convert_checkpoint
    from .modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig, VisionCache
    from .pipeline_kosmos_g import (
        KosmosGControlNetImg2ImgPipeline,
        KosmosGControlNetInpaintPipeline,
        KosmosGControlNetPipeline,
        KosmosGImg2ImgPipeline,
        KosmosGInpaintPipeline,
        KosmosGPipeline,
    )
    from .processing_kosmos_g import KosmosGProcessor, KosmosGTokenizer

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
    "VisionCache",
    "__version__",
    "convert_checkpoint",
]

# model_index.json of a stock pipeline with our components names them, and diffusers takes only what has been imported
for name in ("modeling_kosmos_g", "processing_kosmos_g"):
    lazy_module(f"{__name__}.{name}")
del name

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".conversion": "convert_checkpoint",
        ".modeling_kosmos_g": "KosmosGTextEncoder KosmosGTextEncoderConfig VisionCache",
        ".pipeline_kosmos_g": (
            "KosmosGControlNetImg2ImgPipeline KosmosGControlNetInpaintPipeline KosmosGControlNetPipeline "
            "KosmosGImg2ImgPipeline KosmosGInpaintPipeline KosmosGPipeline"
        ),
        ".processing_kosmos_g": "KosmosGProcessor KosmosGTokenizer",
    },
)

hold_back_notes()  # before the libraries are imported whose notes they are
