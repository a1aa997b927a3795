"""Drawing several requests together: prompts are encoded together, then what is of one kind is drawn together.

An image of a batch has a generator of its own, so that it is the one that is drawn alone, but for rounding.
"""

import io
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..control.controls import control_size
from ..environment import package_versions
from ..generation.generate import (
    UNCHANGEABLE,
    call_arguments,
    finite_images,
    own_size,
    read_mask,
    size_arguments,
)
from ..generation.settings import GenerationSettings
from ..serving.errors import FieldError, at
from ..serving.images import DECODING, FORMATS, image_file_size, open_image_file
from ..serving.job import check_side
from ..serving.models import Models
from ..serving.queue import Cancelled
from .requests import Request

Drawn = list[tuple[PIL.Image.Image, GenerationSettings]]

MOST_PROMPTS = 32  # that are encoded together
OF_IMAGES = ("image", "control_image", "mask_image")  # arguments of a pipeline that each image has its own of


def prepare(models: Models, request: Request) -> None:
    """Decode what a request changes and is controlled by, and make it as small as it is drawn. Any thread may.

    Raises:
        FieldError: an image does not fit.
    """
    settings = request.settings
    for control, content in zip(settings.controls, request.control_files, strict=True):
        if control.ready:
            check_side("controls", *(image_file_size(io.BytesIO(content)) or (0, 0)))
    pipe = models.pipe
    if pipe is None:
        raise FieldError("model", "The model is not loaded.")
    field = "init_image" if request.changed_files else "controls" if request.control_files else "size"
    with DECODING, at(field):
        opened = _open_files(request, min(own_size(pipe)))
        request.arguments = size_arguments(pipe, settings, *opened)
    request.control_files = request.changed_files = []
    sides = request.arguments["height"], request.arguments["width"]
    check_side("size", *sides)
    # memory grows with the pixels of all images of a batch
    request.image_places = math.ceil(math.prod(sides) / math.prod(own_size(pipe)))


def _open_files(request, short_side):
    """(control images, image to change and mask), all but one of them as small as they are drawn, one after the other."""
    settings, changed = request.settings, []
    size = (settings.height, settings.width)
    if request.changed_files:
        image, *masks = request.changed_files
        for content in masks:
            with at("mask"):
                changed.append(_open_mask(content))
        changed.insert(0, open_image_file(io.BytesIO(image), "init_image"))
        size = control_size(changed[0], *size, short_side, UNCHANGEABLE)
    controls = list(zip(settings.controls, request.control_files, strict=True))
    if size == (None, None):
        ready = (image_file_size(io.BytesIO(content)) for control, content in controls if control.ready)
        size = next(ready, size[::-1])[::-1]
    opened = []
    for control, content in controls:
        image = open_image_file(io.BytesIO(content), "controls")
        if not control.ready:  # as the library begins with it
            fitting = control_size(image, *size, short_side)
            image = image.resize(fitting[::-1], PIL.Image.Resampling.LANCZOS)
        opened.append(image)
    return opened, changed


def _open_mask(content):
    """L image of a mask: a quarter of what it takes with its colours."""
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
        has_alpha = image.has_transparency_data
    mask = open_image_file(io.BytesIO(content), "mask", with_alpha=has_alpha)
    if not has_alpha:
        mask = mask.convert("L")
    return read_mask(mask)


def kind_of(request: Request) -> Hashable:
    """What requests have in common that are drawn together; those that are encoded alone are of one kind."""
    if not request.is_drawn:
        return "encoded alone"
    settings = request.settings
    return (
        (request.arguments["height"], request.arguments["width"]),
        (settings.steps, settings.scheduler, settings.guidance),
        (settings.model, settings.unet, settings.all_loras),
        (settings.strength, settings.init_image is not None, settings.mask is not None),
        tuple(
            (control.name, control.ready, control.controlnet, control.scale, control.start, control.end)
            for control in settings.controls
        ),
    )


def size_of(request: Request) -> int:
    """Places that a request takes in a batch: an image of the model's own size takes one, larger ones more."""
    return request.settings.num_images * request.image_places if request.is_drawn else 1


def draw_all(models: Models, requests: Sequence[Request], most: int) -> list[Any]:
    """Prepare, encode and draw requests of any kinds, for a batcher that is not ours.

    Returns:
        for each request what `Drawer.draw` returns, or the exception that it ended with.
    """
    for request in requests:
        try:
            if request.is_drawn:
                prepare(models, request)
        except Exception as error:  # noqa: BLE001  of this one alone
            request.error = error
    encode(models, requests)
    results: dict[int, Any] = {id(request): request.error or request.encoded for request in requests}
    kinds: dict[Hashable, list[Request]] = {}
    for request in requests:
        if request.error is None and request.is_drawn:
            kinds.setdefault(kind_of(request), []).append(request)
    for together in kinds.values():
        results |= {id(request): result for request, result in draw(models, together, most)}
    return [results[id(request)] for request in requests]


# The encoder -----------------------------------------------------------------------------------------------------------


def encode(models: Models, requests: Sequence[Request]) -> None:
    """Give requests their states; what is wrong with one becomes its `error` alone."""
    waiting = [request for request in requests if request.encoded is None and request.error is None]
    for start in range(0, len(waiting), MOST_PROMPTS):
        together = waiting[start : start + MOST_PROMPTS]
        try:
            _encode(models.pipe, together)
        except Exception as error:  # noqa: BLE001  a prompt that is too long, or too little memory for all
            if len(together) == 1:
                together[0].error = error
                continue
            for request in together:
                try:
                    _encode(models.pipe, [request])
                except Exception as error:  # noqa: BLE001
                    request.error = error


@torch.no_grad()
def _encode(pipe, requests):
    pipe.warns_outside_world = False  # that is for whoever writes prompts, and nobody of them reads the log
    prompts = [request.settings.prompt for request in requests]
    with at("prompt"):
        states, _ = pipe.encode_prompt(
            prompts,
            images=[request.images for request in requests],
            do_classifier_free_guidance=False,
        )
    # the same negative prompt of many is encoded once
    guided = [request for request in requests if not request.is_drawn or request.settings.guidance > 1]
    texts = list(dict.fromkeys(request.settings.negative_prompt or "" for request in guided))
    negative = {}
    if texts:
        with at("negative_prompt"):
            parsed = pipe.get_processor().parse(texts, marks_are_text=True, name="negative prompt")
            found, _ = pipe.encode_prompt(parsed, do_classifier_free_guidance=False)
            negative = dict(zip(texts, found, strict=True))
    for request, row in zip(requests, states, strict=True):
        other = negative.get(request.settings.negative_prompt or "") if request in guided else None
        request.encoded = (row[None], None if other is None else other[None])


# The denoiser ----------------------------------------------------------------------------------------------------------


def draw(
    models: Models,
    requests: Sequence[Request],
    most: int,
    check: Callable[[], None] = lambda: None,
    output_type: str = "np",
) -> Iterator[tuple[Request, Drawn | np.ndarray | Exception]]:
    """Draw encoded requests of one kind; yields each with its images and their settings, or with what went wrong with it.

    Args:
        most: places of a batch, see `size_of`.
        check: is called at each step, and raises to end all of it.
        output_type: "latent" yields latents (n, C, h, w) in the place of images.
    """
    pipe = models.prepare(requests[0].settings)
    pipe.warns_outside_world = False
    pipe.set_progress_bar_config(disable=True)
    rows = [(request, index) for request in requests for index in range(request.settings.num_images)]
    done: dict[int, list[Any]] = {id(request): [] for request in requests}
    most = max(1, most // requests[0].image_places)
    try:
        for start in range(0, len(rows), most):
            together = rows[start : start + most]
            for (request, _), image in zip(
                together, _draw_apart(pipe, together, check, output_type), strict=True
            ):
                found = done[id(request)]
                found.append(image)
                if len(found) == request.settings.num_images:
                    yield request, _finished(pipe, request, found, output_type)
    finally:
        # a run that ends in the middle leaves diffusers' offloading hooks where they were
        pipe.maybe_free_model_hooks()


def _draw_apart(pipe, rows, check, output_type):
    """An array or an exception for each row: what all together fail at, each is tried at alone."""
    try:
        return list(_call(pipe, rows, check, output_type))
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001  of one of them, or too little memory for all
        if len(rows) == 1:
            return [error]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [image for row in rows for image in _draw_apart(pipe, [row], check, output_type)]


def _call(pipe, rows, check, output_type):
    requests, first = [request for request, _ in rows], rows[0][0]
    arguments = dict(first.arguments)
    for name in OF_IMAGES:
        if name in arguments and len(rows) > 1:
            arguments[name] = [request.arguments[name] for request in requests]
    generators = [
        torch.Generator("cpu").manual_seed(request.settings.seed + index) for request, index in rows
    ]
    negative = [request.encoded[1] for request in requests]

    def at_step_end(pipe, step, timestep, tensors):
        check()
        return {}

    output = pipe(
        **call_arguments(pipe, first.settings, arguments),
        prompt_embeds=torch.cat([request.encoded[0] for request in requests]),
        negative_prompt_embeds=None if negative[0] is None else torch.cat(negative),
        generator=generators if len(rows) > 1 else generators[0],
        callback_on_step_end=at_step_end,
        output_type=output_type,
    )
    return output.images


def _finished(pipe, request, images, output_type):
    failed = next((image for image in images if isinstance(image, Exception)), None)
    if failed is not None:
        return failed
    if output_type == "latent":
        return torch.stack(images)
    settings, size = request.settings, {name: request.arguments[name] for name in ("height", "width")}
    seeds = [settings.seed + index for index in range(settings.num_images)]
    try:
        opened = finite_images(pipe, np.stack(images), seeds)
    except ValueError as error:
        return error
    made = {"num_images": 1, "versions": package_versions(), **size}
    return [
        (image, replace(settings, seed=seed, index=index, **made))
        for index, (seed, image) in enumerate(zip(seeds, opened, strict=True))
    ]
