"""Make a word of an image, and use it in a pipeline of diffusers that knows nothing of images in prompts:

    python examples/image_words.py

With a converted checkpoint (kosmos-g convert --help) instead of the small model of sprites that ships:

    python examples/image_words.py --model ./kosmos-g
"""

import torch
from common import parse_arguments, save, subjects
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import ImageOps

from kosmos_g_diffusers import KosmosGPipeline

arguments = parse_arguments(
    __doc__,
    sprites=["<my-own> on a mint background", "<my-own> on a grey background"],
    photos=["<my-own> wearing a hat", "<my-own> and a cup"],
)
pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
pipe.to(arguments.device)
first, second = subjects(arguments)

pipe.add_image_word("<my-own>", first)  # encoded once, here
settings = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
generator = torch.Generator("cpu").manual_seed(0)
drawn = pipe(arguments.prompt[0], generator=generator, **settings).images[0]

# dtype: diffusers' own from_pipe would cast what is shared to float32
stock = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=pipe.dtype)
before = ImageOps.fit(second, drawn.size)
generator = torch.Generator("cpu").manual_seed(0)
changed = stock(arguments.prompt[1], image=before, strength=0.8, generator=generator, **settings).images[0]

captions = [arguments.prompt[0], "what is changed", arguments.prompt[1]]
save([drawn, before, changed], "image_words.png", arguments, captions, composite=True)

# a small file, to share the word like a textual-inversion embedding; load_image_words reads it
pipe.save_image_words(arguments.output / "image_words.safetensors")
