"""What the small model cannot read: three images, other sizes than 64, other languages, shapes it was never shown.

    python examples/sprites/read_limits.py --output out/sprites-limits

Prompts are of held-out sprites, in the forms of training but for the one thing that is tried. Writes report.md.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from kosmos_g_diffusers import SPRITES, KosmosGPipeline
from kosmos_g_diffusers.generation.schedulers import make_scheduler
from kosmos_g_diffusers.sprites.reader import read
from kosmos_g_diffusers.sprites.source import draw_photo
from kosmos_g_diffusers.sprites.world import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    draw_scene_at_random,
    draw_sprite_at_random,
    make_rng,
)

SIZES = (32, 48, 96, 128)  # pixels
LANGUAGES = {  # the names of SHAPES and COLOURS, and the prompt
    "German": (
        "Kreis Quadrat Dreieck Stern Herz Ring Kreuz Mond",
        "rot orange gelb grün türkis blau lila rosa",
        "{shape}, {colour}",
    ),
    "French": (
        "cercle carré triangle étoile coeur anneau croix lune",
        "rouge orange jaune vert turquoise bleu violet rose",
        "{shape} {colour}",
    ),
}
OTHER_SHAPES = ("hexagon", "pentagon", "arrow", "diamond", "oval", "spiral", "tree", "house", "dog", "cloud")
BATCH = 25


def words(rng):
    """(prompt, images, (shape, colour) of what is to be seen): a caption as in training."""
    scene = draw_scene_at_random(rng, 1, held_out=True)
    return scene.caption, [], [scene.sprites[0].triple[:2]]


def three_images(rng):
    sprites = []
    while len(sprites) < 3:
        sprite = draw_sprite_at_random(rng, held_out=True)
        if sprite.triple[:2] not in [other.triple[:2] for other in sprites]:
            sprites.append(sprite)
    images = [draw_photo(sprite, rng) for sprite in sprites]
    return "<i> and <i> and <i> on a mint background", images, [sprite.triple[:2] for sprite in sprites]


def translated(language):
    def prompt(rng):
        sprite = draw_sprite_at_random(rng, held_out=True)
        shapes, colours, form = LANGUAGES[language]
        shape = shapes.split()[SHAPES.index(sprite.shape)]
        colour = colours.split()[list(COLOURS).index(sprite.colour)]
        return form.format(shape=shape, colour=colour), [], [sprite.triple[:2]]

    return prompt


def other_shape(rng):
    colour, background = draw_sprite_at_random(rng).colour, draw_scene_at_random(rng).background
    return (
        f"a large {colour} plain {rng.choice(OTHER_SHAPES)} on a {background} background",
        [],
        [(None, colour)],
    )


def score(image, wanted):
    """Whether the reader sees what is wanted and nothing else: (number, shapes, colours, shapes with their colours)."""
    seen = [
        sprite.triple[:2]
        for sprite in read(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)).sprites
    ]
    number = len(seen) == len(wanted)
    shapes, colours = (
        number and sorted(s[i] or "" for s in seen) == sorted(w[i] or "" for w in wanted) for i in (0, 1)
    )
    return number, shapes, colours, sorted(seen) == sorted(wanted, key=str)


def measure(pipe, make, side, count, seed):
    """Shares of `count` prompts of a kind, see `score`."""
    rights = []
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        prompts, images, wanted = zip(
            *(make(make_rng("limits", seed, number)) for number in numbers), strict=True
        )
        drawn = pipe(
            list(prompts),
            images=list(images),
            height=side,
            width=side,
            num_inference_steps=12,
            guidance_scale=5.0,
            generator=[torch.Generator("cpu").manual_seed(number) for number in numbers],
        ).images
        rights += map(score, drawn, wanted)
    return [sum(right) / len(rights) for right in zip(*rights, strict=True)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SPRITES, help="folder (default: the small model that ships)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50, help="prompts of each kind (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = KosmosGPipeline.from_pretrained(arguments.model)
    pipe.scheduler = make_scheduler("dpm", pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.warns_outside_world = False  # it is what is tried
    kinds = {"as in training": (words, IMAGE_SIZE), "three images": (three_images, IMAGE_SIZE)}
    kinds |= {f"{side} x {side} pixels": (words, side) for side in SIZES}
    kinds |= {name: (translated(name), IMAGE_SIZE) for name in LANGUAGES}
    kinds["shapes it was never shown"] = (other_shape, IMAGE_SIZE)
    lines = [
        "| tried | as many as asked for | their shapes | their colours | both |",
        "|---|---|---|---|---|",
    ]
    for name, (make, side) in tqdm(kinds.items(), desc="kinds"):
        shares = measure(pipe, make, side, arguments.count, arguments.seed)
        if make is other_shape:
            shares[1] = shares[3] = None
        cells = ("" if share is None else f"{share:.2f}" for share in shares)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    report = "\n".join(lines) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "report.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
