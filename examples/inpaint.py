"""Put what one photo shows into a hole of another:

    python examples/inpaint.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/inpaint.py --model ./kosmos-g
"""

import torch
from common import CAT, COFFEE, parse_arguments, save
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps

from kosmos_g_diffusers import KosmosGInpaintPipeline, KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe = KosmosGInpaintPipeline.from_pipe(pipe)
pipe.to(arguments.device)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
coffee = ImageOps.fit(Image.open(COFFEE), (side, side))
mask = Image.new("L", coffee.size)
ImageDraw.Draw(mask).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=255)  # white is drawn
image = pipe(
    "<i> on a table",
    images=[Image.open(CAT)],  # of the prompt
    image=coffee,  # what is changed
    mask_image=mask,
    num_inference_steps=arguments.steps,
    guidance_scale=6.0,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(make_image_grid([coffee, mask.convert("RGB"), image], rows=1, cols=3), "inpaint.png", arguments)
