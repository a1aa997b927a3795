"""Prompts of several subjects: each image is scored against every one of its subjects, and against words.

The data folder holds images in folders of any names and `prompts.json`, a list of

    {"prompt": "<i> and <i> in the jungle", "images": ["dog/02.jpg", "can/01.jpg"], "text": "a dog and a can in the jungle"}

- `prompt`: what the model reads, with a `<i>` for each input image;
- `images`: the input images, as paths from the data folder;
- `text`: words that CLIP-T compares with; left out, nothing is compared with words;
- `references` (may be left out): for each subject a list of images that it is scored against, or the name of a folder, all
  of whose images are taken; by default the input image itself.

Lists of the kind that UNO's evaluation uses, {"prompt": "a dog and a can in the jungle", "image_paths": [...]}, are read as
well when the images lie in DreamBench's folders: "a dog" becomes `<i>`, and the prompt itself is the text.
"""

import argparse
import re
from functools import partial
from pathlib import Path

from ...files import read_json
from ..generated import PATCHDPO, Layout, plan_images, uno_layout
from ..manifest import Manifest, Task, check_images, derive_seed
from . import dreambench

TITLE = "prompts of several subjects"
DESCRIPTION = """
Several input images in one prompt: DINO and CLIP-I with each subject and with the worst of them, CLIP-T with the words. The data folder
has the images and prompts.json:

  [{"prompt": "<i> and <i> in the jungle", "images": ["dog/02.jpg", "can/01.jpg"], "text": "a dog and a can in the jungle"}]
"""
EXAMPLES = """
  kosmos-g evaluate multi --data pairs --model ./kosmos-g --output runs/pairs
"""
SETTINGS, BATCH_SIZE, SCORERS = dreambench.SETTINGS, dreambench.BATCH_SIZE, dreambench.SCORERS
FILE_NAME = "prompts.json"
EXAMPLE = (
    'Expected a list such as [{"prompt": "<i> and <i> in the jungle", "images": ["dog/02.jpg", "can/01.jpg"], "text": '
    '"a dog and a can in the jungle"}], with paths from the data folder; docs/evaluation.md says more.'
)
KEYS = {"prompt", "images", "text", "references"}
UNO_KEYS = {"prompt", "image_paths", "image_tgt_path"}
# images/ of a run has the same names, with zeros in front
LAYOUTS: tuple[Layout, ...] = (uno_layout(lambda task: int(task.id.partition("_")[0])), PATCHDPO)


ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
    *("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th"),
)
# "image 2", "Figure #2", "the second reference image"
MENTION: re.Pattern[str] = re.compile(
    rf"(?:\bthe )?\b(?P<ordinal>{'|'.join(ORDINALS)}) (?:reference |input )?(?:image|picture|photo|figure)\b"
    r"|\b(?:image|picture|photo|figure) ?#?(?P<number>[1-9])(?!\w)",
    re.IGNORECASE,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="images and prompts.json (docs/evaluation.md)")
    prompts = "another file of prompts (default: prompts.json of the data folder)"
    add("--prompts", metavar="FILE", help=prompts)
    count = dreambench.IMAGES_PER_PROMPT
    add("--images-per-prompt", type=int, metavar="N", help=f"(default: {count}; of --generated, all)")


def plan(arguments: argparse.Namespace) -> Manifest:
    build = partial(build_tasks, arguments.data, arguments.prompts, seed=arguments.seed)
    tasks, generated = plan_images(arguments, build, LAYOUTS, dreambench.IMAGES_PER_PROMPT)
    return Manifest(
        benchmark="multi",
        options={},
        tasks=tasks,
        data=arguments.data,
        generated=generated,
        by_references=True,
    )


def build_tasks(
    data: str | Path, prompts: str | Path | None = None, images_per_prompt: int = 4, seed: int = 0
) -> tuple[Task, ...]:
    """The images of a run.

    Args:
        data: folder of the images.
        prompts: JSON file of the format above; None takes `prompts.json` of the data folder.
        images_per_prompt, seed: as for DreamBench.

    Raises:
        ValueError: the file is missing or of another format, or images are missing; all of them are named.
    """
    data = Path(data)
    path = data / FILE_NAME if prompts is None else Path(prompts)
    entries = read_json(path, EXAMPLE)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of prompts. {EXAMPLE}")
    read = [_read_entry(data, path, number, entry) for number, entry in enumerate(entries)]
    check_images(data, [name for _, images, _, groups in read for name in (*images, *sum(groups, ()))])
    tasks = []
    for number, (prompt, images, text, references) in enumerate(read):
        unit = "+".join(dict.fromkeys(_subject(image) for image in images)) or "no picture"
        for index in range(images_per_prompt):
            tasks.append(
                Task(
                    id=f"{number:04}_{index}",
                    unit=unit,
                    row=prompt,
                    prompt=prompt,
                    text=text,
                    pictures=images,
                    references=references,
                    seed=derive_seed(seed, *images, prompt, index),
                )
            )
    return tuple(tasks)


def _subject(image):
    """dog/02.jpg -> dog; dog.jpg -> dog."""
    path = Path(image)
    return path.parent.name or path.stem


def _read_entry(data, path, number, entry):
    from ...processing_kosmos_g import IMAGE_MARK

    where = f"Entry {number} of {path}"
    if isinstance(entry, dict) and {"prompt", "image_paths"} <= set(entry) <= UNO_KEYS:
        entry = _from_uno(data, where, entry)
    if not isinstance(entry, dict) or not {"prompt", "images"} <= set(entry) <= KEYS:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where} has {found}; expected prompt, images and perhaps text and references.")
    prompt, images, text = entry["prompt"], entry["images"], entry.get("text")
    if not isinstance(prompt, str) or not isinstance(text, str | None):
        raise ValueError(f"{where}: prompt and text must be strings.")
    if not _is_list_of_text(images) or prompt.count(IMAGE_MARK) != len(images):
        found = f"a list of {len(images)} paths" if _is_list_of_text(images) else "not a list of paths"
        raise ValueError(
            f"{where}: its prompt has {prompt.count(IMAGE_MARK)} '<i>' marks and images is {found}. Give the path of one "
            "image for each '<i>', in reading order."
        )
    references = entry.get("references", [[image] for image in images])
    if not isinstance(references, list) or len(references) != len(images):
        raise ValueError(
            f"{where}: references must be a list with an entry for each of {len(images)} images."
        )
    groups = []
    for group in references:
        if isinstance(group, str) and (data / group).is_dir():
            group = list(dreambench.list_images(data, group))
        if not _is_list_of_text(group) or not group:
            wrong = "neither a list of images nor a folder with images"
            raise ValueError(f"{where}: the references {str(group)[:100]!r} are {wrong}.")
        groups.append(tuple(group))
    for name in (*images, *sum(groups, ())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where}: {name!r} leads out of the data folder.")
    return prompt, tuple(images), text, tuple(groups)


def place_images(text: str, count: int) -> tuple[str, tuple[int, ...]]:
    """An instruction that speaks of "image 1" or "the second image" -> prompt with `<i>` there, and which image each one is.

    The first mention of each image becomes its `<i>`. Where an image is not mentioned, all of them come first, in order.

    Args:
        text: what it says, marks in it are text.
        count: of the images.

    Returns:
        (prompt, numbers of the images from 0, in reading order).
    """
    from ...captioning import as_text
    from ...processing_kosmos_g import IMAGE_MARK

    text, order, parts, start = as_text(text), [], [], 0
    for mention in MENTION.finditer(text):
        number = int(mention["number"] or 1 + ORDINALS.index(mention["ordinal"].lower()) % 8) - 1
        if number < count and number not in order:
            parts += [text[start : mention.start()], IMAGE_MARK]
            order.append(number)
            start = mention.end()
    if len(order) == count:
        return "".join([*parts, text[start:]]), tuple(order)
    return " ".join([*[IMAGE_MARK] * count, text]), tuple(range(count))


def _is_list_of_text(value):
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _from_uno(data, where, entry):
    """Replace "a dog" by `<i>` for each image, by the class words of DreamBench's table."""
    from ...processing_kosmos_g import IMAGE_MARK

    prompt, paths = entry["prompt"], entry["image_paths"]
    if not isinstance(prompt, str) or not _is_list_of_text(paths):
        raise ValueError(f"{where}: prompt must be a string and image_paths a list of paths.")
    images, marked, start, advice = [], prompt, 0, "Write prompts with <i> instead."
    for path in paths:
        subject, name = Path(path).parts[-2:] if len(Path(path).parts) > 1 else ("", path)
        if subject not in dreambench.SUBJECTS:
            raise ValueError(f"{where}: the class of {path!r} is not in DreamBench's table. {advice}")
        words = f"a {dreambench.SUBJECTS[subject].class_word}"
        place = marked.find(words, start)
        if place < 0:
            raise ValueError(f"{where}: its prompt does not say {words!r} for {path!r}. {advice}")
        marked = marked[:place] + IMAGE_MARK + marked[place + len(words) :]
        start = place + len(IMAGE_MARK)
        images.append(f"{subject}/{name}")
    return {"prompt": marked, "images": images, "text": prompt}
