"""Draw prompts of words and images, on any machine, in a minute:

    python examples/demo.py

With a converted checkpoint (kosmos-g convert --help) the same code draws from photos:

    python examples/demo.py --model ./kosmos-g
"""

import textwrap

import torch
from common import IMAGES, parse_arguments
from PIL import Image, ImageDraw, ImageOps

from kosmos_g_diffusers import KosmosGPipeline
from kosmos_g_diffusers.provenance import save_image
from kosmos_g_diffusers.sprites.pretrained import SPRITES_NOTE, SPRITES_ONLY

PHOTO_PROMPTS = [("<i> in the style of <i>", ["cat.jpg", "coffee.jpg"])]
SPRITE_PROMPTS = [  # none of these sprites was shown or named to the small model while it learned
    ("<i> on a mint background", ["star.png"]),
    ("<i> and <i> on a white background", ["star.png", "heart.png"]),
    ("<i> and a small cyan plain moon on a grey background", ["heart.png"]),
    ("<i>, pink", ["star.png"]),
    ("<i>, blue", ["heart.png"]),
    ("a large orange striped ring on a lavender background", []),
]
IMAGES_PER_PROMPT = 4
TEXT_WIDTH, GAP, CAPTION = 210, 8, 18  # pixels of the sheet


def main():
    arguments = parse_arguments(__doc__, SPRITE_PROMPTS, PHOTO_PROMPTS)
    pipe = KosmosGPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
    pipe.to(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (prompt, names) in enumerate(arguments.prompt):
        print(f'"{prompt}"', *names)
        reference_images = [Image.open(IMAGES / name) for name in names]
        drawn = pipe(
            prompt,
            images=reference_images,
            num_images_per_prompt=IMAGES_PER_PROMPT,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(IMAGES_PER_PROMPT)],
        ).images
        for seed, image in enumerate(drawn):
            save_image(image, arguments.output / f"demo_{number}_{seed}.png")
        rows.append((dict(zip(names, reference_images, strict=True)), prompt, drawn))
    sheet = draw_sheet(rows, 128 if arguments.small else 256)
    save_image(sheet, arguments.output / "demo.png", composite=True)  # it shows the reference images as well
    print(f"{arguments.output / 'demo.png'}, and each image next to it")
    if arguments.small:
        print(SPRITES_ONLY if arguments.tiny else SPRITES_NOTE)


def draw_sheet(rows, side):
    """A row for each (reference images by name, prompt, images drawn): tiles of `side` pixels, the prompt between them."""
    left = max(len(reference_images) for reference_images, _, _ in rows) * (side + GAP) + GAP
    width = left + TEXT_WIDTH + IMAGES_PER_PROMPT * (side + GAP)
    sheet = Image.new("RGB", (width, len(rows) * (side + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (reference_images, prompt, drawn) in enumerate(rows):
        top = GAP + number * (side + CAPTION + GAP)
        draw.text((left, top + side // 2), textwrap.fill(prompt, 24), "black", anchor="lm", font_size=15)
        places = [left - (side + GAP) * behind for behind in range(len(reference_images), 0, -1)]
        places += [left + TEXT_WIDTH + index * (side + GAP) for index in range(len(drawn))]
        images = [*reference_images.items(), *((f"seed {seed}", image) for seed, image in enumerate(drawn))]
        for place, (caption, image) in zip(places, images, strict=True):
            # sprites have 64 pixels: enlarged, not blurred
            resampling = Image.Resampling.NEAREST if image.width < side else Image.Resampling.BICUBIC
            tile = ImageOps.fit(image.convert("RGB"), (side, side), resampling)
            sheet.paste(tile, (place, top))
            below = (place + side // 2, top + side + CAPTION // 2)
            draw.text(below, caption, "black", anchor="mm", font_size=12)
            draw.rectangle((place - 1, top - 1, place + side, top + side), outline="silver")
    return sheet


if __name__ == "__main__":
    main()
