"""Pieces of the page as HTML. `Markup.format` escapes every text that it is given."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

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
    prompt: str,
    thumbnails: Sequence[str | None],
    words: Mapping[str, Sequence[str | None]] | None = None,
    note: str = "",
) -> str:
    """The prompt with its images in their places, and below it what is missing, a note about the images, and the image words.

    Args:
        thumbnails: of its images as `thumbnail` gives them.
        words: image word -> thumbnails of its images, as far as they are known.
    """
    words = words or {}
    pieces, images, number = [], iter(thumbnails), count(1)
    for text in re.split(f"({IMAGE_WORD_PATTERN.pattern})", prompt):
        if text == IMAGE_MARK:
            pieces.append(_image(next(images, ""), f"image {next(number)}"))
        else:
            tag = '<b class="kg-word">{}</b>' if text in words else "<span>{}</span>"
            pieces += [_image(uri, text) for uri in words.get(text, ()) if uri]
            pieces.append(Markup(tag).format(text))
    if spare := Markup().join(_image(uri, "an image") for uri in images):
        pieces.append(Markup('<span class="kg-spare">not in the prompt: {}</span>').format(spare))
    line, complete = count_line(prompt, len(thumbnails))
    html = '<div class="kg-prompt">{}</div><div class="kg-count {}">{}</div>'
    html = Markup(html).format(Markup().join(pieces), "kg-good" if complete else "kg-bad", line)
    html += Markup('<div class="kg-note">{}</div>').format(note) if note else ""
    return html + _word_buttons(words)


def _word_buttons(words):
    """Image words with their images: a click writes one into the prompt, and the prompt offers them while it is typed."""
    if not words:
        return ""
    buttons = [
        Markup(
            '<button type="button" data-word="{0}" title="Write {0} in the prompt">{1}{0}</button>'
        ).format(word, Markup().join(_image(uri, "") for uri in uris if uri))
        for word, uris in words.items()
    ]
    return Markup('<div class="kg-words">Image words: {}</div>').format(Markup(" ").join(buttons))


def heading(address: str, most_images: int) -> str:
    """What this is, and where more is written."""
    return Markup(
        '<header id="theme"><h1>Kosmos-G</h1><button type="button" title="Dark or light" aria-label="Dark or light theme">'
        "\u25d0</button></header><p>It draws images of prompts in which images stand among the words: write <code>{}</code> "
        "where an image belongs, and drop the images, up to {}, in that order. "
        '<a href="{}" target="_blank" rel="noopener">Documentation</a></p>'
    ).format(IMAGE_MARK, most_images, address)


def examples(entries: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Buttons of examples, each a prompt and thumbnails of its images."""
    buttons = [
        Markup(
            '<button type="button" class="kg-example" data-example="{}">{}<span>{}</span></button>'
        ).format(number, Markup().join(_image(uri, "") for uri in uris), prompt)
        for number, (prompt, uris) in enumerate(entries)
    ]
    return Markup('<div class="kg-examples">{}</div>').format(Markup().join(buttons))


def first_example(prompt: str, thumbnails: Sequence[str], result: str, note: str) -> str:
    """An example with its result, a data: URI, which is shown until something was drawn."""
    images, pieces = iter(thumbnails), []
    for text in re.split(f"({re.escape(IMAGE_MARK)})", prompt):
        pieces.append(_image(next(images), "an image") if text == IMAGE_MARK else escape(text))
    return Markup(
        '<figure class="kg-first"><figcaption><b>For example:</b> <span class="kg-prompt">{}</span></figcaption>'
        '<img src="{}" alt="what was drawn of this prompt"><p>{}</p></figure>'
    ).format(Markup().join(pieces), result, note)


def word_note(word: str, thumbnails: Sequence[str | None]) -> str:
    """That a word was made, and of what."""
    images = Markup().join(_image(uri, "its image") for uri in thumbnails if uri)
    text = "is an image word now, for as long as this page is open. Write it in the prompt."
    return Markup('<div class="kg-done" role="status">{} <b>{}</b> {}</div>').format(images, word, text)


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
    state = ticket.state
    if ticket.state == "waiting":
        wait = "" if seconds_to_wait is None else f", about {_time(seconds_to_wait)}"
        text = f"In the queue: place {ticket.place}{wait}."
    elif ticket.state == "cancelled":
        where = f" at step {progress.step} of {progress.steps}" if progress and progress.steps else ""
        text = f"Cancelled{where}. {done or 'No'} {'image was' if done == 1 else 'images were'} finished."
    elif ticket.state == "done":
        text = f"Done: {done} {'image' if done == 1 else 'images'}."
        bar = _bar(100)
    elif progress is None or not progress.steps:
        text = f"{progress.phase if progress else 'starting'} ...".capitalize()
        bar = _bar(0)
    else:
        left = "" if progress.seconds_left is None else f", about {_time(progress.seconds_left)} left"
        several = f"Image {min(done + 1, progress.num_images)} of {progress.num_images}. "
        text = f"{several if progress.num_images > 1 else ''}Step {progress.step} of {progress.steps}{left}."
        # what is left of an image after its last step counts as one more
        units, all_units = progress.step + done, progress.steps + progress.num_images
        bar = _bar(100 * units // all_units)
        if progress.preview:
            bar += Markup('<img class="kg-preview" src="{}" alt="the image so far">').format(progress.preview)
    return Markup('<div class="kg-run" data-state="{}"><div>{}</div>{}</div>').format(state, text, bar)


def _bar(percent):
    """How much of all images of a run is drawn."""
    bar = (
        '<progress value="{0}" max="100" aria-label="Progress of all images">{0}%</progress><span>{0}%</span>'
    )
    return Markup(f'<div class="kg-bar">{bar}</div>').format(percent)


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
        "LoRAs": [f"{lora.path}, scale {lora.scale:g}" for lora in settings.loras] or None,
        "changed": _change(settings),
        "image words": len(settings.image_words) or None,  # files; their names are in the prompt
        "controls": [
            f"{control.name}, strength {control.scale:g}, from {control.start:g} to {control.end:g}"
            for control in settings.controls
        ]
        or None,
    }
    return {name: value for name, value in entries.items() if value is not None}


def _change(settings):
    if settings.init_image is None:
        return None
    what = "an image" if settings.mask is None else "a part of an image"
    return f"{what}, strength {settings.strength:g}"


def again_command(settings: GenerationSettings, path: str | Path) -> str:
    """The command that makes an image again, in the output folder; "..." is where the folders of the app's flags lie."""
    words = ["kosmos-g", "generate", "--from", path.as_posix()]
    # the PNG has no more than their names
    places = [("model", settings.model), ("unet", settings.unet)]
    places += [("lora", lora.path) for lora in settings.all_loras]
    for name, chosen in places:
        if chosen is not None:
            words += [f"--{name}", f".../{chosen}"]
    return shlex.join([*words, "--output", "again.png"])


def settings_table(settings: GenerationSettings, path: str | Path) -> str:
    """The settings of an image, and how to make it again from its path."""
    rows = []
    for name, value in {**described(settings), "again": again_command(settings, path)}.items():
        text = "; ".join(value) if isinstance(value, list) else value
        rows.append(Markup("<tr><th>{}</th><td>{}</td></tr>").format(name, text))
    return Markup('<table class="kg-settings">{}</table>').format(Markup().join(rows))
