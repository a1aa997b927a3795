"""Change a photo after a prompt that holds another:

    python examples/image_to_image.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/image_to_image.py --model ./kosmos-g
"""

import torch
from common import CAT, COFFEE, parse_arguments, save
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGImg2ImgPipeline, KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe = KosmosGImg2ImgPipeline.from_pipe(pipe)
pipe.to(arguments.device)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
coffee = ImageOps.fit(Image.open(COFFEE), (side, side))
image = pipe(
    "<i>, oil painting",
    images=[Image.open(CAT)],  # of the prompt
    image=coffee,  # what is changed
    strength=0.7,  # how far: 0 leaves the photo, 1 leaves nothing of it
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(make_image_grid([coffee, image], rows=1, cols=2), "image_to_image.png", arguments)
