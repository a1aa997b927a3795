"""Draw a prompt of words and images, written in three ways that mean the same:

    python examples/interleaved_prompt.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/interleaved_prompt.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save, subjects

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(
    __doc__, sprites="<i> and <i> on a white background", photos="<i> in the style of <i>"
)
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)
first, second = subjects(arguments)


def draw(prompt, **images):
    return pipe(
        prompt,
        **images,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]


# a string with a mark for each image
marks = draw(arguments.prompt, images=[first, second])

# words and images in reading order; images may also be paths and URLs
_, between, behind = arguments.prompt.split("<i>")
reading_order = draw([first, between, second, behind])

# chat content, as multimodal language models take it
chat = draw(
    [
        {"type": "image", "image": first},
        {"type": "text", "text": between},
        {"type": "image", "image": second},
        {"type": "text", "text": behind},
    ]
)

captions = ["a string with marks", "words and images in reading order", "chat content"]
save([marks, reading_order, chat], "interleaved_prompt.png", arguments, captions)
