"""Steps before the loop. The ordinary pipelines' methods draw the noise, so that a seed gives the same image."""

import inspect
from typing import Any

import torch
from diffusers.modular_pipelines import AutoPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise as sdxl
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_timesteps

from .modular_pipeline import KosmosGBlock, KosmosGStep, component_of, input_of, ordinary

CONDITIONS = "prompt_embeds negative_prompt_embeds ip_adapter_embeds negative_ip_adapter_embeds"
ROWS = "batch_size num_images_per_prompt"  # what the input step leaves


class KosmosGInputStep(KosmosGStep):
    """Repeats what belongs to a prompt for each of its images, p0 p0 p1 p1."""

    takes = f"num_images_per_prompt {CONDITIONS}"
    gives = f"batch_size dtype {CONDITIONS}"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        prompts, images = len(values.prompt_embeds), values.num_images_per_prompt
        values.batch_size, values.dtype = prompts, values.prompt_embeds.dtype

        def repeated(rows):
            if isinstance(rows, list):
                return [repeated(each) for each in rows]
            if len(rows) not in (1, prompts):
                raise ValueError(f"{len(rows)} rows were given for {prompts} prompts. Pass one for each.")
            return rows.repeat_interleave(images * prompts // len(rows), dim=0)

        for name in CONDITIONS.split():
            values[name] = None if values[name] is None else repeated(values[name])


class KosmosGSetTimestepsStep(KosmosGStep):
    """Sets the scheduler's timesteps. With an image to be changed those are left out that strength skips."""

    needs = "scheduler"
    takes = f"num_inference_steps timesteps sigmas strength image_latents? mask? {ROWS}"
    gives = "timesteps num_inference_steps latent_timestep"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        device, parameters = components._execution_device, inspect.signature(pipeline.__call__).parameters
        given = (values.num_inference_steps, device, values.timesteps, values.sigmas)
        drawn = retrieve_timesteps(components.scheduler, *given)
        if "strength" in parameters:
            strength = parameters["strength"].default if values.strength is None else values.strength
            if not 0 <= strength <= 1:
                raise ValueError(f"strength={strength} was given. Expected a number from 0 to 1.")
            drawn = pipeline.get_timesteps(drawn[1], strength, device)
        values.timesteps, values.num_inference_steps = drawn
        values.latent_timestep = values.timesteps[:1].repeat(values.batch_size * values.num_images_per_prompt)


class KosmosGPrepareLatentsStep(KosmosGStep):
    """Draws noise of the size that is asked for, else of the control image's, else of the U-Net's own."""

    needs = "scheduler unet vae"
    takes = f"height width latents generator control_image? dtype {ROWS}"
    gives = "latents"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        size, given = (values.height, values.width), {"control_image": values.control_image}
        pipeline.open_images(given)
        while isinstance(control := given["control_image"], list):
            given["control_image"] = control[0]
        if control is not None:
            size = pipeline.image_processor.get_default_height_width(control, *size)
        rows, channels = values.batch_size * values.num_images_per_prompt, components.unet.config.in_channels
        place = (values.dtype, components._execution_device, values.generator, values.latents)
        values.latents = pipeline.prepare_latents(rows, channels, *pipeline.check_size(*size), *place)


class KosmosGImg2ImgPrepareLatentsStep(KosmosGStep):
    """Adds noise to the latents of the image to be changed."""

    needs = "scheduler vae"
    takes = f"latents image_latents generator latent_timestep! dtype {ROWS}"
    gives = "latents"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        rows, generator = (values.batch_size, values.num_images_per_prompt), values.generator
        if isinstance(generator, list) and len(generator) != rows[0] * rows[1]:
            raise ValueError(f"{len(generator)} generators were given for {rows[0] * rows[1]} images.")
        if values.latents is None:
            rows = (*rows, values.dtype, components._execution_device, generator)
            values.latents = pipeline.prepare_latents(values.image_latents, values.latent_timestep, *rows)


class KosmosGInpaintPrepareLatentsStep(KosmosGStep):
    """Draws noise and encodes what the mask leaves of the image."""

    needs = "scheduler unet vae"
    pixels = "mask! masked_image! image_latents? masked_image_latents?"
    takes = f"latents generator strength latent_timestep! dtype {ROWS} {pixels}"
    gives = "latents noise image_latents mask masked_image_latents"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        channels = components.unet.config.in_channels
        if channels not in (4, 9):
            raise ValueError(f"The U-Net has {channels} input channels. Inpainting needs one of 4 or 9.")
        rows, size = values.batch_size * values.num_images_per_prompt, values.mask.shape[-2:]
        place = (values.dtype, components._execution_device, values.generator)
        image, masked = values.image_latents, values.masked_image_latents
        drawn = pipeline.prepare_latents(
            *(rows, components.vae.config.latent_channels, *size, *place, values.latents),
            image=values.masked_image if image is None else image,  # None if it is not looked at
            timestep=values.latent_timestep,
            is_strength_max=values.strength in (None, 1),
            return_noise=True,
            return_image_latents=channels == 4,
        )
        values.latents, values.noise, values.image_latents = (*drawn, None)[:3]
        masked = values.masked_image if masked is None else masked
        masked = pipeline.prepare_mask_latents(values.mask, masked, rows, *size, *place, False)
        values.mask, values.masked_image_latents = masked


class KosmosGAutoPrepareLatentsStep(KosmosGBlock, AutoPipelineBlocks):
    """Prepares latents: of inpainting for mask, of image-to-image for image_latents, else of text-to-image."""

    changing = [KosmosGInpaintPrepareLatentsStep, KosmosGImg2ImgPrepareLatentsStep]
    block_classes = [*changing, KosmosGPrepareLatentsStep]
    block_names = ["inpaint", "img2img", "text2img"]
    block_trigger_inputs = ["mask", "image_latents", None]


class KosmosGControlNetInputStep(KosmosGBlock, sdxl.StableDiffusionXLControlNetInputStep):
    """Prepares control images: diffusers' step, for all forms that the ordinary pipelines take and with their errors."""

    expected_components = property(lambda self: [component_of("controlnet")])

    @property
    def inputs(self) -> list:
        own = "controlnet_conditioning_scale image? mask_image? padding_mask_crop height width".split()
        return [*(each for each in super().inputs if each.name not in own), *map(input_of, own)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        values = self.get_block_state(state)
        given = {**values.as_dict(), "prompt_embeds": range(values.batch_size)}
        pipeline = ordinary(components, values)
        pipeline.open_images(given)
        pipeline.check_controls("control_image", given)
        controls, name = given["control_image"], "controlnet_conditioning_scale"
        if isinstance(controls, list) and isinstance(controls[0], list):
            controls = [list(images) for images in zip(*controls, strict=True)]  # for each ControlNet
        state.set("control_image", controls)
        default = inspect.signature(pipeline.__call__).parameters[name].default
        state.set(name, default if values[name] is None else values[name])
        super().__call__(pipeline, state)
        return components, state


class KosmosGAutoControlNetInputStep(KosmosGBlock, AutoPipelineBlocks):
    """Prepares control images if control_image is given."""

    block_classes = [KosmosGControlNetInputStep]
    block_names = ["controlnet"]
    block_trigger_inputs = ["control_image"]
