"""Images that another model made, found in the folders in which its scripts leave them: `--generated FOLDER`.

A layout says how an image's name tells its prompt. Those of a benchmark are tried one after the other, and the one that most of
the names follow is taken.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse

    from .manifest import Task

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LISTED = 100  # names that an error spells out
MOST_SIDECAR_BYTES = 1024**2

Keys = Iterable[tuple[str, int | None]]


class Layout(NamedTuple):
    """How the scripts of a model or benchmark name their images.

    Args:
        title: whose it is.
        name: (task, index) -> path without suffix, as an error names an image that is missing.
        keys: task -> what tells its prompt from any other, one for each way to say it.
        read: (folder, path without suffix) -> what the path may mean: pairs of a key and the number of the image among those of
            its prompt, which is None where names only give an order.
    """

    title: str
    name: Callable[["Task", int], str]
    keys: Callable[["Task"], Iterable[str]]
    read: Callable[[Path, str], Keys]


@dataclass(frozen=True)
class Generated:
    """The images of a run that another model made.

    Args:
        folder: where they are.
        layout: title of the layout that its names follow.
        files: task id -> path from the folder.
        notes: paragraphs for the report.
    """

    folder: str
    layout: str
    files: dict[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()


def find_generated(
    folder: str | Path,
    build: Callable[[int], Sequence["Task"]],
    layouts: Sequence[Layout],
    images_per_prompt: int | None = None,
) -> tuple[tuple["Task", ...], Generated]:
    """The tasks of a run whose images are there, and where.

    Args:
        folder: of the images, with or without folders inside.
        build: images per prompt -> the tasks, those of a prompt next to each other.
        layouts: those that the benchmark knows.
        images_per_prompt: None takes as many as any prompt has.

    Raises:
        ValueError: there is no such folder, no image in it belongs to a prompt, one is there twice, or images are missing: they
            are listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Pass --generated, a folder of images.")
    if (folder / "manifest.jsonl").is_file():
        raise ValueError(
            f"{str(folder)!r} is a run of kosmos-g evaluate, which has scores of its own: pass it to kosmos-g compare."
        )
    paths = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not _is_hidden(path.relative_to(folder))
        and path.is_file()
    ]
    prompts = build(1)
    found = {layout: _match(folder, paths, prompts, layout) for layout in layouts}
    layout = max(layouts, key=lambda layout: sum(map(len, found[layout].values())))
    matches = found[layout]
    if not matches:
        forms = "; ".join(f"{one.name(prompts[0], 0)}.png ({one.title})" for one in layouts)
        seen = f"{len(paths):,} images" + (f", such as {paths[0]}" if paths else "")
        raise ValueError(f"{str(folder)!r} has {seen}: none belongs to a prompt. Expected names as {forms}.")
    twice = [both for images in matches.values() for both in images.values() if len(both) > 1]
    if twice:
        both = " and ".join(twice[0])
        raise ValueError(
            f"{len(twice)} images of {str(folder)!r} are there twice, such as {both}. Keep one of them."
        )
    count = images_per_prompt
    if count is None:
        count = 1 + max(index for images in matches.values() for index in images)
    missing = [
        layout.name(task, index)
        for number, task in enumerate(prompts)
        for index in range(count)
        if index not in matches.get(number, {})
    ]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise ValueError(
            f"{len(missing)} of {count * len(prompts)} images are not in {str(folder)!r}, which is read as of {layout.title}: "
            f"{', '.join(missing[:LISTED])}{more}. Complete it, or ask for fewer."
        )
    tasks = tuple(build(count))
    files = {task.id: matches[number // count][number % count][0] for number, task in enumerate(tasks)}
    left = sorted(set(paths) - set(files.values()))
    notes = (f"The images were made by another model and read from a folder as of {layout.title}.",)
    if left:
        notes += (
            f"{len(left)} further images of that folder belong to no prompt of this run, such as {left[0]}.",
        )
    return tasks, Generated(str(folder), layout.title, files, notes)


def _is_hidden(path):
    return any(part[0] == "." or part == "__MACOSX" for part in path.parts)


def _match(folder, paths, prompts, layout):
    """Number of a prompt -> number of an image -> paths that say they are this image: one, if all is well."""
    known = {}
    for number, task in enumerate(prompts):
        for key in layout.keys(task):
            known.setdefault(key, number)
    matches, ordered = {}, {}
    for path in paths:
        stem = path.rpartition(".")[0]
        meant = next(((known[key], index) for key, index in layout.read(folder, stem) if key in known), None)
        if meant is None:
            continue
        number, index = meant
        if index is None:
            ordered.setdefault(number, []).append(path)
        else:
            matches.setdefault(number, {}).setdefault(index, []).append(path)
    for number, group in ordered.items():
        matches[number] = {index: [path] for index, path in enumerate(sorted(group, key=_natural))}
    return matches


def _natural(path):
    """So that 10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def plan_images(
    arguments: "argparse.Namespace",
    build: Callable[..., tuple["Task", ...]],
    layouts: Sequence[Layout],
    images_per_prompt: int,
) -> tuple[tuple["Task", ...], Generated | None]:
    """The tasks that a benchmark's flags ask for, and the images of --generated, if it is there.

    Args:
        arguments: with `generated` and `images_per_prompt`.
        build: as in `find_generated`, by its keyword `images_per_prompt`.
        images_per_prompt: of images that are drawn, unless the user says otherwise.

    Raises:
        ValueError: as `find_generated`; fewer than 1 image per prompt were asked for.
    """
    asked = arguments.images_per_prompt
    if asked is not None and asked < 1:
        raise ValueError(f"{asked} images per prompt were asked for. Expected 1 or more.")
    if arguments.generated is None:
        return build(images_per_prompt=asked or images_per_prompt), None
    return find_generated(arguments.generated, lambda count: build(images_per_prompt=count), layouts, asked)


def take_generated(
    arguments: "argparse.Namespace", tasks: tuple["Task", ...], layouts: Sequence[Layout]
) -> Generated | None:
    """The images of --generated, if it is there, for a benchmark with one image for each prompt. Raises as `find_generated`."""
    if arguments.generated is None:
        return None
    return find_generated(arguments.generated, lambda count: tasks, layouts, 1)[1]


# Layouts that benchmarks share -----------------------------------------------------------------------------------------


def as_plain(text: str) -> str:
    """A text as names of files have it: any case, with underscores or without, no full stop at the end."""
    return " ".join(text.replace("_", " ").split()).casefold().rstrip(".")


def split_index(stem: str) -> Keys:
    """`cat/03_1` -> (cat/03, 1)."""
    if match := re.fullmatch(r"(.+)_(\d{1,6})", stem, re.DOTALL):
        yield match[1], int(match[2])


# as `images/` of a run has them
OWN = Layout(
    "kosmos-g's runs",
    name=lambda task, index: f"{task.id.rpartition('_')[0]}_{index}",
    keys=lambda task: (task.id.rpartition("_")[0],),
    read=lambda folder, stem: split_index(stem),
)


def _read_prompt_name(folder, stem):
    unit, _, text = stem.partition("/")
    unit = as_plain(unit)
    yield f"{unit}/{as_plain(text)}", 0
    if match := re.fullmatch(r"(.+?)[/_ -]+(\d{1,6})", text, re.DOTALL):
        yield f"{unit}/{as_plain(match[1])}", int(match[2])


# one folder for each subject; several images of a prompt are numbered from 0
PATCHDPO = Layout(
    "PatchDPO",
    name=lambda task, index: f"{task.unit}/{task.text}" + (f"_{index}" if index else ""),
    keys=lambda task: () if task.text is None else (f"{as_plain(task.unit)}/{as_plain(task.text)}",),
    read=_read_prompt_name,
)


def _read_kosmosg(folder, stem):
    parts = stem.rpartition("/")[2].split("+", 3)
    if len(parts) == 4:
        subject, image, _, text = parts
        yield f"{subject}+{image}+{as_plain(text)}", None


# kosmos-g/sample_kosmosg_dreambench.py of microsoft/unilm: the third part counts all of its images
KOSMOSG = Layout(
    "Kosmos-G's DreamBench script",
    name=lambda task, index: f"{task.unit}+{Path(task.pictures[0]).stem}+<number>+{task.text}",
    keys=lambda task: (f"{task.unit}+{Path(task.pictures[0]).stem}+{as_plain(task.text)}",),
    read=_read_kosmosg,
)


def uno_layout(number_of: Callable[["Task"], int]) -> Layout:
    """UNO's `<number>_<index>.png`, where `number_of` a task is the place of its prompt in UNO's list, from 0.

    A `.json` of the same name, as UNO writes it, says prompt and images; then the number does not count.
    """

    def read(folder, stem):
        for number, index in () if "/" in stem else split_index(stem):
            said = _read_sidecar(folder / f"{stem}.json")
            if said is not None:
                yield said, index
            elif number.isdigit():
                yield str(int(number)), index

    return Layout(
        "UNO",
        name=lambda task, index: f"{number_of(task)}_{index}",
        keys=lambda task: (str(number_of(task)), _say(task.text, task.pictures)),
        read=read,
    )


def _say(text, paths):
    return json.dumps([text, ["/".join(Path(path).parts[-2:]) for path in paths]])


def _read_sidecar(path):
    """Prompt and images of UNO's settings next to an image; None if there are none."""
    try:
        if path.stat().st_size > MOST_SIDECAR_BYTES:
            return None
        settings = json.loads(path.read_text(encoding="utf-8"))
        return _say(str(settings["prompt"]), [str(image) for image in settings["image_paths"]])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
