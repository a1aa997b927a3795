"""Change one picture after a prompt that holds another:

    python examples/image_to_image.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/image_to_image.py --model ./kosmos-g
"""

import torch
from common import IMAGES, parse_arguments, save, subjects
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGImg2ImgPipeline, KosmosGPipeline

arguments = parse_arguments(__doc__)
pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe = KosmosGImg2ImgPipeline.from_pipe(pipe)
pipe.to(arguments.device)
first, second = subjects(arguments)

if arguments.tiny:  # the heart of the prompt takes the place of a star
    prompt, subject, before = "<i> on a brown background", second, Image.open(IMAGES / "plain_star.png")
else:
    prompt, subject, before = "<i>, oil painting", first, second
side = pipe.unet.config.sample_size * pipe.vae_scale_factor
before = ImageOps.fit(before, (side, side))
image = pipe(
    prompt,
    images=[subject],  # of the prompt
    image=before,  # what is changed
    strength=0.7,  # how far: 0 leaves the picture, 1 leaves nothing of it
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save([before, image], "image_to_image.png", arguments)
