"""The fields of the page: what each may hold, the presets, how their values become settings, and settings values again."""

import base64
import contextlib
import io
import os
import re
import secrets
from pathlib import Path
from typing import Any

import PIL.Image
from safetensors import SafetensorError

from ..control.table import find_control
from ..generation.png import NoSettings, read_settings
from ..generation.schedulers import SCHEDULERS
from ..generation.settings import (
    IMAGE_MARK,
    IMAGE_WORD_PATTERN,
    STRENGTH,
    ControlInput,
    GenerationSettings,
    LoraInput,
)
from ..maps.boxes import read_region, region_text
from ..serving.errors import FieldError, at
from ..serving.image_words import read_words
from ..serving.images import (
    DECODING,
    MAX_FILES,
    SMALL_PIXELS,
    check_image_file,
    image_file_size,
    open_image_file,
    open_shrunk,
)
from ..serving.libraries import controlling
from ..serving.limits import LIMITS, MAX_PROMPT
from ..serving.models import NO_LORA, OWN, Models
from ..serving.session import MAX_WORDS, Session
from ..serving.store import Store

CONTROL_SLOTS = 3
PAINTED_SIDE = (
    2048  # pixels of an image that was painted on, at most; nothing here is drawn larger than half of that
)
NO_CONTROL = "none"
# fields of a slot, and what each starts with
CONTROL_FIELDS: dict[str, Any] = {"kind": NO_CONTROL, "picture": None, "strokes": "", "ready": False}
CONTROL_FIELDS |= {"scale": 1.0, "start": 0.0, "end": 1.0}
LORA_SLOTS = 4
# fields of a LoRA and of its scale, for each slot
LORAS = [(name, f"{name}_scale") for name in ("lora", *(f"lora_{slot}" for slot in range(2, LORA_SLOTS + 1)))]
LABELS = {"num_images": "number of images", "steps": "number of steps", "lora_scale": "LoRA scale"}
DEFAULTS: dict[str, Any] = {
    "num_images": 1,
    "steps": 30,
    "guidance": 7.5,
    "scheduler": OWN,
    "binding": 0.0,
    "strength": STRENGTH,
}
# what the small model's scores were drawn with
SMALL_FAST: dict[str, Any] = {"steps": 12, "guidance": 5.0, "scheduler": "dpm"}
OWN_SIZE, OTHER_SIZE = "own", "other"  # choices of the size of an image, besides WIDTHxHEIGHT
SHAPES = ((4, 5), (5, 4), (2, 3), (3, 2))
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 15, "guidance": 6.0, "scheduler": "dpm"},
    "paper": {"steps": 100, "guidance": 7.5, "scheduler": "dpm"},  # DreamBench: 100 steps of DPM-Solver
}


def defaults(is_small: bool) -> dict[str, Any]:
    """What the page starts with, for a small model or another."""
    return {**DEFAULTS, **SMALL_FAST} if is_small else DEFAULTS


def presets(is_small: bool) -> dict[str, dict[str, Any]]:
    """Values of fields, by the name of a preset."""
    return {**PRESETS, "fast": SMALL_FAST} if is_small else PRESETS


def sizes(side: int | None) -> list[tuple[str, str]]:
    """What is offered as the size of an image, for a model that draws `side` pixels a side: (label, choice), its own first."""
    if side is None:
        return [("the model's own", OWN_SIZE), ("another size", OTHER_SIZE)]
    offered = [(f"{side} x {side}, the model's own", OWN_SIZE)]
    for width, height in SHAPES:
        # the shorter side is the model's: it knows no smaller parts of images
        width, height = (round(side * part / min(width, height) / 8) * 8 for part in (width, height))
        offered.append((f"{width} x {height}", f"{width}x{height}"))
    return [*offered, ("another size", OTHER_SIZE)]


def size_choice(width: int | None, height: int | None, side: int | None) -> str:
    """The choice of `sizes` that a width and a height are."""
    if not width and not height:
        return OWN_SIZE
    choice = f"{width}x{height}"
    return choice if choice in dict(map(reversed, sizes(side))) else OTHER_SIZE


def read_values(values: dict[str, Any], session: Session, models: Models, store: Store) -> GenerationSettings:
    """Values of the page by name -> GenerationSettings, whose model, U-Net and LoRA are names and not paths.

    The images are kept in the store.

    Raises:
        FieldError: with the field that is to be fixed.
    """
    paths = values.get("pictures") or ()
    if len(paths) > MAX_FILES:
        raise FieldError("pictures", f"A prompt may have {MAX_FILES} images, and {len(paths)} were given.")
    controls = []
    for field in (f"control_{slot}" for slot in range(1, CONTROL_SLOTS + 1)):
        slot = {name: values.get(f"{field}_{name}", start) for name, start in CONTROL_FIELDS.items()}
        controls.append(read_control(field, store, **slot))
    images = tuple(store.keep_upload(path, "pictures") for path in paths)
    changed = _read_change(values, store)
    prompt, negative_prompt = (values.get(name) or "" for name in ("prompt", "negative_prompt"))
    words = session.words_of(values.get("model") or models.default)
    _check_prompts(prompt, negative_prompt, len(images), words)
    numbers = {name: _number(values, name) for name in ("num_images", "steps", "guidance")}
    # a client that was written before it was there leaves it out
    numbers["binding"] = 0.0 if values.get("binding") is None else _number(values, "binding")
    for name in ("width", "height"):  # 0: the model's own
        side = numbers[name] = _number(values, name) if values.get(name) else None
        if side is not None and side % 8:
            low = side // 8 * 8
            raise FieldError(name, f"The {name} is {side} pixels. Take a multiple of 8: {low} or {low + 8}.")
    model = _choice(values, "model", models.models) or models.default
    chosen = {
        "model": None if models.is_builtin(model) else model,
        "unet": _choice(values, "unet", models.unets, OWN),
        "scheduler": _choice(values, "scheduler", SCHEDULERS, OWN),
    }
    used = [words[word] for word in IMAGE_WORD_PATTERN.findall(prompt) if word in words]
    # -1 as in other pages
    is_seed_drawn = values.get("surprise") or values.get("seed") in (None, -1)
    loras = GenerationSettings.lora_fields(_read_loras(values, models))
    with at("run"):
        return GenerationSettings(
            prompt=prompt,
            images=images,
            controls=tuple(control for control in controls if control),
            negative_prompt=negative_prompt or None,
            image_words=tuple(dict.fromkeys(used)),
            seed=secrets.randbelow(2**32) if is_seed_drawn else _number(values, "seed"),
            device=models.device,
            dtype=models.dtype,
            quantize=models.quantize,
            regions=_read_regions(values.get("regions") or ""),
            **chosen,
            **changed,
            **loras,
            **numbers,
        )


def _read_change(values, store):
    """Settings of the image that is changed, which is kept in the store with its mask; none where there is no image."""
    path, mask = values.get("init_image"), read_strokes(values.get("mask") or "", "init_image")
    if path is None:
        if mask is not None:
            raise FieldError(
                "init_image", "A mask was painted without an image. Drop the image to be changed."
            )
        return {}
    changed: dict[str, Any] = {"init_image": store.keep_upload(path, "init_image")}
    if values.get("strength") is not None:
        changed["strength"] = _number(values, "strength")
    if mask is not None:
        changed["mask"] = store.keep_drawn(mask.point(lambda value: 255 if value > 127 else 0))
    return changed


def _read_loras(values, models):
    """A LoraInput of each slot in which one is chosen."""
    loras = {}
    for field, scale in LORAS:
        name = _choice(values, field, models.loras, NO_LORA)
        if name is None:
            continue
        if name in loras:
            raise FieldError(field, f"The LoRA {name!r} is chosen twice. Give it one scale.")
        given = {"lora_scale": 1.0 if values.get(scale) is None else values[scale]}
        loras[name] = LoraInput(name, _number(given, "lora_scale", scale))
    return tuple(loras.values())


def read_control(
    field: str,
    store: Store,
    kind: str,
    picture: str | None,
    strokes: str,
    ready: bool,
    scale: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
) -> ControlInput | None:
    """Values of a slot of the controls panel -> ControlInput; None where no kind of control is chosen.

    The image is kept in the store, with what was painted on it.

    Args:
        field: whose mistakes these are.
        picture: path of an uploaded image, or None.
        strokes: PNG as a data: URI, or an empty text. For inpaint they are the mask, otherwise black.

    Raises:
        FieldError: the image or the strokes cannot be read, or there are none.
    """
    if kind in (None, NO_CONTROL):
        return None
    with at(field):
        is_masked = find_control(kind).needs_mask and not ready
        strokes = read_strokes(strokes, field)
        if strokes is not None:
            kept = store.keep_drawn(_painted(kind, picture, strokes, is_masked, field))
            ready = ready or is_masked
        elif is_masked:
            raise FieldError(field, "Paint over what is to be filled: the strokes are the mask.")
        elif picture is None:
            raise FieldError(field, f"The control {kind!r} needs an image. Drop one, or choose none.")
        else:
            kept = store.keep_upload(picture, field)
        numbers = {"scale": float(scale), "start": float(start), "end": float(end)}
        return ControlInput(kind, kept, ready=bool(ready), **numbers)


def _painted(kind, picture, strokes, is_masked, field):
    """The image with the strokes on it; where they are a mask, the control image with their holes."""
    if picture is None:
        shown = PIL.Image.new("RGB", strokes.size, "white")
    else:
        with DECODING:
            shown = open_image_file(picture, field)
            shown.thumbnail((PAINTED_SIDE, PAINTED_SIDE))
    strokes = strokes.resize(shown.size)
    if not is_masked:
        shown.paste("black", mask=strokes)
        return shown
    mask = strokes.point(lambda value: 255 if value > 127 else 0)
    controls = controlling()
    return controls.control_preview(controls.control_image(kind, shown, mask=mask))


def read_strokes(text: str, field: str) -> PIL.Image.Image | None:
    """PNG as a data: URI -> L image, light where something was painted; None for nothing. FieldError for anything else."""
    head, _, body = text.partition(",") if isinstance(text, str) else (text, "", "")
    if not body and (not text or isinstance(text, str)):
        return None
    try:
        if head != "data:image/png;base64":
            raise ValueError(head)
        file = io.BytesIO(base64.b64decode(body, validate=True))
    except ValueError:
        raise FieldError(field, "The strokes did not arrive as a PNG. Paint them again.") from None
    check_image_file(file, field)
    width, height = image_file_size(file)
    if width * height > SMALL_PIXELS:
        raise FieldError(
            field,
            f"The strokes have {width} x {height} pixels; {SMALL_PIXELS // 1_000_000} million are possible. They are scaled to "
            "the image: send them smaller.",
        )
    alpha = open_image_file(file, field, with_alpha=True).getchannel("A")
    return alpha if alpha.getbbox() else None


def strokes_of(path: str | Path) -> str:
    """A mask that was kept -> what `read_strokes` reads: black where it is light."""
    mask = open_shrunk(path, "restore", PAINTED_SIDE).convert("L")
    strokes = PIL.Image.new("LA", mask.size)
    strokes.putalpha(mask)
    file = io.BytesIO()
    strokes.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def count_line(prompt: str, n_images: int) -> tuple[str, bool]:
    """What the prompt still needs, such as "2 <i>, 1 image: one image is missing"; and whether all is there."""
    n_marks = prompt.count(IMAGE_MARK)
    line = f"{n_marks} {IMAGE_MARK}, {n_images} {'image' if n_images == 1 else 'images'}"
    missing = n_marks - n_images
    if n_marks > MAX_FILES:
        return f"{line}: at most {MAX_FILES} are possible.", False
    if missing > 0:
        what = "one image is" if missing == 1 else f"{missing} images are"
        return f"{line}: {what} missing. Drop an image for each {IMAGE_MARK}.", False
    if missing < 0:
        what = f"one {IMAGE_MARK} is" if missing == -1 else f"{-missing} {IMAGE_MARK} are"
        return f"{line}: {what} missing. Write {IMAGE_MARK} where an image belongs.", False
    return line, True


def _check_prompts(prompt, negative_prompt, n_images, words):
    if not prompt.strip():
        raise FieldError("prompt", f"Write what to draw, with {IMAGE_MARK} for each image.")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if len(text) > MAX_PROMPT:
            raise FieldError(name, f"This text has {len(text)} characters; at most {MAX_PROMPT} are taken.")
        if "\0" in text:
            raise FieldError(name, "This text has a null character in it. Write it without.")
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise FieldError(name, "This text has half of a surrogate pair in it, which is not a character.")
    line, complete = count_line(prompt, n_images)
    if not complete:
        raise FieldError("prompt", line)
    used = IMAGE_WORD_PATTERN.findall(prompt)
    if unknown := [word for word in used if word not in (*words, IMAGE_MARK)]:
        known = f"This session knows {', '.join(words)}." if words else "This session knows none yet."
        raise FieldError("prompt", f"{unknown[0]} is not an image word. {known} Make it one below.")


def _number(values, name, field=None):
    """The number `name`, within its limits; a mistake belongs to `field`, which has that name unless another is given."""
    value, (low, high) = values.get(name), LIMITS[name]
    label, field = LABELS.get(name, name), field or name
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(field, f"The {label} is missing. Give a number from {low} to {high}.")
    if not low <= value <= high:  # also for NaN
        raise FieldError(field, f"The {label} is {value}. Give a number from {low} to {high}.")
    if name in ("guidance", "lora_scale", "binding", "strength"):
        return float(value)
    if value != int(value):
        raise FieldError(field, f"The {label} is {value}. Give a whole number.")
    return int(value)


def _read_regions(text):
    """Boxes or "none" in words, separated by spaces or semicolons -> regions of the settings. FieldError."""
    with at("regions"):
        return tuple(map(read_region, re.split(r"[;\s]+", text.strip()))) if text.strip() else ()


def _choice(values, name, offered, own=None):
    value = values.get(name)
    if value in (None, own):
        return None
    if not isinstance(value, str) or value not in offered:
        raise FieldError(name, "This is not offered here. Choose one of the list.")
    return value


# From a PNG that was dropped on the page to values again -----------------------------------------------------------


def restore_values(
    path: str | Path, session: Session, models: Models, store: Store, has_controls: bool
) -> tuple[dict[str, Any], list[str]]:
    """Values of the fields by name, from the settings in a PNG; the session learns its image words.

    Args:
        has_controls: whether the page shows them.

    Returns:
        (values, notes for the user on what is not here); a model that is not offered is not among them.

    Raises:
        FieldError: no such PNG.
    """
    settings, notes = _read(path), []
    model = settings.model
    if model is None and models.is_builtin(models.default):
        model = models.default
    if model is None:
        notes.append("It was made with the small model that ships, which is not offered here.")
    # lent under names that nobody can guess: what a file is called among the inputs says what it holds
    images = [_lend(store, image) for image in settings.images]
    control_images = [_lend(store, control.picture) for control in settings.controls]
    changed = [_lend(store, file) for file in (settings.init_image, settings.mask) if file is not None]
    if lost := [*images, *control_images, *changed].count(None):
        notes.append(f"{lost} of its images are not on this server: drop them again.")
    for what, name, offered in (
        ("model", model, models.models),
        ("U-Net", settings.unet, models.unets),
        *(("LoRA", lora.path, models.loras) for lora in settings.all_loras),
    ):
        if name is not None and name not in offered:
            notes.append(f"Its {what} is not offered here.")
    if any(control.controlnet for control in settings.controls):
        notes.append("It was made with a ControlNet of its own, which is not offered here.")
    loras = [lora for lora in settings.all_loras if lora.path in models.loras]
    if len(loras) > LORA_SLOTS:
        notes.append(f"It was made with {len(loras)} LoRAs; the first {LORA_SLOTS} are here.")
    _restore_words(settings, session, models, store, notes)
    names = ("prompt", "num_images", "steps", "guidance", "seed", "binding")
    values = {
        **{name: getattr(settings, name) for name in names},
        "pictures": [os.path.relpath(image) for image in images if image] or None,
        "negative_prompt": settings.negative_prompt or "",
        "regions": " ".join(map(region_text, settings.regions)),
        "unet": settings.unet if settings.unet in models.unets else OWN,
        "init_image": os.path.relpath(changed[0]) if changed and changed[0] else None,
        "mask": strokes_of(changed[1]) if len(changed) > 1 and all(changed) else "",
        "strength": STRENGTH if settings.strength is None else settings.strength,
        "width": settings.width or 0,
        "height": settings.height or 0,
        "surprise": False,
        "scheduler": settings.scheduler or OWN,
    }
    for index, (field, scale) in enumerate(LORAS):
        lora = loras[index] if index < len(loras) else LoraInput(NO_LORA)
        values |= {field: lora.path, scale: lora.scale}
    if model in models.models:
        values["model"] = model
    offered = models.controls(values.get("model", models.default)) if has_controls else ()
    missing = sorted({control.name for control in settings.controls} - set(offered))
    if missing:
        notes.append(f"Controls that are not offered here: {', '.join(missing)}.")
    if len(settings.controls) > CONTROL_SLOTS:
        notes.append(f"It has {len(settings.controls)} controls; the first {CONTROL_SLOTS} are here.")
    for slot in range(1, CONTROL_SLOTS + 1):
        restored = CONTROL_FIELDS
        if slot <= len(settings.controls) and settings.controls[slot - 1].name in offered:
            control, path = settings.controls[slot - 1], control_images[slot - 1]
            restored = {**restored, "kind": control.name, "picture": path and os.path.relpath(path)}
            restored.update({name: getattr(control, name) for name in ("ready", "scale", "start", "end")})
        values.update({f"control_{slot}_{name}": value for name, value in restored.items()})
    return values, notes


def _lend(store, file):
    path = store.find(file)
    return path and store.lend(path)


def _read(path):
    check_image_file(path, "restore")
    try:
        return read_settings(path)
    except ValueError as error:
        message = "The settings of this file cannot be read. Drop a PNG that was made here."
        if isinstance(error, NoSettings):
            message = "This file carries no settings. Drop one that was made here or with kosmos-g generate."
        raise FieldError("restore", message) from error


def _restore_words(settings, session, models, store, notes):
    for file in settings.image_words:
        path = store.find(file)
        if path is None:
            notes.append("An image word of it is not on this server: load or make it again.")
            continue
        with contextlib.suppress(OSError, SafetensorError):
            for word in read_words(path):
                if word not in session.words and len(session.words) < MAX_WORDS:
                    session.learn_words({word: file}, settings.model or models.default)
