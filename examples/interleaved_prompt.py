"""Draw a prompt of words and pictures, written in three ways that mean the same:

    python examples/interleaved_prompt.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/interleaved_prompt.py --model ./kosmos-g
"""

import torch
from common import CAT, COFFEE, parse_arguments, save
from diffusers.utils import make_image_grid
from PIL import Image

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)
cat, coffee = Image.open(CAT), Image.open(COFFEE)


def draw(prompt, **pictures):
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(
        prompt, **pictures, num_inference_steps=arguments.steps, guidance_scale=6.0, generator=generator
    ).images[0]


# a string with a mark for each picture; images= also takes paths and URLs
marks = draw("<i> in the style of <i>", images=[cat, coffee])
# words and pictures in reading order
reading_order = draw([cat, "in the style of", coffee])
# chat content, as multimodal language models take it
chat = draw(
    [
        {"type": "image", "image": cat},
        {"type": "text", "text": "in the style of"},
        {"type": "image", "image": coffee},
    ]
)

save(make_image_grid([marks, reading_order, chat], rows=1, cols=3), "interleaved_prompt.png", arguments)
