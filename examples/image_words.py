"""Make a picture a word, and use the word in a pipeline of diffusers that knows nothing of pictures in prompts:

python examples/image_words.py --tiny
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
pipe = build_tiny_pipeline() if arguments.tiny else KosmosGPipeline.from_pretrained(arguments.model)
pipe.to(arguments.device, arguments.dtype)

pipe.add_image_word("<my-cat>", Image.open(CAT))  # encoded once, here
drawn = pipe("<my-cat> wearing a hat", generator=torch.Generator("cpu").manual_seed(0)).images[0]

# torch_dtype: diffusers' own from_pipe would cast what is shared to float32
stock = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=pipe.dtype)
coffee = ImageOps.fit(Image.open(COFFEE), drawn.size)
generator = torch.Generator("cpu").manual_seed(0)
changed = stock("<my-cat> and a cup", image=coffee, strength=0.8, generator=generator).images[0]

# a small file, to share the word like a textual-inversion embedding; load_image_words reads it
arguments.output.mkdir(parents=True, exist_ok=True)
pipe.save_image_words(arguments.output / "image_words.safetensors")
save(make_image_grid([drawn, changed], rows=1, cols=2), "image_words.png", arguments)
