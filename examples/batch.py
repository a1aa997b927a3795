"""Draw several prompts at once, each with any number of reference images; two images are drawn of each:

    python examples/batch.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/batch.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save, subjects

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(
    __doc__,
    sprites=[
        "<i>, pink",
        "<i> and <i> on a white background",
        "a large cyan plain moon on a brown background",
    ],
    photos=["<i> wearing a hat", "<i> in the style of <i>", "a cup on a table"],
)
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)
first, second = subjects(arguments)

images = pipe(
    arguments.prompt,
    images=[[first], [first, second], []],
    negative_prompt=arguments.negative_prompt,  # one for all, or a list with one for each
    num_images_per_prompt=2,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(6)],  # one for each image
).images  # both of the first prompt, both of the second, ...

captions = [prompt for prompt in arguments.prompt for _ in range(2)]
save(images, "batch.png", arguments, captions, rows=3)
