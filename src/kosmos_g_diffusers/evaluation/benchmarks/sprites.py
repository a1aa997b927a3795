"""The sprite bench: held-out sprites of the miniature world, drawn by a model and read by rules (sprites/reader.py).

Every prompt of KINDS shows or names (shape, colour, pattern) triples that no training data has, in the forms that training
uses. Those of FOREIGN have none of these forms: drawings by another renderer, and words as people type them.
"""

import argparse
import io
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

from ...sprites import drawings, typed_words
from ...sprites.world import (
    BACKGROUNDS,
    IMAGE_SIZE,
    Scene,
    draw_scene_at_random,
    make_rng,
    other_colours,
    recolour,
    render,
)
from ..manifest import OWN_PICTURES, Manifest, Task, derive_seed
from ..where import MAPS_NOTE, PLACED, PLACED_NOTE, MapScorer, compare_places, draw_placed

if TYPE_CHECKING:
    import PIL.Image

TITLE = "held-out sprites, read by rules"
DESCRIPTION = """
For models of the miniature world, such as the small one that ships: 500 prompts of each of six kinds (new background; two, three
and four input images; words alone; another colour), of sprites that no training has seen. Rules read shape, colour and pattern
from the images that the model draws. The control compares these with the input images of other prompts. Needs no data and no
network.

Two more kinds are what users bring and no training had: --kind own-drawings, 60 drawings of the world's shapes by another renderer
(other sizes, places, edges, colours), and --kind typed-words, 200 prompts as people type them.

--maps, --binding and --kind placed measure where the input images go (docs/maps.md).
"""
EXAMPLES = """
  kosmos-g evaluate sprites --output runs/sprites
  kosmos-g evaluate sprites --count 20 --output runs/sprites-quick
  kosmos-g evaluate sprites --kind own-drawings --kind typed-words --output runs/sprites-of-others
  kosmos-g evaluate sprites --kind pair --binding 1 --maps --output runs/bound
  kosmos-g evaluate sprites --kind placed --output runs/placed
  kosmos-g evaluate sprites --model runs/sprites-training/model --output runs/mine
"""
SETTINGS: dict[str, Any] = {
    "steps": 12,
    "guidance": 5.0,
    "scheduler": "dpm",
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
}
BATCH_SIZE = 50
SCORERS = None  # it has one of its own
LAYOUTS: tuple[()] = ()  # its prompts are drawn by the run itself
KINDS = ("background", "pair", "three", "four", "text", "edit")
FIRST_KINDS = ("background", "pair", "text", "edit")  # all there were at first; runs of them keep their name
SEVERAL = {"pair": 2, "three": 3, "four": 4}  # kinds of several input images
COUNT = 500  # prompts of each of them
DRAWINGS, TYPED = "own-drawings", "typed-words"
FOREIGN = {DRAWINGS: 60, TYPED: 200}  # kinds with their numbers of prompts
CONTROL = "shuffled"
NOTE = (
    "Each number is the share of prompts in which the reader sees it. The control compares the same images with the input "
    "images of other prompts: what a model would get that does not look at its own."
)
FOREIGN_NOTES = {
    DRAWINGS: "own-drawings: right is the shape of the drawing and, of the eight colours, the one nearest to its paint. "
    + "; ".join(f"{name}: {text}" for name, text in drawings.KINDS.items())
    + ".",
    TYPED: "typed-words: right is what the prompt names, whatever else there is; `all named` takes size and background too. "
    + "; ".join(f'{name}: "{prompt}"' for name, prompt in typed_words.KINDS.items())
    + ".",
    PLACED: PLACED_NOTE,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, kinds = parser.add_argument, (*KINDS, *FOREIGN, PLACED)
    text = f"{', '.join(kinds)}; repeat it (default: the first {len(KINDS)})"
    add("--kind", action="append", dest="kinds", choices=kinds, metavar="KIND", help=text)
    others = ", ".join(f"of {kind} {count}" for kind, count in FOREIGN.items())
    text = "keep the maps of each image and score them, with the maps of another prompt as control"
    add("--maps", action="store_true", help=text)
    text = "weight that gives each input image a region of its own (default: 0, off)"
    add("--binding", type=float, metavar="WEIGHT", help=text)
    add("--count", type=int, metavar="N", help=f"prompts of each kind (default: {COUNT}, {others})")


def plan(arguments: argparse.Namespace) -> Manifest:
    kinds = tuple(dict.fromkeys(arguments.kinds or _kinds_begun(arguments.output)))
    tasks, images = build_tasks(arguments.count, arguments.seed, kinds)
    counts = ", ".join(f"{kind} {sum(task.truth['kind'] == kind for task in tasks)}" for kind in kinds)
    # the kinds that were always there are named as they always were: their runs are resumed
    options = {"prompts": counts}
    if kinds in (KINDS, FIRST_KINDS):
        options = {"prompts of each kind": COUNT if arguments.count is None else arguments.count}
    scorers, notes = (
        [ReaderScorer()],
        [NOTE, *(note for kind, note in FOREIGN_NOTES.items() if kind in kinds)],
    )
    if arguments.maps:
        options["maps"] = "kept"
        scorers.append(MapScorer(arguments.output))
        notes.append(MAPS_NOTE)
    return Manifest(
        benchmark="sprites",
        options=options,
        tasks=tasks,
        files={f"{OWN_PICTURES}/{path}": content for path, content in images.items()},
        scorers=tuple(scorers),
        notes=tuple(notes),
        keep_maps=arguments.maps,
    )


def _kinds_begun(folder):
    """Kinds of the run in a folder, which is resumed with what it has; KINDS for a new one."""
    try:
        tasks = Manifest.read(folder).tasks
    except (OSError, ValueError):  # of what is wrong with the folder `evaluate` tells
        return KINDS
    kinds = [(task.truth or {}).get("kind") for task in tasks]
    return tuple(dict.fromkeys(kind for kind in kinds if kind in (*KINDS, *FOREIGN, PLACED))) or KINDS


def build_tasks(
    count: int = None, seed: int = 0, kinds: Sequence[str] = KINDS
) -> tuple[tuple[Task, ...], dict[str, bytes]]:
    """Prompts of some kinds, and their input images.

    Args:
        count: prompts of each kind; None takes COUNT, and what FOREIGN says.
        kinds: out of KINDS and FOREIGN.

    Returns:
        (tasks, path of each input image -> its PNG as bytes).

    Raises:
        ValueError: fewer than 2 were asked for.
    """
    if count is not None and count < 2:
        expected = "Expected 2 or more: the control shuffles them."
        raise ValueError(f"{count} prompts of each kind were asked for. {expected}")
    tasks, files = [], {}
    for kind in kinds:
        n_prompts = FOREIGN.get(kind, COUNT) if count is None else count
        # scored, as a control, by the truth of another prompt of the kind
        others = list(range(n_prompts))
        make_rng("sprite bench", seed, kind, CONTROL).shuffle(others)
        other_of = dict(zip(others, [*others[1:], others[0]], strict=True))
        scenes = [DRAW.get(kind, _draw)(kind, number, seed) for number in range(n_prompts)]
        for number, (prompt, text, images, truth) in enumerate(scenes):
            row = truth.pop("row", kind)
            paths = tuple(f"{kind}_{number:04}_{index}.png" for index in range(len(images)))
            files.update({path: _as_png(image) for path, image in zip(paths, images, strict=True)})
            control = _shuffle(kind, truth, scenes[other_of[number]][-1])
            tasks.append(
                Task(
                    id=f"{kind}/{number:04}",
                    unit=f"{kind}/{number:04}",
                    row=row,
                    prompt=prompt,
                    text=text,
                    pictures=paths,
                    references=(),
                    seed=derive_seed(seed, kind, number, prompt),
                    truth={"kind": kind, **truth, CONTROL: control},
                )
            )
    return tuple(tasks), files


def _draw(kind, number, seed):
    """(prompt, words for all of it, input images, truth) of one prompt; truth says what must be seen."""
    from ...sprites.source import draw_photo

    rng = make_rng("sprite bench", seed, kind, number)
    scene = draw_scene_at_random(rng, SEVERAL.get(kind, 1), held_out=True)
    while kind == "edit" and not other_colours(scene.sprites[0]):
        scene = draw_scene_at_random(rng, 1, held_out=True)
    photos = [draw_photo(sprite, rng) for sprite in scene.sprites]
    prompt = f"{' and '.join('<i>' for _ in photos)} on a {scene.background} background"
    if kind == "text":
        prompt, photos = scene.caption, []
    elif kind == "edit":
        edited = Scene((recolour(scene.sprites[0], rng),), scene.background)
        photos, scene = [render(scene, rng)], edited
        prompt = f"<i>, {edited.sprites[0].colour}"
    truth = {"background": scene.background, "sprites": [list(sprite.triple) for sprite in scene.sprites]}
    return prompt, scene.caption, photos, truth


def _draw_foreign(kind, number, seed):
    """As `_draw`, of a drawing by another renderer; its `row` is how it differs from the world's."""
    rng = make_rng("sprite bench", seed, kind, number)
    variant = list(drawings.KINDS)[number % len(drawings.KINDS)]
    drawing, image = drawings.draw_at_random(variant, rng)
    background = rng.choice(list(BACKGROUNDS))
    truth = {"background": background, "sprites": [[drawing.shape, drawing.colour, "plain"]]}
    text = f"a {drawing.colour} {drawing.shape} on a {background} background"
    return f"<i> on a {background} background", text, [image], {"row": f"{kind}: {variant}", **truth}


def _type(kind, number, seed):
    """As `_draw`, of words as people type them; what a prompt does not name is None in its truth."""
    variant = list(typed_words.KINDS)[number % len(typed_words.KINDS)]
    typed = typed_words.type_at_random(variant, make_rng("sprite bench", seed, kind, number))
    truth = {"background": typed.background, "sprites": [list(named) for named in typed.sprites]}
    return typed.prompt, typed.prompt, [], {"row": f"{kind}: {variant}", **truth}


DRAW: dict[str, Callable[..., Any]] = {DRAWINGS: _draw_foreign, TYPED: _type, PLACED: draw_placed}


def _shuffle(kind, truth, other):
    """What would be true if the input images were those of `other` and the words stayed; None if there are none."""
    if kind in ("text", TYPED):
        return None
    if kind == PLACED:
        regions = [other["regions"][index % len(other["regions"])] for index in range(len(truth["regions"]))]
        return {**truth, "regions": regions}
    if kind == "edit":  # the new colour is a word, the background part of the image
        (_, colour, _), (shape, _, pattern) = truth["sprites"][0], other["sprites"][0]
        return {"background": other["background"], "sprites": [[shape, colour, pattern]]}
    return {"background": truth["background"], "sprites": other["sprites"]}


def _as_png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class ReaderScorer:
    """Scores of 0 and 1: what the reader sees, against what the prompt asked for.

    Metrics are `<kind>.<attribute>`, and `<kind>.shuffled.<attribute>` for the control: the same image compared with the
    input images of another prompt of the kind. It shows what a model would get that never looks at them. `images.<n>` is the
    share of prompts with n input images, on a new background, of which shape and colour of all were drawn and nothing else.
    """

    name = "reader"
    identity: dict[str, Any] = {"scorer": "reader"}

    def load(self) -> None:
        """Nothing to load: rules alone."""

    def score(self, tasks: Sequence[Task], images: "Sequence[PIL.Image.Image]") -> list[dict[str, float]]:
        """A dict of scores for each task."""
        from ...sprites.reader import read

        results = []
        for task, image in zip(tasks, images, strict=True):
            scene, kind, truth = read(image), task.truth["kind"], task.truth
            scores = {}
            for prefix, wanted in ((kind, truth), (f"{kind}.{CONTROL}", truth[CONTROL])):
                if kind == PLACED:
                    places = compare_places(image, wanted)
                    scores |= {f"{prefix}.{name}": value for name, value in places.items()}
                    continue
                if wanted is None:
                    continue
                seen = compare_with_truth(kind, scene, wanted)
                scores |= {f"{prefix}.{name}": float(value) for name, value in seen.items()}
                if kind in ("background", *SEVERAL):  # a line each number of input images
                    prefix = prefix.replace(kind, "images")
                    scores[f"{prefix}.{len(task.pictures)}"] = float(_are_all_there(scene, wanted))
            results.append(scores)
        return results


def compare_with_truth(kind: str, scene: Scene, truth: dict[str, Any]) -> dict[str, bool]:
    """What of a truth a read `Scene` fulfils: attribute -> bool.

    One sprite must be there where one was asked for, else none of its attributes counts. Of several, each subject counts if some
    sprite has its shape and colour; both (all) count if as many sprites are there, one for each, in any order. Of typed words,
    what was not named is right.
    """
    if kind == TYPED:
        return _compare_named(scene, truth)
    wanted = [tuple(triple) for triple in truth["sprites"]]
    background = scene.background == truth["background"]
    if kind == "pair":
        seen = [sprite.triple[:2] for sprite in scene.sprites]
        first, second = (triple[:2] for triple in wanted)
        return {
            "first": first in seen,
            "second": second in seen,
            "both": seen in ([first, second], [second, first]),
            "both in order": seen == [first, second],
            "background": background,
        }
    if kind in SEVERAL:
        seen = [sprite.triple[:2] for sprite in scene.sprites]
        names = ("first", "second", "third", "fourth")
        found = {name: tuple(triple[:2]) in seen for name, triple in zip(names, wanted, strict=False)}
        return {**found, "all": _are_all_there(scene, truth), "background": background}
    seen = scene.sprites[0].triple if len(scene.sprites) == 1 else (None, None, None)
    shape, colour, pattern = (found == asked for found, asked in zip(seen, wanted[0], strict=True))
    if kind == "edit":
        found = {"new colour": colour, "old shape": shape, "old pattern": pattern, "background": background}
        return {**found, "new colour and old shape": colour and shape}
    if kind == DRAWINGS:
        return {
            "shape": shape,
            "colour": colour,
            "shape and colour": shape and colour,
            "background": background,
        }
    found = {"shape": shape, "colour": colour, "pattern": pattern, "background": background}
    return {**found, "all": all(found.values())}


def _are_all_there(scene, truth):
    """Whether the sprites of a scene have the shapes and colours of a truth, in any order."""
    return sorted(sprite.triple[:2] for sprite in scene.sprites) == sorted(
        tuple(triple[:2]) for triple in truth["sprites"]
    )


def _compare_named(scene, truth):
    """As `compare_with_truth`: each of the shapes, colours, ... that were named, by the order of the sprites that suits best."""
    wanted, names = truth["sprites"], ("shape", "colour", "pattern", "size")
    seen = [[getattr(sprite, name) for name in names] for sprite in scene.sprites]
    best = dict.fromkeys(names, False)
    for order in permutations(seen) if len(seen) == len(wanted) else ():
        pairs = [zip(found, named, strict=True) for found, named in zip(order, wanted, strict=True)]
        rights = zip(*([asked in (None, found) for found, asked in pair] for pair in pairs), strict=True)
        best = max(
            best, dict(zip(names, map(all, rights), strict=True)), key=lambda right: sum(right.values())
        )
    background = truth["background"] in (None, scene.background)
    scores = {name: best[name] for index, name in enumerate(names) if wanted[0][index] is not None}
    scores |= {} if truth["background"] is None else {"background": background}
    return {**scores, "all named": all(scores.values())}
