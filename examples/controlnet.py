"""Draw a prompt of words and an image along the edges of another image:

    python examples/controlnet.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/controlnet.py --model ./kosmos-g

The second needs controlnet_aux: pip install 'kosmos-g-diffusers[control]'
"""

import torch
from common import IMAGES, canny_edges, move, parse_arguments, save, subjects
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGPipeline
from kosmos_g_diffusers.control.controls import load_controlnet
from kosmos_g_diffusers.sprites.pretrained import sprites_controlnet

arguments = parse_arguments(__doc__, sprites="<i> on a mint background", photos="<i>, oil painting")
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
first, second = subjects(arguments)

if arguments.small:  # the edges say where, the image of the prompt which colour and pattern
    other, scale = move(Image.open(IMAGES / "plain_star.png"), -8, 8), 1.0
    controlnet = load_controlnet(sprites_controlnet("canny"))
else:  # any ControlNet that was made for Stable Diffusion 1.5
    other, scale = second, 0.8
    controlnet = load_controlnet("lllyasviel/control_v11p_sd15_canny", arguments.dtype)
pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
pipe.to(arguments.device)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
edges = canny_edges(ImageOps.fit(other, (side, side)), arguments)
image = pipe(
    arguments.prompt,
    images=[first],  # of the prompt
    image=edges,  # of the ControlNet
    controlnet_conditioning_scale=scale,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

captions = ["the control image", arguments.prompt]
save([edges, image], "controlnet.png", arguments, captions, composite=True)
