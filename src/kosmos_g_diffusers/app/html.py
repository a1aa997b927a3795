"""Pieces of the page as HTML. `Markup.format` escapes every text that it is given."""

import re
import shlex
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..generation.settings import IMAGE_MARK, IMAGE_WORD_PATTERN, GenerationSettings
from ..maps.boxes import region_text
from ..serving.errors import FieldError
from ..serving.images import data_uri, open_shrunk
from ..serving.job import finished_images
from ..serving.queue import Ticket
from .form import count_line

THUMBNAIL = 64  # pixels


@lru_cache(maxsize=256)
def thumbnail(path: str) -> str | None:
    """Small data: URI of an uploaded image, whose file never changes; None if it cannot be read."""
    try:
        image = open_shrunk(path, "pictures", THUMBNAIL)
    except FieldError:
        return None
    return data_uri(image, side=0)


def prompt_line(
    prompt: str, thumbnails: Sequence[str | None], words: Iterable[str] = (), note: str = ""
) -> str:
    """The prompt with its images in their places, and below it what is missing, and a note about the images.

    Args:
        thumbnails: of its images as `thumbnail` gives them.
    """
    pieces, images, number = [], iter(thumbnails), count(1)
    for text in re.split(f"({IMAGE_WORD_PATTERN.pattern})", prompt):
        if text == IMAGE_MARK:
            pieces.append(_image(next(images, ""), f"image {next(number)}"))
        else:
            tag = '<b class="kg-word">{}</b>' if text in words else "<span>{}</span>"
            pieces.append(Markup(tag).format(text))
    if spare := Markup().join(_image(uri, "an image") for uri in images):
        pieces.append(Markup('<span class="kg-spare">not in the prompt: {}</span>').format(spare))
    line, complete = count_line(prompt, len(thumbnails))
    html = '<div class="kg-prompt">{}</div><div class="kg-count {}">{}</div>'
    html = Markup(html).format(Markup().join(pieces), "kg-good" if complete else "kg-bad", line)
    return html + (Markup('<div class="kg-note">{}</div>').format(note) if note else "")


def _image(uri, name):
    if uri:
        return Markup('<img class="kg-thumbnail" src="{0}" alt="{1}" title="{1}">').format(uri, name)
    problem = "cannot be read" if uri is None else "is missing"
    return Markup('<span class="kg-hole" title="{} {}">?</span>').format(name, problem)


def message(text: str) -> str:
    """An error or a note of a field; nothing for an empty text."""
    return Markup('<div class="kg-message" role="alert">{}</div>').format(text) if text else ""


def model_state(state: str, problem: str | None, note: str) -> str:
    """One line about the model."""
    texts = {
        **dict.fromkeys(("waiting", "loading"), "The model is loading. You can write your prompt meanwhile."),
        "ready": "Ready.",
        "failed": f"The model could not be loaded. {problem}",
    }
    text = " ".join(filter(None, (texts.get(state, ""), note)))
    return Markup('<div class="kg-state" data-state="{}">{}</div>').format(state, text)


def run_state(ticket: Ticket, seconds_to_wait: float | None = None) -> str:
    """How far a run is, with the image being drawn."""
    progress, done, bar = ticket.progress, len(finished_images(ticket)), ""
    if ticket.state == "waiting":
        wait = "" if seconds_to_wait is None else f", about {_time(seconds_to_wait)}"
        text = f"In the queue: place {ticket.place}{wait}."
    elif ticket.state == "cancelled":
        where = f" at step {progress.step} of {progress.steps}" if progress and progress.steps else ""
        text = f"Cancelled{where}. {done or 'No'} {'image was' if done == 1 else 'images were'} finished."
    elif ticket.state == "done":
        text = f"Done: {done} {'image' if done == 1 else 'images'}."
    elif progress is None or not progress.steps:
        text = f"{progress.phase if progress else 'starting'} ...".capitalize()
    else:
        left = "" if progress.seconds_left is None else f", about {_time(progress.seconds_left)} left"
        several = f"Image {min(done + 1, progress.num_images)} of {progress.num_images}. "
        text = f"{several if progress.num_images > 1 else ''}Step {progress.step} of {progress.steps}{left}."
        bar = Markup('<progress value="{0.step}" max="{0.steps}"></progress>').format(progress)
        if progress.preview:
            bar += Markup('<img class="kg-preview" src="{}" alt="the image so far">').format(progress.preview)
    return Markup('<div class="kg-run"><div>{}</div>{}</div>').format(text, bar)


def _time(seconds):
    seconds = max(1, round(seconds))
    return f"{seconds} s" if seconds < 100 else f"{round(seconds / 60)} min"


def described(settings: GenerationSettings) -> dict[str, Any]:
    """GenerationSettings as a dict for people and programs: no paths, nothing that was left alone."""
    entries = {
        "prompt": settings.prompt,
        "negative prompt": settings.negative_prompt,
        "pictures": len(settings.images) or None,
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "binding": settings.binding or None,
        "regions": [region_text(region) for region in settings.regions] or None,
        "width": settings.width,
        "height": settings.height,
        "scheduler": settings.scheduler,
        "model": settings.model,
        "U-Net": settings.unet,
        "LoRA": settings.lora,
        "LoRA scale": settings.lora_scale if settings.lora else None,
        "image words": len(settings.image_words) or None,  # files; their names are in the prompt
        "controls": [
            f"{control.name}, strength {control.scale:g}, from {control.start:g} to {control.end:g}"
            for control in settings.controls
        ]
        or None,
    }
    return {name: value for name, value in entries.items() if value is not None}


def again_command(settings: GenerationSettings, path: str | Path) -> str:
    """The command that makes an image again, in the output folder; "..." is where the folders of the app's flags lie."""
    words = ["kosmos-g", "generate", "--from", path.as_posix()]
    for name in ("model", "unet", "lora"):  # the PNG has no more than their names
        if (chosen := getattr(settings, name)) is not None:
            words += [f"--{name}", f".../{chosen}"]
    return shlex.join([*words, "--output", "again.png"])


def settings_table(settings: GenerationSettings, path: str | Path) -> str:
    """The settings of an image, and how to make it again from its path."""
    rows = []
    for name, value in {**described(settings), "again": again_command(settings, path)}.items():
        text = "; ".join(value) if isinstance(value, list) else value
        rows.append(Markup("<tr><th>{}</th><td>{}</td></tr>").format(name, text))
    return Markup('<table class="kg-settings">{}</table>').format(Markup().join(rows))
