"""The denoising loop: diffusers' own loop blocks for SDXL, which serve the U-Nets of Stable Diffusion 1.5 as they are."""

from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import ConditionalPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import denoise as sdxl

from .modular_pipeline import KosmosGBlock, component_of, ordinary

DENOISER, CONTROLNET = sdxl.StableDiffusionXLLoopDenoiser, sdxl.StableDiffusionXLControlNetLoopDenoiser
BEFORE, INPAINT = sdxl.StableDiffusionXLLoopBeforeDenoiser, sdxl.StableDiffusionXLInpaintLoopBeforeDenoiser
AFTER, REPLACE = sdxl.StableDiffusionXLLoopAfterDenoiser, sdxl.StableDiffusionXLInpaintLoopAfterDenoiser


class KosmosGDenoiseStep(KosmosGBlock, sdxl.StableDiffusionXLDenoiseLoopWrapper):
    """Denoises the latents over the timesteps, with any guider. One that is off stays off, which diffusers' loop would switch on."""

    block_classes = [BEFORE, DENOISER, AFTER]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]
    loop_expected_components = property(lambda self: [*map(component_of, ("guider", "scheduler", "unet"))])

    def loop_step(self, components: Any, values: Any, **kwargs: Any) -> tuple[Any, Any]:
        values.num_inference_steps = len(
            values.timesteps
        )  # guiders count the U-Net's calls, of which some steps have two
        return super().loop_step(components, values, **kwargs)

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        values, guider, unet = self.get_block_state(state), components.guider, components.unet
        view = ordinary(components, values)  # with what diffusers' blocks ask of their pipeline for SDXL
        enabled, view.num_channels_unet = guider.get_state()["enabled"], unet.config.in_channels
        view.guider = guider if enabled else ClassifierFreeGuidance(guidance_scale=1.0)
        if view.num_channels_unet == 9 and hasattr(view, "controlnet"):

            def controlnet(sample, *args, **kwargs):  # of the latents, without mask and masked image
                return components.controlnet(sample[:, :4], *args, **kwargs)

            controlnet.forward = components.controlnet.forward  # diffusers looks its arguments up
            vars(view)["controlnet"] = controlnet
        if unet.config.time_cond_proj_dim is not None:
            scales = torch.tensor(guider.guidance_scale - 1).repeat(len(values.latents))
            embeds = view.get_guidance_scale_embedding(scales, embedding_dim=unet.config.time_cond_proj_dim)
            state.set("timestep_cond", embeds.to(values.latents.device, values.latents.dtype))
        try:
            super().__call__(view, state)
        finally:  # the next prompt is encoded as if no step had been counted
            guider.set_state(step=None, num_inference_steps=None, timestep=None)
            (guider.enable if enabled else guider.disable)()
            state.set("num_inference_steps", values.num_inference_steps)
        return components, state


class KosmosGControlNetDenoiseStep(KosmosGDenoiseStep):
    """Denoises under one ControlNet or several."""

    block_classes = [BEFORE, CONTROLNET, AFTER]


class KosmosGInpaintDenoiseStep(KosmosGDenoiseStep):
    """Denoises inside the mask."""

    block_classes = [INPAINT, DENOISER, REPLACE]


class KosmosGInpaintControlNetDenoiseStep(KosmosGDenoiseStep):
    """Denoises inside the mask under ControlNets."""

    block_classes = [INPAINT, CONTROLNET, REPLACE]


class KosmosGAutoDenoiseStep(KosmosGBlock, ConditionalPipelineBlocks):
    """Denoises: under ControlNets for controlnet_cond, inside the mask for mask."""

    masked = [KosmosGInpaintControlNetDenoiseStep, KosmosGInpaintDenoiseStep]
    block_classes = [*masked, KosmosGControlNetDenoiseStep, KosmosGDenoiseStep]
    block_names = ["inpaint_controlnet_denoise", "inpaint_denoise", "controlnet_denoise", "denoise"]
    block_trigger_inputs = ["mask", "controlnet_cond"]

    def select_block(self, mask: Any = None, controlnet_cond: Any = None) -> str:
        return self.block_names[2 * (mask is None) + (controlnet_cond is None)]
