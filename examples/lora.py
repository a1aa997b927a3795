"""Draw with a LoRA made for Stable Diffusion 1.5, and without it:

    python examples/lora.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/lora.py --model ./kosmos-g

Both need peft: pip install peft
"""

import torch
from common import parse_arguments, random_lora, save, subjects

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(__doc__, sprites="<i> on a mint background", photos="<i>, pixel art")
pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)
first, _ = subjects(arguments)


def draw():
    return pipe(
        arguments.prompt,
        images=[first],
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]


if arguments.small:
    lora, scale = random_lora(pipe.unet), 3.0
    print("The LoRA has random weights: it disturbs the drawing, which shows that it acts.")
else:
    lora, scale = "artificialguybr/pixelartredmond-1-5v-pixel-art-loras-for-sd-1-5", 0.9
# its layers for the U-Net; those for CLIP's text encoder, which is not there, are left out with a warning
pipe.load_lora_weights(lora, adapter_name="pixels")
pipe.set_adapters(["pixels"], [scale])
with_lora = draw()

pipe.unload_lora_weights()
without = draw()

save([without, with_lora], "lora.png", arguments)
