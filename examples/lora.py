"""Draw with a LoRA made for Stable Diffusion 1.5, and without it; needs pip install peft:

python examples/lora.py --tiny
python examples/lora.py --model ./kosmos-g
"""

import torch
from common import CAT, parse_arguments, random_lora, save
from diffusers.utils import make_image_grid
from PIL import Image

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
pipe = build_tiny_pipeline() if arguments.tiny else KosmosGPipeline.from_pretrained(arguments.model)
pipe.to(arguments.device, arguments.dtype)
cat = Image.open(CAT)


def draw():
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe("<i>, pixel art", images=[cat], num_inference_steps=30, generator=generator).images[0]


lora = (
    random_lora(pipe.unet)
    if arguments.tiny
    else "artificialguybr/pixelartredmond-1-5v-pixel-art-loras-for-sd-1-5"
)
# its layers for the U-Net; those for CLIP's text encoder, which is not there, are left out with a warning
pipe.load_lora_weights(lora, adapter_name="pixels")
pipe.set_adapters(["pixels"], [0.9])
with_lora = draw()

pipe.unload_lora_weights()
without = draw()

save(make_image_grid([without, with_lora], rows=1, cols=2), "lora.png", arguments)
