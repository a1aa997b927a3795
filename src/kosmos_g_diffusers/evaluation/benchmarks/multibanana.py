"""MultiBanana (github.com/matsuolab/multibanana): its data as input, and an exporter for its judges.

Its data folder has, for each kind of task, `<task>/<number>_<k>.jpg`, the input images, and `<task>/<number>_prompt.txt`. Its
judges, hosted models and Qwen3-VL, look for `<number>_generated.jpg` next to them.
"""

import argparse
import re
from functools import partial
from pathlib import Path

from ..generated import IMAGE_SUFFIXES, Layout, take_generated
from ..manifest import Manifest, Task, as_id, derive_seed
from . import dreambench_plus, multi

TITLE = "MultiBanana, and its images for its judges"
DESCRIPTION = """
Instructions with 1 to 8 input images, scored by DINO and CLIP-I with each of them. Its judges are not called: --judge writes the folder
that its scripts read.
"""
EXAMPLES = """
  kosmos-g evaluate multibanana --data MultiBanana-Benchmark --model ./kosmos-g --output runs/banana --judge judge
  # some of its kinds of tasks
  kosmos-g evaluate multibanana --data MultiBanana-Benchmark --model ./kosmos-g --output runs/banana-3 --tasks 3_back,3_local
"""
SETTINGS, BATCH_SIZE, SCORERS = dreambench_plus.SETTINGS, dreambench_plus.BATCH_SIZE, dreambench_plus.SCORERS
NOTE = "Its published scores are those of its judges: kosmos-g evaluate multibanana --judge FOLDER writes what they read."
EXPECTED = "Expected <task>/<number>_0.jpg, <number>_1.jpg, ... and <number>_prompt.txt, as github.com/matsuolab/multibanana has them."
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "MultiBanana",
        name=lambda task, index: f"{task.unit}_generated",
        keys=lambda task: (f"{task.unit}_generated", task.id),
        read=lambda folder, stem: [("/".join(stem.split("/")[-2:]), 0)],
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="data folder of MultiBanana, with a folder for each kind of task",
    )
    add("--tasks", metavar="A,B", help="some of its kinds of tasks, such as 3_back (default: all)")
    add(
        "--judge",
        metavar="FOLDER",
        help="also write what its judges read there; the data folder itself will do",
    )


def plan(arguments: argparse.Namespace) -> Manifest:
    kinds = arguments.tasks and [name.strip() for name in arguments.tasks.split(",")]
    tasks = build_tasks(arguments.data, kinds, arguments.seed)
    return Manifest(
        benchmark="multibanana",
        options={},
        tasks=tasks,
        data=arguments.data,
        notes=(NOTE,),
        finish=partial(export, data=arguments.data, output=arguments.judge) if arguments.judge else None,
        generated=take_generated(arguments, tasks, LAYOUTS),
        by_references=True,
    )


def build_tasks(data: str | Path, kinds: list[str] | None = None, seed: int = 0) -> tuple[Task, ...]:
    """The images of a run: one for each instruction. Where `<i>` stands says `multi.place_images`.

    Args:
        data: its data folder.
        kinds: names of its folders; None takes all.
        seed: of the run.

    Raises:
        ValueError: folders, instructions or images are missing; all of them are named.
    """
    data = Path(data)
    there = sorted(path.name for path in data.glob("*/") if path.is_dir() and path.name[0] != ".")
    kinds = there if kinds is None else kinds
    unknown = [kind for kind in kinds if kind not in there]
    if unknown or not kinds:
        raise ValueError(
            f"{str(data)!r} has no folders {', '.join(unknown)}; it has {', '.join(there)}. {EXPECTED}"
        )
    tasks, wrong = [], []
    for kind in kinds:
        images = _list_inputs(data / kind)
        prompts = {
            path.name.removesuffix("_prompt.txt"): path for path in sorted((data / kind).glob("*_prompt.txt"))
        }
        wrong += [f"{kind}/{number}_prompt.txt" for number in images if number not in prompts]
        for number, path in prompts.items():
            text = path.read_text(encoding="utf-8-sig", errors="replace").strip()
            if number not in images or not text:
                wrong.append(f"{kind}/{number}_prompt.txt (empty)" if not text else f"{kind}/{number}_0.jpg")
                continue
            given = [f"{kind}/{name}" for name in images[number]]
            prompt, order = multi.place_images(text, len(given))
            tasks.append(
                Task(
                    id=f"{as_id(kind)}/{as_id(number)}",
                    unit=f"{kind}/{number}",
                    row=kind,
                    prompt=prompt,
                    text=None,  # an instruction is not a caption
                    pictures=tuple(given[index] for index in order),
                    references=tuple((given[index],) for index in order),
                    seed=derive_seed(seed, "multibanana", kind, number, text),
                )
            )
    if wrong or not tasks:
        lacks = f"lacks {len(wrong)} files: {', '.join(wrong)}" if wrong else "has no instructions"
        raise ValueError(f"{str(data)!r} {lacks}. {EXPECTED}")
    return tuple(tasks)


def _list_inputs(folder):
    """Number of a task -> names of its images, in order."""
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"(.+)_(\d{1,3})", path.stem)
        if match and path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".":
            found.setdefault(match[1], {})[int(match[2])] = path.name
    return {number: [names[k] for k in sorted(names)] for number, names in sorted(found.items())}


def export(folder: str | Path, data: str | Path, output: str | Path) -> None:
    """Write a finished run for MultiBanana's judges (`--base_dir` of its scripts): input images, instruction and drawn image.

    Args:
        folder: of the run.
        data: the data folder it was made from.
        output: a folder of its own, or `data` itself.

    Raises:
        ValueError: images are missing.
    """
    from ...files import write_bytes
    from ...processing_kosmos_g import open_image
    from ..images import check_complete, image_path, marker_of

    data, output, manifest = Path(data), Path(output), Manifest.read(folder)
    check_complete(folder, manifest)
    for task in manifest.tasks:
        for name in (*task.pictures, f"{task.unit}_prompt.txt"):
            if not (output / name).exists():
                write_bytes(output / name, (data / name).read_bytes())
        drawn = image_path(folder, task)
        # its scripts call every image a JPEG; as fine as JPEG has it
        marker_of(drawn).save(
            open_image(drawn, task.id), output / f"{task.unit}_generated.jpg", quality=95, subsampling=0
        )
