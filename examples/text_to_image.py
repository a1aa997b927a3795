"""Draw a prompt of words alone, as with any Stable Diffusion:

    python examples/text_to_image.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/text_to_image.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)

image = pipe(
    "a cat wearing a hat, oil painting",
    negative_prompt="blurry",
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(image, "text_to_image.png", arguments)
