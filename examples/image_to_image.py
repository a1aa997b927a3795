"""Change an image as a prompt says that holds another image:

    python examples/image_to_image.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/image_to_image.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save, subjects
from PIL import ImageOps

from kosmos_g_diffusers import KosmosGImg2ImgPipeline, KosmosGPipeline

arguments = parse_arguments(__doc__, sprites="<i> on a brown background", photos="<i>, oil painting")
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe = KosmosGImg2ImgPipeline.from_pipe(pipe)
pipe.to(arguments.device)
first, second = subjects(arguments)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
before = ImageOps.fit(second, (side, side))
image = pipe(
    arguments.prompt,
    images=[first],  # of the prompt
    image=before,  # what is changed
    strength=0.7,  # how far: 0 leaves the image, 1 leaves nothing of it
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save([before, image], "image_to_image.png", arguments, ["before", arguments.prompt], composite=True)
