"""Draw with two LoRAs made for Stable Diffusion 1.5, with each, with both, and without:

    python examples/lora.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/lora.py --model ./kosmos-g

Both need peft: pip install peft
"""

import torch
from common import parse_arguments, random_lora, save, subjects

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(
    __doc__,
    sprites=["<i> on a mint background"] * 2,
    photos=["<i>, pixel art", "<i>, clay animation"],  # each with the words that its LoRA was trained on
)
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)
first, _ = subjects(arguments)


def draw(prompt):
    return pipe(
        prompt,
        images=[first],
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]


if arguments.small:
    loras = [random_lora(pipe.unet, 1), random_lora(pipe.unet, 0, ["proj_out"])]
    names, scale = ("colour", "shape"), 3.0
    print(
        "The LoRAs have random weights: one disturbs the colour, the other the shape, which shows that they act."
    )
else:
    loras = [
        "artificialguybr/pixelartredmond-1-5v-pixel-art-loras-for-sd-1-5",
        "artificialguybr/clayanimationredmond-1-5-version-clay-animation-lora-for-sd-1-5",
    ]
    names, scale = ("pixels", "clay"), 0.9
images, captions = [draw(arguments.prompt[0])], ["without a LoRA"]
for name, lora in zip(names, loras, strict=True):
    # its layers for the U-Net; those for CLIP's text encoder, which is not there, are left out with a warning
    pipe.load_lora_weights(lora, adapter_name=name)
for name, prompt in zip(names, arguments.prompt, strict=True):
    pipe.set_adapters([name], [scale])
    images.append(draw(prompt))
    captions.append(f"the LoRA {name}")
pipe.set_adapters(list(names), [scale] * 2)
images.append(draw(arguments.prompt[0]))
captions.append("both")

save(images, "lora.png", arguments, captions)
