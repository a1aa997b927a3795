"""Draw what one image shows into a hole of another:

    python examples/inpaint.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/inpaint.py --model ./kosmos-g
"""

import torch
from common import move, parse_arguments, save, subjects
from PIL import Image, ImageDraw, ImageOps

from kosmos_g_diffusers import KosmosGInpaintPipeline, KosmosGPipeline

arguments = parse_arguments(__doc__, sprites="<i> and <i> on a grey background", photos="<i> on a table")
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe = KosmosGInpaintPipeline.from_pipe(pipe)
pipe.to(arguments.device)
first, second = subjects(arguments)

side = pipe.unet.config.sample_size * pipe.vae_scale_factor
if arguments.small:  # the hole is next to the second sprite; of two, the small model wants both in the prompt
    reference_images, before = [second, first], move(second, -18, 0)
    hole = (side // 2, 0, side, side)
else:
    reference_images, before = [first], ImageOps.fit(second, (side, side))
    hole = (side // 4, side // 4, side * 3 // 4, side * 3 // 4)
mask = Image.new("L", before.size)
ImageDraw.Draw(mask).rectangle(hole, fill=255)  # white is drawn
image = pipe(
    arguments.prompt,
    images=reference_images,  # of the prompt
    image=before,  # what is changed
    mask_image=mask,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

captions = ["before", "white is drawn", arguments.prompt]
save([before, mask, image], "inpaint.png", arguments, captions, composite=True)
