"""Draw overview.png, the image at the top of README.md: prompts of words and images, and what the small model makes of them.

python docs/overview.py
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from kosmos_g_diffusers import SPRITES, KosmosGPipeline
from kosmos_g_diffusers.provenance import save_image
from kosmos_g_diffusers.sprites import HEART, STAR

# prompts in reading order, as the pipelines take them; none of these sprites was shown to the model while it learned
PROMPTS = (
    [Image.open(STAR), "and", Image.open(HEART), "on a white background"],
    [Image.open(STAR), ", pink"],
    ["a large orange striped ring on a lavender background"],
)
IMAGES_PER_PROMPT = 3
SMALL, LARGE, GAP, FONT_SIZE = 64, 128, 12, 19  # pixels
PROMPT_WIDTH = 540


def main():
    pipe = KosmosGPipeline.from_pretrained(SPRITES)
    pipe.set_progress_bar_config(disable=True)
    width = PROMPT_WIDTH + IMAGES_PER_PROMPT * (LARGE + GAP)
    sheet = Image.new("RGB", (width, len(PROMPTS) * (LARGE + GAP) + GAP), "white")
    for number, prompt in enumerate(PROMPTS):
        generators = [torch.Generator().manual_seed(seed) for seed in range(IMAGES_PER_PROMPT)]
        drawn = pipe(
            prompt,
            num_images_per_prompt=IMAGES_PER_PROMPT,
            num_inference_steps=20,
            guidance_scale=5.0,
            generator=generators,
        ).images
        top = GAP + number * (LARGE + GAP)
        write_prompt(sheet, prompt, top + LARGE // 2)
        for place, image in enumerate(drawn):
            left = PROMPT_WIDTH + place * (LARGE + GAP)
            paste(sheet, image, LARGE, (left, top))
    save_image(sheet, Path(__file__).with_suffix(".png"), composite=True, optimize=True)


def write_prompt(sheet, prompt, middle):
    """The words and images of a prompt one after the other, and an arrow behind them."""
    draw, left = ImageDraw.Draw(sheet), GAP
    for part in prompt:
        if isinstance(part, str):
            text = part if part.startswith(",") or left == GAP else " " + part
            draw.text((left, middle), text, "black", anchor="lm", font_size=FONT_SIZE)
            left += int(draw.textlength(text + " ", font_size=FONT_SIZE))
        else:
            paste(sheet, part, SMALL, (left, middle - SMALL // 2))
            left += SMALL + 2
    tip = PROMPT_WIDTH - GAP
    draw.line((tip - 26, middle, tip - 2, middle), "black", 2)
    draw.polygon([(tip, middle), (tip - 9, middle - 5), (tip - 9, middle + 5)], "black")


def paste(sheet, image, side, place):
    """Enlarged, not blurred: sprites have 64 pixels."""
    sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), place)
    left, top = place
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + side, top + side), outline="silver")


if __name__ == "__main__":
    main()
