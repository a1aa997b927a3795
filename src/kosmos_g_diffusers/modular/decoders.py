"""The step from latents to images."""

from typing import Any

from .modular_pipeline import KosmosGStep


class KosmosGDecodeStep(KosmosGStep):
    """Decodes latents into images, with padding_mask_crop into the one they were cut out of. There is no safety checker."""

    needs = "vae"
    takes = "latents! output_type generator image? mask_image? padding_mask_crop crops_coords"
    gives = "images"

    def run(self, components: Any, pipeline: Any, values: Any) -> None:
        images, vae, processor = values.latents, components.vae, pipeline.image_processor
        if values.output_type != "latent":
            images = images / vae.config.scaling_factor
            images = vae.decode(images, return_dict=False, generator=values.generator)[0]
        images = processor.postprocess(images, output_type=values.output_type)
        if values.padding_mask_crop is not None:
            masked, crop = (values.mask_image, values.image), values.crops_coords
            images = [processor.apply_overlay(*masked, image, crop) for image in images]
        values.images = images
