"""What the small model says of images: captions of held-out sprites, compared with what the images show.

    python examples/sprites/read_captions.py --output out/sprites-captions

Each image shows one held-out sprite, or two, and the model continues "An image of", as `kosmos-g caption` asks. The
control compares each caption with the image before. Writes report.md.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from kosmos_g_diffusers import SPRITES
from kosmos_g_diffusers.captioning import load_answerer
from kosmos_g_diffusers.processing_kosmos_g import CAPTION_PROMPT
from kosmos_g_diffusers.sprites.world import (
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    draw_scene_at_random,
    make_rng,
    render,
)

ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}


def tell(answer, n_sprites, count, seed):
    """(scenes, captions) of held-out sprites."""
    scenes, captions = [], []
    for number in tqdm(range(count), desc=f"captions of {n_sprites}"):
        rng = make_rng("read captions", seed, n_sprites, number)
        scene = draw_scene_at_random(rng, n_sprites, held_out=True)
        scenes.append(scene)
        captions.append(answer(f"<i> {CAPTION_PROMPT}", [render(scene, rng)]))
    return scenes, captions


def parse(caption):
    """Attribute -> what a caption says of it, in its order; `background` is the word after "on a"."""
    sprites, _, background = caption.partition(" on a ")
    words = sprites.split()
    said = {name: [word for word in words if word in known] for name, known in ATTRIBUTES.items()}
    return {**said, "background": background.split()[:1]}


def score(scenes, captions):
    """Shares of the captions that say each thing right, of all sprites and of no others, and all of it word by word."""
    rights = []
    for scene, caption in zip(scenes, captions, strict=True):
        said = parse(caption)
        right = {
            name: said[name] == [getattr(sprite, name) for sprite in scene.sprites] for name in ATTRIBUTES
        }
        right["background"] = said["background"] == [scene.background]
        rights.append({**right, "the whole caption": caption == scene.caption})
    return {name: sum(right[name] for right in rights) / len(rights) for name in rights[0]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SPRITES, help="folder (default: the small model that ships)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500, help="images of each kind (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    answer = load_answerer(arguments.model, torch.float32, "cpu")
    scores = {}
    for n_sprites, head in ((1, "one sprite"), (2, "two sprites")):
        scenes, captions = tell(answer, n_sprites, arguments.count, arguments.seed)
        scores[head] = score(scenes, captions)
        scores[f"{head}, image before"] = score(scenes[-1:] + scenes[:-1], captions)

    lines = [f"| said right | {' | '.join(scores)} |", "|---" * (1 + len(scores)) + "|"]
    for name in scores["one sprite"]:
        lines.append(f"| {name} | {' | '.join(f'{shares[name]:.3f}' for shares in scores.values())} |")
    report = "\n".join(lines) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "report.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
