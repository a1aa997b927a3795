"""Draw with a LoRA made for Stable Diffusion 1.5, and without it:

    python examples/lora.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/lora.py --model ./kosmos-g

Both need peft: pip install peft
"""

import torch
from common import CAT, parse_arguments, random_lora, save
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


def draw():
    return pipe(
        "<i>, pixel art",
        images=[Image.open(CAT)],
        num_inference_steps=arguments.steps,
        guidance_scale=6.0,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]


if arguments.tiny:
    lora = random_lora(pipe.unet)
else:
    lora = "artificialguybr/pixelartredmond-1-5v-pixel-art-loras-for-sd-1-5"
# its layers for the U-Net; those for CLIP's text encoder, which is not there, are left out with a warning
pipe.load_lora_weights(lora, adapter_name="pixels")
pipe.set_adapters(["pixels"], [0.9])
with_lora = draw()

pipe.unload_lora_weights()
without = draw()

save(make_image_grid([without, with_lora], rows=1, cols=2), "lora.png", arguments)
