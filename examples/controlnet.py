"""Draw a prompt of words and a picture along the edges of another picture:

python examples/controlnet.py --tiny
python examples/controlnet.py --model ./kosmos-g     # needs pip install 'kosmos-g-diffusers[control]'
"""

import torch
from common import CAT, COFFEE, canny_edges, parse_arguments, save
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGControlNetPipeline, KosmosGPipeline
from kosmos_g_diffusers.control import build_random_controlnet, load_controlnet
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
pipe = build_tiny_pipeline() if arguments.tiny else KosmosGPipeline.from_pretrained(arguments.model)
# a name of the table in kosmos_g_diffusers.control, or any ControlNet made for Stable Diffusion 1.5
controlnet = (
    build_random_controlnet(pipe.unet)
    if arguments.tiny
    else load_controlnet("lllyasviel/control_v11p_sd15_canny")
)
pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
pipe.to(arguments.device, arguments.dtype)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
edges = canny_edges(ImageOps.fit(Image.open(COFFEE), (side, side)), arguments)
image = pipe(
    "<i>, oil painting",
    images=[Image.open(CAT)],  # of the prompt
    image=edges,  # of the ControlNet
    controlnet_conditioning_scale=0.8,
    num_inference_steps=30,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(make_image_grid([edges, image], rows=1, cols=2), "controlnet.png", arguments)
