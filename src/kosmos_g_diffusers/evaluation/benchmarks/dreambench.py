"""DreamBench: 30 subjects with 25 prompts each, as the Kosmos-G paper (sec. 4.2) and DreamBooth measure them.

Subjects, classes and prompts are those of github.com/google/dreambooth, dataset/prompts_and_classes.txt; the image of each
subject is the one that microsoft/unilm keeps, kosmos-g/scripts/remove_dreambench_multiimg.sh. As in its
eval/dreambench_prompts.py, the model reads `<i> in the jungle` and CLIP-T compares with "a dog in the jungle".
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..generated import IMAGE_SUFFIXES, KOSMOSG, OWN, PATCHDPO, Layout, plan_images, uno_layout
from ..manifest import Manifest, Task, derive_seed

TITLE = "30 subjects with 25 prompts each"
DESCRIPTION = """
An image of a subject in new scenes, with the settings of the paper. DINO and CLIP-I tell whether it is the subject, CLIP-T
whether it is the scene. Both protocols give the model the same image: paper compares with that one, standard with every
image of the subject. The data folder has a folder of images for each subject, such as dog/02.jpg.
"""
EXAMPLES = """
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/dreambench
  # a taste of it: two subjects, two prompts, one image each; scored without anything from a hub
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/taste \\
      --subjects dog,can --prompts 0,20 --images-per-prompt 1 --scorer efficientnet
  # other weights of a scorer, from a folder
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/offline \\
      --scorer dino=./dino-vits16 --scorer clip=./clip-vit-base-patch32
"""
SETTINGS: dict[str, Any] = {"steps": 100, "guidance": 7.5, "scheduler": "dpm"}
BATCH_SIZE = 4
SCORERS = ("dino", "clip")  # of the paper
PROTOCOLS = ("paper", "standard")
IMAGES_PER_PROMPT = 4


class Subject(NamedTuple):
    class_word: str
    image: str  # the one of the paper
    live: bool = False


SUBJECTS = {
    "backpack": Subject("backpack", "02.jpg"),
    "backpack_dog": Subject("backpack", "02.jpg"),
    "bear_plushie": Subject("stuffed animal", "03.jpg"),
    "berry_bowl": Subject("bowl", "02.jpg"),
    "can": Subject("can", "01.jpg"),
    "candle": Subject("candle", "02.jpg"),
    "cat": Subject("cat", "04.jpg", live=True),
    "cat2": Subject("cat", "02.jpg", live=True),
    "clock": Subject("clock", "03.jpg"),
    "colorful_sneaker": Subject("sneaker", "01.jpg"),
    "dog": Subject("dog", "02.jpg", live=True),
    "dog2": Subject("dog", "02.jpg", live=True),
    "dog3": Subject("dog", "05.jpg", live=True),
    "dog5": Subject("dog", "00.jpg", live=True),
    "dog6": Subject("dog", "02.jpg", live=True),
    "dog7": Subject("dog", "01.jpg", live=True),
    "dog8": Subject("dog", "04.jpg", live=True),
    "duck_toy": Subject("toy", "01.jpg"),
    "fancy_boot": Subject("boot", "02.jpg"),
    "grey_sloth_plushie": Subject("stuffed animal", "04.jpg"),
    "monster_toy": Subject("toy", "04.jpg"),
    "pink_sunglasses": Subject("glasses", "04.jpg"),
    "poop_emoji": Subject("toy", "00.jpg"),
    "rc_car": Subject("toy", "03.jpg"),
    "red_cartoon": Subject("cartoon", "00.jpg"),
    "robot_toy": Subject("toy", "00.jpg"),
    "shiny_sneaker": Subject("sneaker", "01.jpg"),
    "teapot": Subject("teapot", "04.jpg"),
    "vase": Subject("vase", "02.jpg"),
    "wolf_plushie": Subject("stuffed animal", "04.jpg"),
}

SCENES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
OBJECT_SCENES = (
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
LIVE_SCENES = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
EDITS = ("red", "purple", "shiny", "wet", "cube shaped")
N_PROMPTS = len(SCENES) + len(OBJECT_SCENES) + len(EDITS)

PUBLISHED = {
    "paper": {"Kosmos-G, its paper": {"dino": 0.694, "clip_i": 0.847, "clip_t": 0.287}},
    "standard": {
        "Kosmos-G, open weights, an independent run": {"dino": 0.618, "clip_i": 0.822, "clip_t": 0.250}
    },
}
NOTE = "The published numbers are of 30 subjects with 25 prompts and 4 images each; this run is of others."


def _number_in_list(task):
    """Of a prompt in UNO's datasets/dreambench_singleip.json: all prompts of a subject, then the next subject."""
    number = int(task.id.rpartition("/")[2].partition("_")[0])
    return list(SUBJECTS).index(task.unit) * N_PROMPTS + number


LAYOUTS: tuple[Layout, ...] = (OWN, PATCHDPO, KOSMOSG, uno_layout(_number_in_list))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="the folder dataset of github.com/google/dreambooth")
    protocol = "score against the one image that the model was given (paper, the default) or all of the subject (standard)"
    add("--protocol", choices=PROTOCOLS, default="paper", help=protocol)
    add("--subjects", type=_names, metavar="A,B", help="some of them (default: all 30)")
    add("--prompts", type=_numbers, metavar="N,N", help="some of them, from 0 to 24 (default: all 25)")
    add(
        "--images-per-prompt",
        type=int,
        metavar="N",
        help=f"(default: {IMAGES_PER_PROMPT}; of --generated, all)",
    )


def _names(text):
    return [name.strip() for name in text.split(",")]


def _numbers(text):
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        wrong = f"{text!r} is not a list of numbers; expected some such as 0,20"
        raise argparse.ArgumentTypeError(wrong) from None


def plan(arguments: argparse.Namespace) -> Manifest:
    names = ("data", "protocol", "subjects", "prompts", "seed")
    build = partial(build_tasks, **{name: getattr(arguments, name) for name in names})
    tasks, generated = plan_images(arguments, build, LAYOUTS, IMAGES_PER_PROMPT)
    return Manifest(
        benchmark="dreambench",
        options={"protocol": arguments.protocol},
        tasks=tasks,
        data=arguments.data,
        published=PUBLISHED[arguments.protocol],
        notes=() if len(tasks) == len(SUBJECTS) * N_PROMPTS * IMAGES_PER_PROMPT else (NOTE,),
        generated=generated,
    )


def prompts_of(subject: str) -> list[tuple[str, str]]:
    """25 (prompt with `<i>`, words for CLIP-T) of a name of SUBJECTS."""
    word, _, live = SUBJECTS[subject]
    scenes = SCENES + (LIVE_SCENES if live else OBJECT_SCENES)
    return [
        *((f"<i> {scene}", f"a {word} {scene}") for scene in scenes),
        *((f"<i>, {edit}", f"a {edit} {word}") for edit in EDITS),
    ]


def build_tasks(
    data: str | Path,
    protocol: str,
    subjects: Sequence[str] | None = None,
    prompts: Sequence[int] | None = None,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    seed: int = 0,
) -> tuple[Task, ...]:
    """The images of a run.

    Args:
        data: folder with a folder for each subject.
        protocol: "paper" scores against the image that the model was given, "standard" against every image of the
            subject. Both give it the same image, so they make the same images.
        subjects: names out of SUBJECTS; None takes all.
        prompts: numbers of prompts, from 0 to 24; None takes all.
        images_per_prompt: as it says.
        seed: of the run.

    Raises:
        ValueError: no such protocol, subject or prompt, a folder whose class is not known, folders or images that are
            missing: all of them are named.
    """
    data = Path(data)
    if protocol not in PROTOCOLS:
        raise ValueError(f"There is no protocol {protocol!r}. Known: {', '.join(PROTOCOLS)}.")
    prompts = range(N_PROMPTS) if prompts is None else prompts
    wrong = [number for number in prompts if not 0 <= number < N_PROMPTS]
    if wrong:
        raise ValueError(f"There are no prompts {wrong}. They are numbered from 0 to {N_PROMPTS - 1}.")
    if images_per_prompt < 1:
        raise ValueError(f"{images_per_prompt} images per prompt were asked for. Expected 1 or more.")
    subjects = _check_subjects(data, subjects)
    tasks = []
    for subject in subjects:
        given = f"{subject}/{SUBJECTS[subject].image}"
        references = list_images(data, subject) if protocol == "standard" else (given,)
        rows = prompts_of(subject)
        for number in prompts:
            prompt, text = rows[number]
            for index in range(images_per_prompt):
                tasks.append(
                    Task(
                        id=f"{subject}/{number:02}_{index}",
                        unit=subject,
                        row=prompt,
                        prompt=prompt,
                        text=text,
                        pictures=(given,),
                        references=(references,),
                        seed=derive_seed(seed, subject, prompt, index),
                    )
                )
    return tuple(tasks)


def list_images(data: str | Path, folder: str) -> tuple[str, ...]:
    """Paths from `data` of the images of a folder, in order of their names."""
    paths = (Path(data) / folder).iterdir()
    names = sorted(path.name for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    return tuple(f"{folder}/{name}" for name in names)


def _check_subjects(data, subjects):
    if not data.is_dir():
        place = "the folder `dataset` of github.com/google/dreambooth"
        raise ValueError(f"There is no folder {str(data)!r}. Pass {place}.")
    if subjects is None:
        strangers = sorted(path.name for path in data.iterdir() if path.is_dir() and path.name[0] != ".")
        advice = "Move these folders elsewhere, or name the subjects to run with --subjects."
        subjects = list(SUBJECTS)
    else:
        strangers = subjects
        advice = "Name subjects of the table."
    strangers = [name for name in strangers if name not in SUBJECTS]
    if strangers and (data / "dataset").is_dir():
        raise ValueError(f"The subjects are not in {str(data)!r} but in its folder `dataset`: pass that.")
    if strangers:
        raise ValueError(
            f"The class of {', '.join(strangers)} is not in DreamBench's table, which has {', '.join(SUBJECTS)}. {advice}"
        )
    missing = []
    for subject in subjects:
        if not (data / subject).is_dir():
            missing.append(f"{subject}/")
        elif not (data / subject / SUBJECTS[subject].image).is_file():
            missing.append(f"{subject}/{SUBJECTS[subject].image}")
    if missing:
        raise ValueError(
            f"{len(missing)} folders or images are not in {str(data)!r}: {', '.join(missing)}. Complete it from "
            "github.com/google/dreambooth (folder `dataset`), or name the subjects that are there with --subjects."
        )
    return list(dict.fromkeys(subjects))
