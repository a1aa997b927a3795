"""Draw a prompt of words alone, as with any Stable Diffusion:

    python examples/text_to_image.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/text_to_image.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(
    __doc__,
    # a striped yellow star is nothing that the small model was ever shown or told
    sprites="a large yellow striped star on a mint background",
    photos="a cat wearing a hat, oil painting",
)
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)

image = pipe(
    arguments.prompt,
    negative_prompt=arguments.negative_prompt,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save([image], "text_to_image.png", arguments, [arguments.prompt])
