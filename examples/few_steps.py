"""Draw in four steps instead of thirty, with LCM-LoRA and its scheduler:

    python examples/few_steps.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/few_steps.py --model ./kosmos-g

The second needs peft: pip install peft
"""

import torch
from common import parse_arguments, save, subjects
from diffusers import LCMScheduler

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(__doc__, sprites="<i> on a mint background", photos="<i> in the snow")
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)
first, _ = subjects(arguments)

if arguments.small:
    guidance_scale = 3.0
    print("The small model has no LCM-LoRA: its images are simple enough for the scheduler alone.")
else:
    pipe.load_lora_weights("latent-consistency/lcm-lora-sdv1-5")
    pipe.fuse_lora()
    # 1 to 2: the LoRA has learned guidance; at 1 each step is one pass instead of two
    guidance_scale = 1.0
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)

image = pipe(
    arguments.prompt,
    images=[first],
    num_inference_steps=4,
    guidance_scale=guidance_scale,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]

save([image], "few_steps.png", arguments, [f"{arguments.prompt}, in 4 steps"])
