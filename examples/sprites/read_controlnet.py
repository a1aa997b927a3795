"""What edges decide, and what the image of the prompt: held-out sprites drawn along edges, read by rules.

    python examples/sprites/read_controlnet.py --output out/sprites-controlnet

Each prompt shows a held-out sprite, `<i> on a mint background`. The edges are those of a plain sprite of the same shape and
size in another colour, off the middle: they know a place and an outline, but neither colour nor pattern. Writes report.md
and sheet.png: of each row the image of the prompt, the edges, the image, and the image of the same seed without edges.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from tqdm.auto import tqdm

from kosmos_g_diffusers import SPRITES, KosmosGControlNetPipeline, KosmosGPipeline
from kosmos_g_diffusers.control.controls import control_image, load_annotator
from kosmos_g_diffusers.generation.schedulers import make_scheduler
from kosmos_g_diffusers.provenance import save_image
from kosmos_g_diffusers.sprites.reader import CONTRAST, read
from kosmos_g_diffusers.sprites.source import draw_photo
from kosmos_g_diffusers.sprites.world import (
    COLOURS,
    IMAGE_SIZE,
    Scene,
    draw_scene_at_random,
    make_rng,
    render,
)

BATCH_SIZE = 25
NEAR = 3.0  # pixels that a sprite's centre may be off the place of the edges
SETTINGS = {"num_inference_steps": 12, "guidance_scale": 5.0}  # of the sprite bench
SHEET_ROWS = 8


def draw_tasks(count, seed):
    """Dicts of `scene` (what should be seen), `photo` for the prompt, `edges`, and `place` (x, y) of the edges in pixels."""
    annotator, tasks = load_annotator("canny"), []
    for number in range(count):
        rng = make_rng("read controlnet", seed, number)
        scene = draw_scene_at_random(rng, 1, held_out=True)
        (sprite,) = scene.sprites
        colour = rng.choice([name for name in COLOURS if name != sprite.colour])
        outline = render(Scene((replace(sprite, colour=colour, pattern="plain"),), "white"), rng)
        tasks.append(
            {
                "scene": scene,
                "photo": draw_photo(sprite, rng),
                "edges": control_image("canny", outline, annotator=annotator),
                "place": find_place(outline),
            }
        )
    return tasks


def find_place(image):
    """(x, y) centre of mass, in pixels, of what differs from the border's median colour; None if nothing does."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    rows, columns = np.nonzero(np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > CONTRAST)
    return (columns.mean(), rows.mean()) if len(rows) else None


def draw(pipe, tasks, scale, seed):
    """An image for each task, along its edges by so much."""
    images = []
    for start in tqdm(range(0, len(tasks), BATCH_SIZE), desc=f"edges x {scale:g}"):
        batch = tasks[start : start + BATCH_SIZE]
        generators = [
            torch.Generator().manual_seed(10_000 * seed + start + index) for index in range(len(batch))
        ]
        images += pipe(
            [f"<i> on a {task['scene'].background} background" for task in batch],
            images=[[task["photo"]] for task in batch],
            image=[task["edges"] for task in batch],
            controlnet_conditioning_scale=scale,
            generator=generators,
            **SETTINGS,
        ).images
    return images


def score(tasks, images):
    """Shares of the images with each thing right; `place of others` is scored by the edges of the task before."""
    rights = []
    for index, (task, image) in enumerate(zip(tasks, images, strict=True)):
        scene, place = read(image), find_place(image)
        (wanted,) = task["scene"].sprites
        seen = scene.sprites[0] if len(scene.sprites) == 1 else None
        other = tasks[index - 1]["place"]
        rights.append(
            {
                "place": place is not None and math.dist(place, task["place"]) <= NEAR,
                "place of others": place is not None and math.dist(place, other) <= NEAR,
                "colour": seen is not None and seen.colour == wanted.colour,
                "pattern": seen is not None and seen.pattern == wanted.pattern,
                "shape": seen is not None and seen.shape == wanted.shape,
                "background": scene.background == task["scene"].background,
            }
        )
    return {name: sum(right[name] for right in rights) / len(rights) for name in rights[0]}


def write_sheet(tasks, drawn, path):
    """The first tasks: image, edges, and an image of each column of `drawn`; each four times as large."""
    side = 4 * IMAGE_SIZE
    sheet = Image.new("RGB", ((2 + len(drawn)) * side, SHEET_ROWS * side), "white")
    for row, task in enumerate(tasks[:SHEET_ROWS]):
        for column, image in enumerate([task["photo"], task["edges"], *(images[row] for images in drawn)]):
            large = image.convert("RGB").resize((side - 8, side - 8), Image.Resampling.NEAREST)
            sheet.paste(large, (column * side + 4, row * side + 4))
    save_image(sheet, path, composite=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SPRITES, help="folder with a controlnet/ (default: the small one)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="prompts (default: 200)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5, 0.0], help="of the edges")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = KosmosGPipeline.from_pretrained(arguments.model)
    pipe.scheduler = make_scheduler("dpm", pipe.scheduler.config)
    controlnet = ControlNetModel.from_pretrained(arguments.model, subfolder="controlnet").float()
    pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    tasks = draw_tasks(arguments.count, arguments.seed)
    drawn = [draw(pipe, tasks, scale, arguments.seed) for scale in arguments.scales]
    scores = [score(tasks, images) for images in drawn]

    arguments.output.mkdir(parents=True, exist_ok=True)
    write_sheet(tasks, drawn, arguments.output / "sheet.png")
    heads = ["seen", *(f"edges x {scale:g}" for scale in arguments.scales)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in scores[0]:
        lines.append(f"| {name} | {' | '.join(f'{shares[name]:.3f}' for shares in scores)} |")
    report = "\n".join(lines) + "\n"
    (arguments.output / "report.md").write_text(report, encoding="utf-8")
    print(report + f"\n{arguments.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
