"""Draw a prompt of words and a picture along the edges of another picture:

    python examples/controlnet.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/controlnet.py --model ./kosmos-g

The second needs controlnet_aux: pip install 'kosmos-g-diffusers[control]'
"""

import torch
from common import CAT, COFFEE, canny_edges, parse_arguments, save
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGPipeline
from kosmos_g_diffusers.control import build_random_controlnet, load_controlnet
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
if arguments.tiny:
    controlnet = build_random_controlnet(pipe.unet)
else:  # any ControlNet that was made for Stable Diffusion 1.5
    controlnet = load_controlnet("lllyasviel/control_v11p_sd15_canny", arguments.dtype)
pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
pipe.to(arguments.device)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
edges = canny_edges(ImageOps.fit(Image.open(COFFEE), (side, side)), arguments)
image = pipe(
    "<i>, oil painting",
    images=[Image.open(CAT)],  # of the prompt
    image=edges,  # of the ControlNet
    controlnet_conditioning_scale=0.8,
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(make_image_grid([edges, image], rows=1, cols=2), "controlnet.png", arguments)
