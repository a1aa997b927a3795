"""Make a picture a word, and use the word in a pipeline of diffusers that knows nothing of pictures in prompts:

    python examples/image_words.py --tiny

With a converted checkpoint (kosmos-g convert --help) instead of the small random model:

    python examples/image_words.py --model ./kosmos-g
"""

import torch
from common import CAT, COFFEE, parse_arguments, save
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import build_tiny_pipeline

arguments = parse_arguments(__doc__)
if arguments.tiny:
    pipe = build_tiny_pipeline()
else:
    pipe = KosmosGPipeline.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
pipe.to(arguments.device)

pipe.add_image_word("<my-cat>", Image.open(CAT))  # encoded once, here
settings = {"num_inference_steps": arguments.steps, "guidance_scale": 6.0}
generator = torch.Generator("cpu").manual_seed(0)
drawn = pipe("<my-cat> wearing a hat", generator=generator, **settings).images[0]

# torch_dtype: diffusers' own from_pipe would cast what is shared to float32
stock = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=pipe.dtype)
coffee = ImageOps.fit(Image.open(COFFEE), drawn.size)
generator = torch.Generator("cpu").manual_seed(0)
changed = stock("<my-cat> and a cup", image=coffee, strength=0.8, generator=generator, **settings).images[0]

save(make_image_grid([drawn, changed], rows=1, cols=2), "image_words.png", arguments)

# a small file, to share the word like a textual-inversion embedding; load_image_words reads it
pipe.save_image_words(arguments.output / "image_words.safetensors")
