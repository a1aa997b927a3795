"""Pieces of the page as HTML. Every text that comes from somewhere is escaped here."""

import shlex
from functools import lru_cache
from html import escape

from ..processing_kosmos_g import IMAGE_MARK
from ..serving.errors import FieldError
from ..serving.preview import data_uri
from ..serving.store import open_picture
from .form import count_line

THUMBNAIL = 64  # pixels


@lru_cache(maxsize=256)
def thumbnail(path):
    """Small data: URI of an uploaded picture, whose file never changes; None if it cannot be read."""
    try:
        picture = open_picture(path, "pictures")
    except FieldError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(picture, side=0)


def prompt_line(prompt, paths, words=(), note=""):
    """The prompt with its pictures in their places, and below it what is missing, and a note about the pictures."""
    pieces, paths = [], list(paths)
    for index, text in enumerate(prompt.split(IMAGE_MARK)):
        if index:
            pieces.append(_picture(paths[index - 1] if index <= len(paths) else None, index))
        text = escape(text)
        for word in words:
            text = text.replace(escape(word), f'<b class="kg-word">{escape(word)}</b>')
        pieces.append(f"<span>{text}</span>")
    spare = [_picture(path, None) for path in paths[prompt.count(IMAGE_MARK) :]]
    if spare:
        pieces.append(f'<span class="kg-spare">not in the prompt: {"".join(spare)}</span>')
    line, complete = count_line(prompt, len(paths))
    kind = "kg-good" if complete else "kg-bad"
    html = f'<div class="kg-prompt">{"".join(pieces)}</div><div class="kg-count {kind}">{escape(line)}</div>'
    return html + (f'<div class="kg-note">{escape(note)}</div>' if note else "")


def _picture(path, number):
    uri = None if path is None else thumbnail(path)
    name = "a picture" if number is None else f"picture {number}"
    if uri is None:
        return f'<span class="kg-hole" title="{name} {"is missing" if path is None else "cannot be read"}">?</span>'
    return f'<img class="kg-thumbnail" src="{uri}" alt="{name}" title="{name}">'


def message(text):
    """An error or a note beside a field; nothing for an empty text."""
    return f'<div class="kg-message" role="alert">{escape(text)}</div>' if text else ""


def model_state(state, problem, note):
    """One line about the model."""
    texts = {
        "loading": "The model is loading. You can write your prompt meanwhile.",
        "ready": "Ready.",
        "failed": f"The model could not be loaded. {problem}",
    }
    text = " ".join(filter(None, (texts.get(state, ""), note)))
    return f'<div class="kg-state" data-state="{escape(state)}">{escape(text)}</div>'


def run_state(ticket, seconds_to_wait=None):
    """How far a run is, with the image being drawn."""
    if ticket.state == "waiting":
        wait = "" if seconds_to_wait is None else f", about {_time(seconds_to_wait)}"
        return _run(f"In the queue: place {ticket.place}{wait}.")
    progress = ticket.progress
    if ticket.state == "cancelled":
        done = len(progress.images) if progress else 0
        where = f" at step {progress.step} of {progress.steps}" if progress and progress.steps else ""
        return _run(
            f"Cancelled{where}. {done or 'No'} {'image was' if done == 1 else 'images were'} finished."
        )
    if ticket.state == "done":
        return _run(f"Done: {progress.num_images} {'image' if progress.num_images == 1 else 'images'}.")
    if progress is None or not progress.steps:
        return _run(f"{progress.phase if progress else 'starting'} ...".capitalize())
    left = "" if progress.seconds_left is None else f", about {_time(progress.seconds_left)} left"
    several = ""
    if progress.num_images > 1:
        several = f"Image {min(len(progress.images) + 1, progress.num_images)} of {progress.num_images}. "
    text = f"{several}Step {progress.step} of {progress.steps}{left}."
    return _run(text, (progress.step, progress.steps), progress.preview)


def _run(text, share=None, preview=None):
    bar = f'<progress value="{share[0]}" max="{share[1]}"></progress>' if share else ""
    picture = f'<img class="kg-preview" src="{preview}" alt="the image so far">' if preview else ""
    return f'<div class="kg-run"><div>{escape(text)}</div>{bar}{picture}</div>'


def _time(seconds):
    seconds = max(1, round(seconds))
    return f"{seconds} s" if seconds < 100 else f"{round(seconds / 60)} min"


def described(settings):
    """GenerationSettings as a dict for people and programs: no paths, nothing that was left alone."""
    entries = {
        "prompt": settings.prompt,
        "negative prompt": settings.negative_prompt,
        "pictures": len(settings.images) or None,
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
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


def again_command(settings, path):
    """The command that makes an image again, in the output folder; "..." is where the folders of the app's flags lie."""
    words = ["kosmos-g", "generate", "--from", path.as_posix()]
    for name in ("model", "unet", "lora"):  # the PNG has no more than their names
        if (chosen := getattr(settings, name)) is not None:
            words += [f"--{name}", f".../{chosen}"]
    return shlex.join([*words, "--output", "again.png"])


def settings_table(settings, path=None):
    """The settings of an image, and how to make it again from its path."""
    rows = []
    entries = described(settings)
    if path is not None:
        entries["again"] = again_command(settings, path)
    for name, value in entries.items():
        text = "; ".join(value) if isinstance(value, list) else str(value)
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>")
    return f'<table class="kg-settings">{"".join(rows)}</table>'
