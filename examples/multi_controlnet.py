"""Draw under two ControlNets at once: edges give the outlines, the picture itself, for a while, the colours:

    python examples/multi_controlnet.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/multi_controlnet.py --model ./kosmos-g

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
    controlnets = [build_random_controlnet(pipe.unet, seed) for seed in range(2)]
else:
    repos = ["lllyasviel/control_v11p_sd15_canny", "lllyasviel/control_v11f1e_sd15_tile"]
    controlnets = [load_controlnet(repo, arguments.dtype) for repo in repos]
pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnets)
pipe.to(arguments.device)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
coffee = ImageOps.fit(Image.open(COFFEE), (side, side))
edges = canny_edges(coffee, arguments)
image = pipe(
    "<i>, oil painting",
    images=[Image.open(CAT)],
    image=[edges, coffee],  # one for each ControlNet, as are these:
    controlnet_conditioning_scale=[0.8, 0.4],
    control_guidance_end=[1.0, 0.5],
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(make_image_grid([edges, coffee, image], rows=1, cols=3), "multi_controlnet.png", arguments)
