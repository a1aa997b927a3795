"""Draw under two ControlNets at once:

    python examples/multi_controlnet.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/multi_controlnet.py --model ./kosmos-g

The second needs controlnet_aux: pip install 'kosmos-g-diffusers[control]'
"""

import torch
from common import IMAGES, canny_edges, move, parse_arguments, save, subjects
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGPipeline
from kosmos_g_diffusers.control.controls import load_controlnet
from kosmos_g_diffusers.sprites.pretrained import sprites_controlnet

arguments = parse_arguments(__doc__, sprites="<i> and <i> on a white background", photos="<i>, oil painting")
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
first, second = subjects(arguments)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
if arguments.small:  # the small model has one ControlNet; twice the same, it places a star and a heart
    reference_images, controlnets = [first, second], [load_controlnet(sprites_controlnet("canny"))] * 2
    places = [("plain_star.png", -17, -6), ("plain_heart.png", 17, 6)]
    controls = [canny_edges(move(Image.open(IMAGES / name), *by), arguments) for name, *by in places]
    scales, ends = [0.8, 0.8], [1.0, 1.0]
else:  # edges give the outlines, the image itself, for a while, the colours
    reference_images, repos = (
        [first],
        ["lllyasviel/control_v11p_sd15_canny", "lllyasviel/control_v11f1e_sd15_tile"],
    )
    controlnets = [load_controlnet(repo, arguments.dtype) for repo in repos]
    photo = ImageOps.fit(second, (side, side))
    controls = [canny_edges(photo, arguments), photo]
    scales, ends = [0.8, 0.4], [1.0, 0.5]
pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnets)
pipe.to(arguments.device)

image = pipe(
    arguments.prompt,
    images=reference_images,
    image=controls,  # one for each ControlNet, as are these:
    controlnet_conditioning_scale=scales,
    control_guidance_end=ends,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

captions = ["the first control image", "the second", arguments.prompt]
save([*controls, image], "multi_controlnet.png", arguments, captions, composite=True)
