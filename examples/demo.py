"""Draw a prompt of two photos and words, on any machine, in seconds:

    python examples/demo.py

With a converted checkpoint (kosmos-g convert --help) the same code draws pictures:

    python examples/demo.py --model ./kosmos-g
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.tiny import RANDOM_MODEL_NOTE, build_tiny_pipeline

PROMPT = "<i> in the style of <i>"
PHOTOS = Path(__file__).parent / "images"


def main():
    parser = argparse.ArgumentParser(description="Write a few images of one prompt of pictures and words.")
    parser.add_argument(
        "--model", help="folder or Hub id of a Kosmos-G model (default: a small random model)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder to write into (default: out)"
    )
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: 30)")
    arguments = parser.parse_args()

    pipe = (
        build_tiny_pipeline() if arguments.model is None else KosmosGPipeline.from_pretrained(arguments.model)
    )
    pipe.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")

    cat, coffee = Image.open(PHOTOS / "cat.jpg"), Image.open(PHOTOS / "coffee.jpg")
    images = pipe(
        PROMPT,
        images=[cat, coffee],
        num_images_per_prompt=4,
        num_inference_steps=arguments.steps,
        guidance_scale=6.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(4)],
    ).images

    arguments.output.mkdir(parents=True, exist_ok=True)
    files = {f"demo_{seed}.png": image for seed, image in enumerate(images)}
    tiles = [ImageOps.fit(tile, (256, 256), Image.Resampling.BICUBIC) for tile in (cat, coffee, *images)]
    files["demo.png"] = make_image_grid(tiles, rows=2, cols=3)  # the two photos, then what was drawn
    print(f'Prompt: "{PROMPT}" with cat.jpg and coffee.jpg of {PHOTOS}')
    for name, image in files.items():
        image.save(arguments.output / name)
        print(arguments.output / name)
    if arguments.model is None:
        print(RANDOM_MODEL_NOTE)


if __name__ == "__main__":
    main()
