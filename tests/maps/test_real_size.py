"""Maps on random weights of the released size, at tiny steps: that they run, what shape they have, and the memory they take."""

import copy
import resource

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from kosmos_g_diffusers import KosmosGPipeline, KosmosGTextEncoder

GIB = 2**20  # of what getrusage counts in (Linux)


def build_unet():
    """The U-Net of Stable Diffusion 1.5, whose sizes are diffusers' defaults but for the width of the condition."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768).to(torch.bfloat16)
    unet = unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
    return unet


@pytest.mark.slow
def test_maps_binding_and_regions_on_a_unet_of_the_released_size(pipe, photos):
    config = copy.deepcopy(pipe.text_encoder.config)
    config.aligner_hidden_size, config.aligner_attention_heads = 768, 12
    torch.manual_seed(0)
    parts = {"unet": build_unet(), "text_encoder": KosmosGTextEncoder(config).eval().to(torch.bfloat16)}
    pipe = KosmosGPipeline(**pipe.components | parts, requires_safety_checker=False)
    pipe.vae.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)

    def draw(**asked):
        settings = {"num_inference_steps": 3, "height": 128, "width": 128, "output_type": "latent"}
        return pipe(
            "<i> and <i>", images=photos[:2], generator=torch.Generator().manual_seed(0), **settings, **asked
        )

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    plain, before = draw(), peak()
    seen = draw(return_maps=True)
    assert torch.equal(plain.images, seen.images)
    assert peak() - before < 0.25 * GIB
    guided = draw(return_maps=True, binding=1.0, regions=[(0, 0, 0.5, 1), None])
    print(f"{(peak() - before) / GIB:.2f} GiB more with a gradient")
    assert peak() - before < 1.5 * GIB
    assert guided.images.isfinite().all() and not torch.equal(plain.images, guided.images)
    for output in (seen, guided):
        (maps,) = output.maps
        # half of 16 x 16 latents: the layers that are 32 x 32 for an image of 512 pixels
        assert maps.shape == (4, 8, 8) and maps.dtype == torch.float32
        assert np.allclose(maps.sum(0), 1, atol=1e-4)
