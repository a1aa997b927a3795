"""OmniContext (github.com/VectorSpaceLab/OmniGen2, omnicontext/): its data as input, and an exporter for its judge.

Its data set OmniGen2/OmniContext has the columns key, task_type, instruction, input_images and instruction_language, as its
scripts read them; the data set itself was not at hand. Its judge, a hosted model, reads `fullset/<task_type>/<key>.png`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..generated import Layout, take_generated
from ..manifest import OWN_PICTURES, Manifest, Task, derive_seed
from . import dreambench_plus, multi

TITLE = "OmniContext, and its images for its judge"
DESCRIPTION = """
Instructions with 1 to 3 input images of people, things and scenes, scored by DINO and CLIP-I with each of them. Its judge is a hosted
model, which is not called: --judge writes the images that its scripts read.
"""
EXAMPLES = """
  kosmos-g evaluate omnicontext --data OmniGen2/OmniContext --model ./kosmos-g --output runs/context \\
      --judge omnicontext/results/Kosmos-G
"""
SETTINGS, BATCH_SIZE, SCORERS = dreambench_plus.SETTINGS, dreambench_plus.BATCH_SIZE, dreambench_plus.SCORERS
COLUMNS = ("key", "task_type", "instruction", "input_images")
LANGUAGE = "en"
NOTE = "Its published scores are those of its judge: kosmos-g evaluate omnicontext --judge FOLDER writes what it reads."
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "OmniContext's scripts",
        name=lambda task, index: f"fullset/{task.unit}",
        keys=lambda task: (task.unit,),
        read=lambda folder, stem: [("/".join(stem.split("/")[-2:]), 0)],
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DATASET", help="OmniGen2/OmniContext, or a folder that holds it")
    add("--tasks", metavar="A,B", help="some of its task types, such as multi_character (default: all)")
    add(
        "--judge",
        metavar="FOLDER",
        help="also write the images for its judge there: results/<name of the model>",
    )


def plan(arguments: argparse.Namespace) -> Manifest:
    kinds = arguments.tasks and [name.strip() for name in arguments.tasks.split(",")]
    rows = read_rows(arguments.data, kinds)
    tasks, files = build_tasks(rows, arguments.seed)
    return Manifest(
        benchmark="omnicontext",
        options={},
        tasks=tasks,
        files={f"{OWN_PICTURES}/{name}": content for name, content in files.items()},
        notes=(NOTE,),
        finish=partial(export, output=arguments.judge) if arguments.judge else None,
        generated=take_generated(arguments, tasks, LAYOUTS),
        by_references=True,
    )


def read_rows(data: str | Path, kinds: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of the data set whose instructions are English: dicts of COLUMNS, images as bytes.

    Args:
        data: id on the Hub, or a folder with its parquet files or of `save_to_disk`.
        kinds: task types; None takes all.

    Raises:
        ImportError: the package datasets is not installed.
        ValueError: columns or task types are not there, there are no rows, or images cannot be read: all of them are named.
        OSError: the data set cannot be fetched.
    """
    dataset = _load(str(data))
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        there = ", ".join(dataset.column_names)
        raise ValueError(
            f"{str(data)!r} has no columns {', '.join(missing)}; it has {there}. Expected OmniContext."
        )
    rows = [row for row in dataset if row.get("instruction_language") in (None, LANGUAGE)]
    there = sorted({row["task_type"] for row in rows})
    unknown = [kind for kind in kinds or () if kind not in there]
    if unknown or not rows:
        raise ValueError(
            f"{str(data)!r} has no English rows of {', '.join(unknown) or 'any task type'}; it has {', '.join(there)}."
        )
    rows = [row for row in rows if kinds is None or row["task_type"] in kinds]
    _check_images(data, rows)
    return rows


def _load(data):
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Reading OmniContext needs the package datasets: pip install 'kosmos-g-diffusers[train]'"
        ) from error
    if (Path(data) / "state.json").is_file():
        dataset = datasets.load_from_disk(data)
    else:
        dataset = datasets.load_dataset(data, split="train")
    if "input_images" in dataset.column_names:
        dataset = dataset.cast_column("input_images", datasets.Sequence(datasets.Image(decode=False)))
    return dataset


def _check_images(data, rows):
    """Images as bytes, each opened once: a damaged one must show before hours of work."""
    from ...processing_kosmos_g import open_image

    wrong = []
    for row in rows:
        name = f"{row['task_type']}/{row['key']}"
        try:
            row["input_images"] = [
                image["bytes"] or Path(image["path"]).read_bytes() for image in row["input_images"]
            ]
            for number, content in enumerate(row["input_images"]):
                open_image(content, f"{name}, image {number}")
        except (OSError, TypeError, ValueError) as error:
            wrong.append(f"{name} ({error})")
    if wrong:
        raise ValueError(
            f"{len(wrong)} rows of {str(data)!r} have images that cannot be read: {'; '.join(wrong)}"
        )


def build_tasks(rows: list[dict[str, Any]], seed: int = 0) -> tuple[tuple[Task, ...], dict[str, bytes]]:
    """The images of a run: one for each row. Where `<i>` stands says `multi.place_images`.

    Returns:
        (tasks, name of each input image -> its file as bytes).
    """
    tasks, files = [], {}
    for row in rows:
        name, images = f"{row['task_type']}/{row['key']}", row["input_images"]
        prompt, order = multi.place_images(row["instruction"], len(images))
        paths = [f"{name}_{number}" for number in range(len(images))]
        files |= dict(zip(paths, images, strict=True))
        tasks.append(
            Task(
                id=name,
                unit=name,
                row=row["task_type"],
                prompt=prompt,
                text=None,  # an instruction is not a caption
                pictures=tuple(paths[index] for index in order),
                references=tuple((paths[index],) for index in order),
                seed=derive_seed(seed, "omnicontext", name, row["instruction"]),
            )
        )
    return tuple(tasks), files


def export(folder: str | Path, output: str | Path) -> None:
    """Write a finished run for OmniContext's judge.

    Args:
        folder: of the run.
        output: `<--result_dir>/<--model_name>` of its test_omnicontext_score.py.

    Raises:
        ValueError: images are missing.
    """
    from ...processing_kosmos_g import open_image
    from ..images import check_complete, image_path, marker_of

    manifest = Manifest.read(folder)
    check_complete(folder, manifest)
    for task in manifest.tasks:
        drawn = image_path(folder, task)
        marker_of(drawn).save(open_image(drawn, task.id), Path(output) / "fullset" / f"{task.unit}.png")
