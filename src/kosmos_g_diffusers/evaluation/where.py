"""Where the sprites of the miniature world went: what the sprite bench asks of maps and of regions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sprites.world import draw_scene_at_random, make_rng
from .manifest import Task

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

PLACED = "placed"
SIDE = 0.5  # of a box for one sprite, in sides of the image
HALVES = (((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)), ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)))
FOUND = 0.6  # intersection over union from which on a region counts as found
MAPS_NOTE = (
    "Maps: of the prompts whose sprites are all right. `map IoU` is the intersection over union of a sprite's pixels and the places "
    f"that the maps give to its input image; `map found` the share of sprites with {FOUND} or more (a half: the median is {FOUND}); "
    "`map names` the share of prompts in which the map of the right input image is the largest on every sprite. The control takes "
    "the maps of another prompt."
)
PLACED_NOTE = (
    f"{PLACED}: one input image in a box of {SIDE} of the image's sides, or two in two halves, in any order. `inside` is the share of "
    "sprites whose centre is in the region asked for; the control takes the regions of another prompt."
)


def draw_placed(
    kind: str, number: int, seed: int
) -> tuple[str, str, list["PIL.Image.Image"], dict[str, Any]]:
    """A prompt of the kind PLACED: (prompt, words for all of it, input images, truth with a region for each)."""
    from ..sprites.source import draw_photo

    rng = make_rng("sprite bench", seed, kind, number)
    scene = draw_scene_at_random(rng, 1 + number % 2, held_out=True)
    while [sprite.size for sprite in scene.sprites] == ["large", "large"]:  # no half but a side holds them
        scene = draw_scene_at_random(rng, 2, held_out=True)
    photos = [draw_photo(sprite, rng) for sprite in scene.sprites]
    if len(photos) == 1:
        left, top = (round(rng.uniform(0, 1 - SIDE), 3) for _ in range(2))
        regions = [[left, top, round(left + SIDE, 3), round(top + SIDE, 3)]]
    else:
        regions = [list(half) for half in rng.sample(rng.choice(HALVES), 2)]
    truth = {"background": scene.background, "sprites": [list(sprite.triple) for sprite in scene.sprites]}
    row = f"{PLACED}: {('one', 'two')[len(photos) - 1]}"
    prompt = f"{' and '.join('<i>' for _ in photos)} on a {scene.background} background"
    return prompt, scene.caption, photos, {"row": row, "regions": regions, **truth}


def compare_places(image: "PIL.Image.Image", truth: dict[str, Any]) -> dict[str, float]:
    """Of the sprites of a truth with regions: the share that is inside its own, and that has shape and colour."""
    from ..sprites.reader import find_sprites

    found, wanted = find_sprites(image), [tuple(triple[:2]) for triple in truth["sprites"]]
    own = assign([sprite.triple[:2] for sprite, _ in found], wanted)
    inside, right = [], []
    for place, triple, (x0, y0, x1, y1) in zip(own, wanted, truth["regions"], strict=True):
        right.append(place is not None and found[place][0].triple[:2] == triple)
        if place is None:
            inside.append(False)
            continue
        x, y = _centre(found[place][1])
        inside.append(x0 <= x <= x1 and y0 <= y <= y1)
    return {
        "inside": sum(inside) / len(inside),
        "shape and colour": sum(right) / len(right) if len(found) == len(wanted) else 0.0,
    }


def assign(seen: Sequence[tuple[str, str]], wanted: Sequence[tuple[str, str]]) -> list[int | None]:
    """Which of the (shape, colour) seen is each of those wanted: with the most that is the same, of several the first."""
    free, own = set(range(len(seen))), [None] * len(wanted)
    pairs = [
        (-sum(a == b for a, b in zip(one, other, strict=True)), number, place)
        for number, other in enumerate(wanted)
        for place, one in enumerate(seen)
    ]
    for alike, number, place in sorted(pairs):
        if own[number] is None and place in free and (alike or len(seen) == len(wanted)):
            own[number] = place
            free.discard(place)
    return own


def _centre(cover):
    """(x, y) in shares of the image's sides."""
    total = cover.sum()
    return tuple(
        float(cover.sum(axis) @ (0.5 + _range(cover.shape[1 - axis]))) / total / cover.shape[1 - axis]
        for axis in (0, 1)
    )


def _range(length):
    import numpy as np

    return np.arange(length)


class MapScorer:
    """Scores the maps that a run has kept next to its images, see MAPS_NOTE.

    Args:
        folder: results folder.
    """

    name = "maps"
    identity: dict[str, Any] = {"scorer": "maps"}

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def load(self) -> None:
        """Nothing to load: rules alone."""

    def score(self, tasks: Sequence[Task], images: Sequence["PIL.Image.Image"]) -> list[dict[str, float]]:
        """A dict of scores for each task; {} where its sprites are not all right."""
        from ..sprites.reader import find_sprites
        from .images import read_maps

        results = []
        with_maps = [task for task in tasks if task.pictures]
        for task, image in zip(tasks, images, strict=True):
            others = [one for one in with_maps if len(one.pictures) == len(task.pictures)]
            found, wanted = find_sprites(image), [tuple(triple[:2]) for triple in task.truth["sprites"]]
            seen = [sprite.triple[:2] for sprite, _ in found]
            if not task.pictures or sorted(seen) != sorted(wanted) or len(set(wanted)) < len(wanted):
                results.append({})
                continue
            covers = [found[seen.index(triple)][1] > 0.3 for triple in wanted]
            other = others[(others.index(task) + 1) % len(others)]
            kind, scores = task.truth["kind"], {}
            for prefix, maps in ((kind, task), (f"{kind}.shuffled", other)):
                values = compare_maps(read_maps(self.folder, maps), covers)
                scores |= {f"{prefix}.{name}": value for name, value in values.items()}
            results.append(scores)
        return results


def compare_maps(maps: Any, covers: Sequence["np.ndarray"]) -> dict[str, float]:
    """(sources, h, w) maps whose first sources are the input images, against the bool pixels of the sprite of each."""
    import torch

    from ..maps import regions_of

    size = covers[0].shape
    labels = [""] * (len(covers) + 2)
    regions = regions_of(maps, labels, size).numpy()
    overlaps = [
        (own & cover).sum() / max((own | cover).sum(), 1) for own, cover in zip(regions, covers, strict=True)
    ]
    images = torch.nn.functional.interpolate(maps[None, : len(covers)], size=size, mode="bilinear")[0]
    largest = [int(images[:, torch.from_numpy(cover)].mean(1).argmax()) for cover in covers]
    return {
        "map IoU": float(sum(overlaps) / len(overlaps)),
        "map found": sum(overlap >= FOUND for overlap in overlaps) / len(overlaps),
        "map names": float(largest == list(range(len(covers)))),
    }
