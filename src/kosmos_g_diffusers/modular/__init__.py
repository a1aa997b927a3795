"""Stable Diffusion 1.5 with prompts of words and images in Modular Diffusers.

diffusers calls that part of itself experimental, so nothing else in this package imports this folder. Saved blocks carry
copies of these files and of the three modules that they import, and load where only diffusers and transformers are installed.

Letters of the shapes: B prompts, N images, H and W pixels, h and w their latents; 77 and 768 are the released model's.
"""

import diffusers
from packaging.version import Version

LOWEST_DIFFUSERS = "0.40.0"

if Version(diffusers.__version__) < Version(LOWEST_DIFFUSERS):
    raise ImportError(
        f"kosmos_g_diffusers.modular needs diffusers {LOWEST_DIFFUSERS} or newer; {diffusers.__version__} is installed. "
        "Run: pip install -U diffusers. The rest of kosmos_g_diffusers does not need it."
    )

from .encoders import KosmosGTextEncoderStep  # noqa: E402
from .modular_blocks import KosmosGAutoBlocks  # noqa: E402
from .modular_pipeline import KosmosGModularPipeline, KosmosGSequentialBlocks  # noqa: E402

__all__ = ["KosmosGAutoBlocks", "KosmosGModularPipeline", "KosmosGSequentialBlocks", "KosmosGTextEncoderStep"]
