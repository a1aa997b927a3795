"""The blocks put together: what a call is given decides which of them run. Saved folders are loaded from this file."""

if not __package__:  # `diffusers-cli custom_blocks` runs it by itself: then its folder is its package
    import sys
    from pathlib import Path
    from types import ModuleType

    __package__, here = "kosmos_g_blocks", str(Path(__file__).resolve().parent)
    sys.modules.setdefault(__package__, ModuleType(__package__)).__path__ = [here]

# ruff: noqa: F403, F405
from diffusers.modular_pipelines import ModularPipelineBlocks

# all are named here for diffusers, which copies the files that this one imports and no others
from ..modeling_kosmos_g import KosmosGTextEncoder  # noqa: F401
from ..pipeline_kosmos_g import KosmosGPipeline  # noqa: F401
from ..processing_kosmos_g import KosmosGTokenizer  # noqa: F401
from .before_denoise import *
from .decoders import *
from .denoise import *
from .encoders import *
from .modular_pipeline import KosmosGModularPipeline, KosmosGSequentialBlocks, output_of

TASKS = (("text2image", []), ("image2image", ["image"]), ("inpainting", ["mask_image", "image"]))


class KosmosGCoreDenoiseStep(KosmosGSequentialBlocks):
    """From conditions to denoised latents."""

    before = [KosmosGInputStep, KosmosGSetTimestepsStep, KosmosGAutoPrepareLatentsStep]
    block_classes = [*before, KosmosGAutoControlNetInputStep, KosmosGAutoDenoiseStep]
    block_names = ["input", "set_timesteps", "prepare_latents", "controlnet_input", "denoise"]
    outputs = property(lambda self: [output_of("latents")])


# diffusers' command finds classes by the name of their base
class KosmosGAutoBlocks(KosmosGSequentialBlocks, ModularPipelineBlocks):
    """Stable Diffusion 1.5 with prompts of words and images: text-to-image, image-to-image, inpainting.

    What is given decides: `image`, `mask_image`, `control_image`, `ip_adapter_image`; `available_workflows` lists all.
    """

    encoders = [KosmosGTextEncoderStep, KosmosGAutoIPAdapterStep, KosmosGAutoVaeEncoderStep]
    block_classes = [*encoders, KosmosGCoreDenoiseStep, KosmosGDecodeStep]
    block_names = ["text_encoder", "ip_adapter", "vae_encoder", "denoise", "decode"]
    outputs = property(lambda self: [output_of("images")])
    _workflow_map = {
        f"{adapter}{control}{task}": dict.fromkeys([*extra, *more, *own, "prompt"], True)
        for adapter, extra in (("", []), ("ip_adapter_", ["ip_adapter_image"]))
        for control, more in (("", []), ("controlnet_", ["control_image"]))
        for task, own in TASKS
    }


KosmosGModularPipeline.default_blocks = KosmosGAutoBlocks
