"""Draw several prompts at once, each with as many pictures as it likes, two images of each:

    python examples/batch.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/batch.py --model ./kosmos-g
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

images = pipe(
    ["<i> wearing a hat", "<i> in the style of <i>", "a cup on a table"],
    images=[[cat], [cat, coffee], []],
    negative_prompt="blurry",  # one for all, or a list with one for each
    num_images_per_prompt=2,
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(6)],  # one for each image
).images  # both of the first prompt, both of the second, ...

save(make_image_grid(images, rows=3, cols=2), "batch.png", arguments)
