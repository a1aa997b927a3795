"""Draw a prompt of words and pictures, written in three ways that mean the same:

    python examples/interleaved_prompt.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/interleaved_prompt.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save, subjects

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(__doc__)
pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)
first, second = subjects(arguments)


def draw(prompt, **pictures):
    return pipe(
        prompt,
        **pictures,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]


# words and pictures in reading order; pictures may also be paths and URLs
if arguments.tiny:
    parts = [first, "and", second, "on a white background"]
else:
    parts = [first, "in the style of", second]
reading_order = draw(parts)

# a string with a mark for each picture: "<i> in the style of <i>"
text = " ".join(part if isinstance(part, str) else "<i>" for part in parts)
marks = draw(text, images=[first, second])

# chat content, as multimodal language models take it: [{"type": "image", "image": first}, {"type": "text", ...
chat = draw(
    [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
)

save([reading_order, marks, chat], "interleaved_prompt.png", arguments)
