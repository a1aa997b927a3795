"""Steps that encode what a call is given: the prompt of words and images, the images of IP-Adapters, images to be changed."""

from typing import Any

import torch
from diffusers.modular_pipelines import AutoPipelineBlocks
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from transformers import CLIPImageProcessor

from .modular_pipeline import KosmosGBlock, KosmosGStep


class KosmosGTextEncoderStep(KosmosGStep):
    """Turns prompts of words and images into the states that Stable Diffusion 1.5's U-Net reads.

    It does what `KosmosGPipeline.encode_prompt` does, with its errors. There is one row for each prompt, which the input step
    repeats. Under a guider that is off no negative prompt is encoded.
    """

    needs = "text_encoder tokenizer guider"
    takes = "prompt images negative_prompt negative_images cross_attention_kwargs clip_skip"
    gives = "prompt_embeds negative_prompt_embeds"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        pipeline.check_widths()
        same = ("negative_prompt", "clip_skip", "images", "negative_images")
        values.prompt_embeds, values.negative_prompt_embeds = pipeline.encode_prompt(
            values.prompt,
            device=components._execution_device,
            do_classifier_free_guidance=components.guider.num_conditions > 1,
            lora_scale=(values.cross_attention_kwargs or {}).get("scale"),
            **{name: values[name] for name in same},
        )


class KosmosGIPAdapterStep(KosmosGStep):
    """Turns the images of IP-Adapters into what their layers in the U-Net read; `pipe.load_ip_adapter` puts these there."""

    needs = "image_encoder feature_extractor unet guider"
    takes = "ip_adapter_image!"
    gives = "ip_adapter_embeds negative_ip_adapter_embeds"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        guides, device = components.guider.num_conditions > 1, components._execution_device
        if pipeline.feature_extractor is None:
            size = pipeline.image_encoder.config.image_size
            pipeline.feature_extractor = CLIPImageProcessor(size=size, crop_size=size)
        embeds = pipeline.prepare_ip_adapter_image_embeds(values.ip_adapter_image, None, device, 1, guides)
        halves = [each.chunk(1 + guides) for each in embeds]  # negative, positive
        values.ip_adapter_embeds = [each[-1] for each in halves]
        values.negative_ip_adapter_embeds = [each[0] for each in halves] if guides else None


class KosmosGAutoIPAdapterStep(KosmosGBlock, AutoPipelineBlocks):
    """Encodes the images of IP-Adapters if ip_adapter_image is given."""

    block_classes = [KosmosGIPAdapterStep]
    block_names = ["ip_adapter"]
    block_trigger_inputs = ["ip_adapter_image"]


def encode_image(components: Any, pixels: torch.Tensor, generator: Any) -> torch.Tensor:
    """(rows, 3, H, W) in [-1, 1] -> (rows, 4, h, w), drawn with a generator for all rows or a list of them; latents stay."""
    vae = components.vae
    pixels = pixels.to(components._execution_device, vae.dtype)
    if pixels.shape[1] == vae.config.latent_channels:
        return pixels
    several = isinstance(generator, list)
    rows = zip(pixels.split(1), generator, strict=False) if several else [(pixels, generator)]
    latents = [retrieve_latents(vae.encode(row), generator=one) for row, one in rows]
    return vae.config.scaling_factor * torch.cat(latents)


class KosmosGVaeEncoderStep(KosmosGStep):
    """Encodes the image to be changed into latents."""

    needs = "vae"
    takes = "image height width generator"
    gives = "image_latents"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        given, generator = {"image": values.image}, values.generator
        pipeline.open_images(given)
        pixels = pipeline.image_processor.preprocess(given["image"], values.height, values.width)
        if isinstance(generator, list) and len(generator) % len(pixels) == 0:
            pixels = torch.cat([pixels] * (len(generator) // len(pixels)))  # each draws an image of its own
        values.image_latents = encode_image(components, pixels, generator)


class KosmosGInpaintVaeEncoderStep(KosmosGStep):
    """Encodes the image to be inpainted and reads the mask.

    What the mask leaves of it is encoded by prepare_latents, after the noise, as in the ordinary pipelines.
    """

    needs = "vae unet"
    takes = "image mask_image height width padding_mask_crop control_image? strength latents generator"
    gives = "image_latents mask masked_image crops_coords"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        given = {name: values[name] for name in ("image", "mask_image")}
        pipeline.open_images(given)
        values.image, values.mask_image = image, mask = given["image"], given["mask_image"]
        size, crop = (values.height, values.width), values.padding_mask_crop
        if values.control_image is None:
            size = pipeline.check_size(*size)
        first = image[0] if isinstance(image, list) else image
        size = pipeline.image_processor.get_default_height_width(first, *size)
        mode = ("default", None)
        if crop is not None:
            mode = ("fill", pipeline.mask_processor.get_crop_region(mask, *size[::-1], pad=crop))
        pixels = pipeline.image_processor.preprocess(image, *size, *mode).to(torch.float32)
        values.mask = pipeline.mask_processor.preprocess(mask, *size, *mode)
        values.masked_image, values.crops_coords = pixels * (values.mask < 0.5), mode[1]
        starts_from_it = values.latents is None and values.strength not in (None, 1)
        needed = components.unet.config.in_channels == 4 or starts_from_it
        values.image_latents = encode_image(components, pixels, values.generator) if needed else None


class KosmosGAutoVaeEncoderStep(KosmosGBlock, AutoPipelineBlocks):
    """Encodes image if it is given, with mask_image for inpainting."""

    block_classes = [KosmosGInpaintVaeEncoderStep, KosmosGVaeEncoderStep]
    block_names = ["inpaint", "img2img"]
    block_trigger_inputs = ["mask_image", "image"]
