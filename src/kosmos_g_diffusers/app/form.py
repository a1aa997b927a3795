"""The fields of the page: what each may hold, the presets, and the way from their values to settings."""

import re
import secrets
from dataclasses import dataclass, field

from ..control.controls import find_control
from ..environment import package_versions
from ..generation.schedulers import SCHEDULERS
from ..generation.settings import ControlInput, GenerationSettings
from ..processing_kosmos_g import IMAGE_MARK
from ..serving.errors import FieldError, at
from ..serving.models import NO_LORA, OWN
from ..serving.store import MAX_FILES

CONTROL_SLOTS = 3
NO_CONTROL = "none"
# what one run of one visitor may ask for; the command line has no such limits
LIMITS = {
    "num_images": (1, 8),
    "steps": (1, 250),  # as many as the paper's COCO figures take
    "guidance": (0, 30),
    "width": (8, 1024),
    "height": (8, 1024),
    "lora_scale": (-2, 2),
    "seed": (0, 2**53 - 1),  # beyond that a browser's numbers have gaps
}
LABELS = {"num_images": "number of images", "steps": "number of steps", "lora_scale": "LoRA scale"}
MAX_PROMPT = 4_000  # characters
DEFAULTS = {"num_images": 1, "steps": 30, "guidance": 7.5, "scheduler": OWN, "lora_scale": 1.0}
SMALL_FAST = {
    "steps": 12,
    "guidance": 5.0,
    "scheduler": "dpm",
}  # what the small model's scores were drawn with
PRESETS = {
    "fast": {"steps": 15, "guidance": 6.0, "scheduler": "dpm"},
    "paper": {"steps": 100, "guidance": 7.5, "scheduler": "dpm"},  # DreamBench: 100 steps of DPM-Solver
}
WORD = re.compile(r"<[a-z][a-z0-9-]*>")


@dataclass(frozen=True)
class ControlForm:
    """A slot of the controls panel."""

    kind: str = NO_CONTROL
    picture: object = None  # InputImage that the control image is made of, or that it is
    ready: bool = False
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Form:
    """What a run was asked for, as the page holds it. Nothing of it was checked, but that pictures were kept."""

    prompt: str = ""
    pictures: tuple = ()  # InputImage
    negative_prompt: str = ""
    model: str | None = None  # names of what Models offers
    unet: str = OWN
    lora: str = NO_LORA
    lora_scale: float = 1.0
    num_images: int = 1
    steps: int = 30
    guidance: float = 7.5
    width: int | None = None  # 0 and None: the model's own
    height: int | None = None
    seed: int | None = None
    surprise: bool = True  # draw a seed
    scheduler: str = OWN
    controls: tuple = field(default_factory=tuple)  # ControlForm


def defaults(is_small):
    """What the page starts with, for a small model or another."""
    return {**DEFAULTS, **SMALL_FAST} if is_small else DEFAULTS


def presets(is_small):
    """Values of fields, by the name of a preset."""
    return {**PRESETS, "fast": SMALL_FAST} if is_small else PRESETS


def read_form(form, models, words):
    """Values of the page -> GenerationSettings, whose model, U-Net and LoRA are names and not paths.

    Args:
        words: name -> InputImage of the image words that the session knows.

    Raises:
        FieldError: with the field that is to be mended.
    """
    _check_prompt(form, words)
    numbers = {name: _number(form, name) for name in ("num_images", "steps", "guidance", "lora_scale")}
    sides = {name: _number(form, name) if getattr(form, name) else None for name in ("width", "height")}
    for name, side in sides.items():
        if side is not None and side % 8:
            low = side // 8 * 8
            raise FieldError(name, f"The {name} is {side} pixels. Take a multiple of 8: {low} or {low + 8}.")
    chosen = {
        name: _choice(form, name, offered, own)
        for name, offered, own in (
            ("model", models.models, None),
            ("unet", models.unets, OWN),
            ("lora", models.loras, NO_LORA),
            ("scheduler", SCHEDULERS, OWN),
        )
    }
    if form.model in (None, models.default) and models.is_builtin(models.default):
        chosen["model"] = None  # settings name it so
    used = dict.fromkeys(word for word in WORD.findall(form.prompt) if word in words)
    with at("run"):
        return GenerationSettings(
            prompt=form.prompt,
            images=tuple(form.pictures),
            controls=tuple(_read_controls(form)),
            negative_prompt=form.negative_prompt or None,
            image_words=tuple(dict.fromkeys(words[word] for word in used)),
            seed=secrets.randbelow(2**32)
            if form.surprise or form.seed is None
            else int(_number(form, "seed")),
            device=models.device,
            dtype=models.dtype,
            versions=package_versions(),
            **chosen,
            **numbers,
            **sides,
        )


def count_line(prompt, n_pictures):
    """What the prompt still needs, such as "2 <i>, 1 picture: one picture is missing"; and whether all is there."""
    n_marks = prompt.count(IMAGE_MARK)
    line = f"{n_marks} {IMAGE_MARK}, {n_pictures} {'picture' if n_pictures == 1 else 'pictures'}"
    missing = n_marks - n_pictures
    if n_marks > MAX_FILES:
        return f"{line}: at most {MAX_FILES} are possible.", False
    if missing > 0:
        what = "one picture is" if missing == 1 else f"{missing} pictures are"
        return f"{line}: {what} missing. Drop a picture for each {IMAGE_MARK}.", False
    if missing < 0:
        what = f"one {IMAGE_MARK} is" if missing == -1 else f"{-missing} {IMAGE_MARK} are"
        return f"{line}: {what} missing. Write {IMAGE_MARK} where a picture belongs.", False
    return line, True


def _check_prompt(form, words):
    if not form.prompt.strip():
        raise FieldError("prompt", f"Write what to draw, with {IMAGE_MARK} for each picture.")
    for name in ("prompt", "negative_prompt"):
        text = getattr(form, name)
        if len(text) > MAX_PROMPT or "\0" in text:
            raise FieldError(
                name, f"This text has {len(text)} characters; at most {MAX_PROMPT} are possible."
            )
    line, complete = count_line(form.prompt, len(form.pictures))
    if not complete:
        raise FieldError("prompt", line)
    unknown = [word for word in WORD.findall(form.prompt) if word not in words and word != IMAGE_MARK]
    if unknown:
        known = f"This session knows {', '.join(words)}." if words else "This session knows none yet."
        raise FieldError(
            "prompt", f"{unknown[0]} is no image word. {known} Name a picture below to make it one."
        )


def _number(form, name):
    value, (low, high) = getattr(form, name), LIMITS[name]
    label = LABELS.get(name, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(name, f"The {label} is missing. Give a number from {low} to {high}.")
    if not low <= value <= high:  # also for NaN
        raise FieldError(name, f"The {label} is {value}. Give a number from {low} to {high}.")
    if name in ("guidance", "lora_scale"):
        return float(value)
    if value != int(value):
        raise FieldError(name, f"The {label} is {value}. Give a whole number.")
    return int(value)


def _choice(form, name, offered, own):
    value = getattr(form, name)
    if value in (None, own):
        return None
    if value not in offered:
        raise FieldError(name, "This is not offered here. Choose one of the list.")
    return value


def _read_controls(form):
    for index, slot in enumerate(form.controls):
        if slot.kind == NO_CONTROL:
            continue
        name = f"control_{index + 1}"
        with at(name):
            control = find_control(slot.kind)
            if slot.picture is None:
                raise FieldError(
                    name, f"The control {slot.kind!r} needs a picture. Drop one, or choose none."
                )
            if control.needs_mask and not slot.ready:
                raise FieldError(name, "Paint over what is to be filled: these strokes are the mask.")
            numbers = {key: float(getattr(slot, key)) for key in ("scale", "start", "end")}
            yield ControlInput(slot.kind, slot.picture, ready=slot.ready, **numbers)
