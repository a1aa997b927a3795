"""Draw a prompt of words alone, as with any Stable Diffusion:

    python examples/text_to_image.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/text_to_image.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(__doc__)
pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)

if arguments.tiny:  # a striped yellow star is nothing that the small model was ever shown or told
    prompt, negative_prompt = "a large yellow striped star on a mint background", None
else:
    prompt, negative_prompt = "a cat wearing a hat, oil painting", "blurry"
image = pipe(
    prompt,
    negative_prompt=negative_prompt,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save([image], "text_to_image.png", arguments)
