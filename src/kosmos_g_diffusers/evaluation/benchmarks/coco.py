"""FID-30k: images for captions of MS-COCO val2014 against its photographs, as the Kosmos-G paper (sec. 4.3) measures it.

As in microsoft/unilm, kosmos-g/sample_kosmosg_coco.py, captions are drawn with Python's `random` (seed 0 draws the same
ones) and all photographs of the annotations are the real ones. The official script reduces and crops photographs, and images
when it reads them again, but not when it has just made them.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...captioning import as_text
from ...files import hash_file
from ..generated import Layout, take_generated
from ..manifest import Manifest, Task, derive_seed

TITLE = "FID-30k on MS-COCO"
DESCRIPTION = """
Images for captions of MS-COCO val2014, with the settings of the paper, and their distance to its photographs (FID, lower is
better). --seed draws the captions, which are saved. With a smaller --count than 30,000 the FID is larger, and compares with no
published one.
"""
EXAMPLES = """
  kosmos-g evaluate coco --annotations captions_val2014.json --images val2014 --model ./kosmos-g --output runs/coco
  kosmos-g evaluate coco --annotations captions_val2014.json --images val2014 --model ./kosmos-g --output runs/coco-offline \\
      --inception pt_inception-2015-12-05-6726825d.pth
"""
SETTINGS: dict[str, Any] = {"steps": 250, "guidance": 3.0, "scheduler": "ddim"}
BATCH_SIZE = 8
SCORERS: tuple[str, ...] = ()
COUNT = 30_000
PUBLISHED: dict[str, dict[str, float]] = {"Kosmos-G paper": {"fid": 10.99}}
FEW = 20  # names that an error spells out


def _read_number(folder, stem):
    name = stem.rpartition("/")[2]
    if name.isdecimal():
        yield str(int(name)), 0


# the number of a caption in captions.json, with any zeros in front, in folders or not
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "Kosmos-G's COCO script",
        name=lambda task, index: f"{int(task.unit):05}",
        keys=lambda task: (str(int(task.unit)),),
        read=_read_number,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--annotations", required=True, metavar="FILE", help="captions_val2014.json of MS-COCO")
    add("--images", required=True, metavar="FOLDER", help="its photographs, val2014")
    count = f"captions, drawn by --seed (default: {COUNT:,})"
    add("--count", type=int, default=COUNT, metavar="N", help=count)
    weights = "weights of the FID's network (default: torch-fidelity's download)"
    add("--inception", metavar="FILE", help=weights)


def plan(arguments: argparse.Namespace) -> Manifest:
    from ..fid import SIZE, Fid

    names, captions = read_annotations(arguments.annotations)
    captions = draw_captions(captions, arguments.count, arguments.seed)
    images = Path(arguments.images)
    _check_photographs(images, names)
    notes = [
        f"FID: {arguments.count:,} images against {len(names):,} photographs, {SIZE} x {SIZE} pixels.",
        f"The published FID is of {COUNT:,} images. It grows as images get fewer: these two do not compare.",
    ]
    tasks = build_tasks(captions, arguments.seed)
    return Manifest(
        benchmark="coco",
        options={"captions": hash_file(arguments.annotations), "count": arguments.count, "size": SIZE},
        tasks=tasks,
        data=str(images),
        files={"captions.json": (json.dumps(captions, indent=1) + "\n").encode()},
        published=PUBLISHED,
        notes=tuple(notes[:1] if arguments.count == COUNT else notes),
        distance=Fid([images / name for name in names], arguments.inception),
        generated=take_generated(arguments, tasks, LAYOUTS),
    )


def read_annotations(path: str | Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Photographs and captions of a file of COCO's captions.

    Returns:
        (file names of all photographs, annotations: dicts with `id`, `image_id` and `caption`).

    Raises:
        ValueError: the file is missing or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no annotations at {str(path)!r}. Pass captions_val2014.json of COCO.")
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = content["annotations"]
        for annotation in annotations:
            if not isinstance(annotation["caption"], str) or annotation["image_id"] not in images:
                raise ValueError(f"annotation {annotation['id']} has no caption or is of no image")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} does not hold COCO's captions ({type(error).__name__}: {error}). Expected a JSON object with the "
            "lists images (id, file_name) and annotations (id, image_id, caption), as in captions_val2014.json."
        ) from error
    if not annotations:
        raise ValueError(f"{str(path)!r} holds no captions.")
    return list(images.values()), annotations


def draw_captions(annotations: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` annotations, drawn as the official code draws them."""
    if not 2 <= count <= len(annotations):
        raise ValueError(f"{count} captions were asked for; expected 2 to {len(annotations)}, all there are.")
    return random.Random(seed).sample(annotations, count)


def build_tasks(captions: Sequence[dict[str, Any]], seed: int) -> tuple[Task, ...]:
    """A `Task` for each annotation."""
    return tuple(
        Task(
            id=f"{number // 1000:03}/{number:06}",
            unit=f"{number:06}",
            row="captions",
            prompt=as_text(annotation["caption"]),
            text=annotation["caption"],
            pictures=(),
            references=(),
            seed=derive_seed(seed, "coco", annotation["id"], annotation["caption"]),
        )
        for number, annotation in enumerate(captions)
    )


def _check_photographs(folder, names):
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - FEW} more" if len(missing) > FEW else ""
        raise ValueError(
            f"{len(missing)} of {len(names)} photographs are not in {str(folder)!r}: {', '.join(missing[:FEW])}{more}. Pass "
            "--images, the folder val2014 of COCO, and complete it."
        )
