"""Draw a prompt of words alone, as with any Stable Diffusion:

python examples/text_to_image.py --tiny
python examples/text_to_image.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
pipe = build_tiny_pipeline() if arguments.tiny else KosmosGPipeline.from_pretrained(arguments.model)
pipe.to(arguments.device, arguments.dtype)

image = pipe(
    "a cat wearing a hat, oil painting",
    negative_prompt="blurry",
    num_inference_steps=30,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(image, "text_to_image.png", arguments)
