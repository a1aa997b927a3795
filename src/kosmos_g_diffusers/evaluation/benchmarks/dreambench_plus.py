"""DreamBench++ (github.com/yuangpeng/dreambench_plus): its data as input, and an exporter for its judge.

Its data folder has `images/<category>/<number>.jpg` and, next to each, `captions/<category>/<number>.txt`: the subject in the
first line, then a prompt a line. Its judge is a hosted model, which this package does not call. `export` writes what the
judge's own scripts read, and, with the judge's instructions, the requests themselves.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from ...files import write_text
from ...provenance import UNMARKED
from ..generated import PATCHDPO, Layout, plan_images, split_index
from ..manifest import Manifest, Task, as_id, derive_seed

TITLE = "DreamBench++, and its images for its judge"
DESCRIPTION = """
The data of DreamBench++, scored by DINO and CLIP. Its judge is a hosted model, which is not called: --judge writes the images and
questions that it is asked.
"""
EXAMPLES = """
  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus
  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus \\
      --judge judge --judge-prompts dreambench_plus/dreambench_plus/prompts
"""
SETTINGS: dict[str, Any] = {"steps": 100, "guidance": 7.5, "scheduler": "dpm"}
BATCH_SIZE = 4
SCORERS = ("dino", "clip")
IMAGES_PER_PROMPT = 1  # as its own scripts make
JUDGE_SIZE = (512, 512)  # what its scripts show the judge
ARTICLE: re.Pattern[str] = re.compile(
    r"(?<![^\W_])(a|an|the) \Z", re.IGNORECASE
)  # as the last word, not the end of one
# kind of request -> files with the judge's instructions: what the user says, and what the judge is made to answer
INSTRUCTIONS = {
    kind: (f"user_prompt_{kind}_full.txt", f"gpt_prompt_{kind}_full.txt")
    for kind in ("subject", "style", "text")
}


def _read_target(folder, stem):
    parts = stem.split("/")
    # what its scripts write next to the images
    if parts[0] not in ("src_image", "text"):
        yield from split_index("/".join(parts[-2:]))


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "DreamBench++'s scripts",
        name=lambda task, index: f"tgt_image/{task.unit}/{task.truth['number']}_{index}",
        keys=lambda task: (f"{task.unit}/{task.truth['number']}", task.id.rpartition("_")[0]),
        read=_read_target,
    ),
    PATCHDPO,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="data folder of DreamBench++: images/ and captions/")
    add("--judge", metavar="FOLDER", help="also write the images for the judge of DreamBench++ there")
    prompts = "dreambench_plus/prompts of its repository: write the judge's requests as well"
    add("--judge-prompts", metavar="FOLDER", help=prompts)
    add(
        "--images-per-prompt",
        type=int,
        metavar="N",
        help=f"(default: {IMAGES_PER_PROMPT}; of --generated, all)",
    )


def plan(arguments: argparse.Namespace) -> Manifest:
    if arguments.judge_prompts and not arguments.judge:
        raise ValueError("--judge-prompts was given without --judge, the folder to write to. Pass both.")
    if arguments.judge_prompts:  # before hours of work
        read_instructions(arguments.judge_prompts)
    judge = {"data": arguments.data, "output": arguments.judge, "instructions": arguments.judge_prompts}
    build = partial(build_tasks, arguments.data, seed=arguments.seed)
    tasks, generated = plan_images(arguments, build, LAYOUTS, IMAGES_PER_PROMPT)
    return Manifest(
        benchmark="dreambench-plus",
        options={},
        tasks=tasks,
        data=arguments.data,
        finish=partial(export, **judge) if arguments.judge else None,
        generated=generated,
    )


def build_tasks(
    data: str | Path, images_per_prompt: int = IMAGES_PER_PROMPT, seed: int = 0
) -> tuple[Task, ...]:
    """The images of a run. The input image takes the place of the subject's words, as Emu2's own runs of the benchmark do.

    `a kitten sitting on a cloud` with the subject `kitten` is read as `<i> sitting on a cloud`: the article goes with it.
    A prompt that does not name its subject, such as most of those for styles, gets the image first.

    Raises:
        ValueError: folders, captions or images are missing; all of them are named.
    """
    data = Path(data)
    images, captions = (
        {path.relative_to(data / kind).with_suffix(""): path for path in sorted((data / kind).rglob(pattern))}
        for kind, pattern in (("images", "*.jpg"), ("captions", "*.txt"))
    )
    missing = [f"captions/{name.as_posix()}.txt" for name in images if name not in captions]
    missing += [f"images/{name.as_posix()}.jpg" for name in captions if name not in images]
    if missing or not images:
        what = ", ".join(missing) or "images/<category>/<number>.jpg and captions/<category>/<number>.txt"
        raise ValueError(f"{str(data)!r} lacks {what}. Pass the data folder of DreamBench++.")
    texts = {}
    for name in images:
        lines = [line.strip() for line in captions[name].read_text(encoding="utf-8-sig").splitlines()]
        texts[name] = [line for line in lines if line]
    empty = [str(captions[name]) for name, lines in texts.items() if len(lines) < 2]
    if empty:
        raise ValueError(
            f"{len(empty)} files have no prompts: {', '.join(empty)}. Expected the subject in the first line, then a prompt a "
            "line."
        )
    tasks = []
    for name, image in images.items():
        subject, *prompts = texts[name]
        category = name.parent.name
        category = f"live_subject_{category}" if category in ("animal", "human") else category
        collection = f"{category}_{name.name}_{'_'.join(subject.lower().split())}"
        given = image.relative_to(data).as_posix()
        for number, text in enumerate(prompts):
            for index in range(images_per_prompt):
                prompt = place_image(text, subject)
                tasks.append(
                    Task(
                        id=f"{as_id(collection)}/{number}_{index}",
                        unit=collection,
                        row=f"prompt {number}",
                        prompt=prompt,
                        text=text,
                        pictures=(given,),
                        references=((given,),),
                        seed=derive_seed(seed, collection, prompt, index),
                        truth={"collection": collection, "number": number, "index": index},
                    )
                )
    return tuple(tasks)


def place_image(text: str, subject: str) -> str:
    """Words with the subject's name -> prompt with `<i>` in its place, or before everything."""
    from ...processing_kosmos_g import IMAGE_MARK

    place = text.lower().find(subject.lower()) if subject else -1
    if place < 0:
        return f"{IMAGE_MARK} {text}"
    before, after = text[:place], text[place + len(subject) :]
    return f"{ARTICLE.sub('', before)}{IMAGE_MARK}{after}"


def export(
    folder: str | Path, data: str | Path, output: str | Path, instructions: str | Path | None = None
) -> Any:
    """Write a finished run for DreamBench++'s judge.

    Args:
        folder: of the run.
        data: the data folder it was made from.
        output: folder with `src_image`, `text` and `tgt_image` as its scripts read them (put its path into METHODS of
            their constants.py).
        instructions: its folder `dreambench_plus/prompts`. With it, `requests.jsonl` is written as well: a line for each
            question, {"id": ..., "messages": [...]} as chat interfaces take them, images included.

    Raises:
        ValueError: images are missing, or instructions.
    """
    from ...processing_kosmos_g import open_image
    from ..images import check_complete, image_path, marker_of

    output, manifest = Path(output), Manifest.read(folder)
    check_complete(folder, manifest)
    texts = None if instructions is None else read_instructions(instructions)
    requests = []
    for task in manifest.tasks:
        name = f"{task.truth['collection']}/{task.truth['number']}_{task.truth['index']}"
        drawn = marker_of(image_path(folder, task))
        images = {  # without their colour profiles, as its scripts read and write them
            "src_image": (
                open_image(Path(data) / task.pictures[0], task.pictures[0], in_srgb=False),
                UNMARKED,
            ),
            "tgt_image": (open_image(image_path(folder, task), task.id, in_srgb=False), drawn),
        }
        for kind, (image, marker) in images.items():
            path = output / kind / f"{name}.jpg"
            # in Pillow's own quality, as its scripts do: the judge sees what a JPEG leaves
            marker.save(image, path)
            images[kind] = open_image(path, str(path)), marker
        write_text(output / "text" / f"{name}.txt", task.text + "\n")
        if texts is not None:
            kind = "style" if task.truth["collection"].startswith("style_") else "subject"
            source, target = (_as_content(image.resize(JUDGE_SIZE), mark) for image, mark in images.values())
            requests.append(_request(f"{name}/concept", texts[kind], [source, target]))
            words = {"type": "text", "text": task.text}
            requests.append(_request(f"{name}/prompt", texts["text"], [words, target]))
    write_text(output / "negative_prompt.txt", "")
    if texts is not None:
        write_text(output / "requests.jsonl", "".join(json.dumps(request) + "\n" for request in requests))


def read_instructions(folder: str | Path) -> dict[str, list[str]]:
    """Kind of request -> what the user says, and what the judge is made to answer.

    Raises:
        ValueError: files are missing; all of them are named.
    """
    paths = {kind: [Path(folder) / name for name in names] for kind, names in INSTRUCTIONS.items()}
    missing = [str(path) for group in paths.values() for path in group if not path.is_file()]
    if missing:
        raise ValueError(
            f"The judge's instructions {', '.join(missing)} are not there. Pass dreambench_plus/prompts of its repository."
        )
    return {kind: [path.read_text("utf-8").strip() for path in group] for kind, group in paths.items()}


def _request(name, texts, content):
    parts = zip(("user", "assistant", "user"), (*texts, content), strict=True)
    return {"id": name, "messages": [{"role": role, "content": part} for role, part in parts]}


def _as_content(image, marker):
    from ..sheets import as_data_url

    url = as_data_url(image, "jpeg", marker)
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
