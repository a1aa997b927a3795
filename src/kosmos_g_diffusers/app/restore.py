"""From a PNG that was dropped on the page to values of its fields: the inverse of form.py."""

import contextlib
import os

from safetensors import SafetensorError

from ..generation.png import read_settings
from ..serving.errors import FieldError
from ..serving.image_words import read_words
from ..serving.models import NO_LORA, OWN
from ..serving.session import MAX_WORDS
from ..serving.store import check_image_file
from .form import CONTROL_FIELDS, CONTROL_SLOTS


def restore_values(path, session, models, store, has_controls):
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
    images = [store.find(image) for image in settings.images]
    control_images = [store.find(control.picture) for control in settings.controls]
    if lost := [*images, *control_images].count(None):
        notes.append(f"{lost} of its images are not on this server: drop them again.")
    for what, name, offered in (
        ("model", model, models.models),
        ("U-Net", settings.unet, models.unets),
        ("LoRA", settings.lora, models.loras),
    ):
        if name is not None and name not in offered:
            notes.append(f"Its {what} is not offered here.")
    if any(control.controlnet for control in settings.controls):
        notes.append("It was made with a ControlNet of its own, which is not offered here.")
    _restore_words(settings, session, models, store, notes)
    names = ("prompt", "lora_scale", "num_images", "steps", "guidance", "seed")
    values = {
        **{name: getattr(settings, name) for name in names},
        "pictures": [os.path.relpath(image) for image in images if image] or None,
        "negative_prompt": settings.negative_prompt or "",
        "unet": settings.unet if settings.unet in models.unets else OWN,
        "lora": settings.lora if settings.lora in models.loras else NO_LORA,
        "width": settings.width or 0,
        "height": settings.height or 0,
        "surprise": False,
        "scheduler": settings.scheduler or OWN,
    }
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


def _read(path):
    check_image_file(path, "restore")
    try:
        return read_settings(path)
    except ValueError as error:
        message = "The settings of this file cannot be read. Drop a PNG that was made here."
        if "carries no settings" in str(error):
            message = "This PNG carries no settings. Drop one that was made here or with kosmos-g generate."
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
