"""Draw in four steps instead of thirty, with LCM-LoRA and its scheduler:

    python examples/few_steps.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/few_steps.py --model ./kosmos-g

Both need peft: pip install peft
"""

import torch
from common import CAT, parse_arguments, random_lora, save
from diffusers import LCMScheduler
from PIL import Image

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)

pipe.load_lora_weights(random_lora(pipe.unet) if arguments.tiny else "latent-consistency/lcm-lora-sdv1-5")
pipe.fuse_lora()
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)

image = pipe(
    "<i> in the snow",
    images=[Image.open(CAT)],
    num_inference_steps=4,
    guidance_scale=1.0,  # 1 to 2: the LoRA has learned guidance; at 1 each step is one pass instead of two
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save(image, "few_steps.png", arguments)
