"""Control images: from an image and the name of a control to what a ControlNet of Stable Diffusion 1.5 reads.

Nothing is fetched before it is used. Images are RGB, [0, 255].
"""

import functools
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import ControlNetModel
from diffusers.utils import logging

from ..fields import check_value
from ..files import first_line, written_atomically
from ..loading import load_pretrained, load_single_file
from ..processing_kosmos_g import ImageLike, open_image, open_mask, read_image
from . import annotators
from .table import CONTROLS, find_control

ControlImage = PIL.Image.Image | torch.Tensor  # a tensor for inpaint, whose holes are -1

logger = logging.get_logger(__name__)

SIDE_MULTIPLE = 8  # image pixels along a side of a latent pixel
MAX_SIDE_RATIO = 8  # a thinner image, scaled to a short side of 512, would have many millions of pixels


# Control images -------------------------------------------------------------------------------------------------


def load_annotator(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> annotators.Annotator | None:
    """Load what makes the control image `name`, for several calls of `control_image`.

    Args:
        weights: folder with the files of `CONTROLS[name].files`, or another Hub id; None is `CONTROLS[name].weights`.

    Returns:
        A function (RGB PIL image, keywords of the annotator) -> PIL image; None where the image itself is the control.

    Raises:
        ValueError: an unknown name, or weights that cannot be fetched or read.
        ImportError: controlnet_aux, or something that it needs, is not installed.
    """
    control = find_control(name)
    if weights is not None and control.weights is None:
        raise ValueError(f"The control {name!r} reads no weights, and {str(weights)!r} was given.")
    if control.annotator is None:
        return None
    if "." in control.annotator:
        load = functools.partial(annotators.load_detector, control.annotator)
    else:
        load = getattr(annotators, control.annotator)
    source = control.weights if weights is None else str(weights)
    try:
        return load(source, device)
    except ImportError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        command = " ".join(["hf download", control.weights, *control.files])
        raise ValueError(
            f"The weights of the control {name!r} cannot be loaded from {source!r} ({first_line(error)}). Pass a folder with its "
            f"files as weights, or run where there is a network: {command}"
        ) from error


def control_image(
    name: str,
    image: ImageLike,
    *,
    mask: ImageLike | None = None,
    height: int | None = None,
    width: int | None = None,
    short_side: int | None = None,
    annotator: annotators.Annotator | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    **parameters: Any,
) -> ControlImage:
    """Make the control image `name` of an image.

    It has the image's own size, both sides rounded down to multiples of 8 as diffusers rounds, or the size that
    `control_size` makes of the image, `height`, `width` and `short_side`. The image is resized to it, never cropped.

    Args:
        name: of CONTROLS.
        image: PIL image, path, URL, array or tensor, as for `open_image`.
        mask: for inpaint; an image of the same size, white where something new belongs, see `open_mask`.
        annotator: from `load_annotator(name)`; None loads it for this call, with `weights` and `device`.
        parameters: those of `CONTROLS[name].parameters`.

    Returns:
        An RGB PIL image. For inpaint a float32 tensor (1, 3, height, width) in [0, 1], with -1 in the holes, which no
        PIL image can hold; `control_preview` makes one of it. The pipelines take both.

    Raises:
        ValueError, TypeError: an unknown name or parameter, a value out of range, an image, mask or size that cannot be
            used, or weights that cannot be loaded.
        ImportError: the extra `control` is not installed.
    """
    control = find_control(name)
    unknown = sorted(set(parameters) - set(control.parameters))
    if unknown:
        raise ValueError(
            f"The control {name!r} has no parameter {', '.join(unknown)}. It has: {', '.join(control.parameters) or 'none'}."
        )
    arguments = dict(control.arguments)
    for key, parameter in control.parameters.items():
        value = parameters.get(key, parameter.default)
        kind = type(parameter.default)
        check_value(f"{key} of the control {name!r}", value, kind, parameter.low, parameter.high)
        arguments[parameter.keyword or key] = value
    if control.needs_mask and mask is None:
        raise ValueError(f"The control {name!r} needs a mask: an image, white where it is to be filled.")
    if mask is not None and not control.needs_mask:
        raise ValueError(f"The control {name!r} takes no mask, and one was given.")
    image = open_image(image, f"The image of the control {name!r}")
    if mask is not None:
        mask = read_image(mask, f"The mask of the control {name!r}", any_channels=True)
        if mask.size != image.size:
            raise ValueError(
                f"The mask of the control {name!r} is {_text(mask.size)} pixels, its image {_text(image.size)}. Pass a "
                "mask of the image's size."
            )
        mask = open_mask(mask, f"The mask of the control {name!r}")
    height, width = control_size(image, height, width, short_side)
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    if mask is not None:
        mask = mask.resize((width, height), PIL.Image.Resampling.NEAREST)
        if mask.getextrema()[1] <= 127:
            raise ValueError(
                f"The mask of the control {name!r} has no hole: nothing in it is light. Paint white what is to be filled."
            )
        return _with_holes(image, mask)
    if control.annotator is None:
        return image
    if annotator is None:
        annotator = load_annotator(name, weights, device)
    result = annotator(image, **arguments).convert("RGB")
    if result.size != (width, height):
        result = result.resize((width, height), PIL.Image.Resampling.BILINEAR)
    if all(low == high for low, high in result.getextrema()):
        logger.warning(f"The control {name!r} found nothing: the control image is a single colour.")
    return result


def control_size(
    image: PIL.Image.Image,
    height: int | None = None,
    width: int | None = None,
    short_side: int | None = None,
    unfit: str = "makes no control image",
) -> tuple[int, int]:
    """Size for the control image of a PIL image -> (height, width), multiples of 8, of the image's shape.

    Args:
        height, width: of the image to be made; what is not given follows from the other.
        short_side: without both, pixels of the shorter side; None takes the image's own.
        unfit: what an error says of an image that is too small or too thin.

    Raises:
        ValueError: the size is not a multiple of 8 or of another shape than the image, or the image is too small or too
            thin.
    """
    sides = (image.height, image.width)
    if min(sides) < SIDE_MULTIPLE or max(sides) > MAX_SIDE_RATIO * min(sides):
        raise ValueError(
            f"An image of {_text(image.size)} pixels {unfit}. Pass one with sides of at least "
            f"{SIDE_MULTIPLE} pixels, the longer at most {MAX_SIDE_RATIO} times the shorter."
        )
    given, multiple = (height, width), SIDE_MULTIPLE
    for side in (*given, short_side):
        if side is not None and (side < multiple or side % multiple):
            raise ValueError(f"A side of {side} pixels was asked for; expected a multiple of {multiple}.")
    if given == (None, None):
        scale = (min(sides) if short_side is None else short_side) / min(sides)
    else:
        scale = next(side / own for side, own in zip(given, sides, strict=True) if side is not None)
    exact = [own * scale for own in sides]
    fitting = [max(1, math.floor(side / multiple + 1e-6)) * multiple for side in exact]
    for index, side in enumerate(given):
        if side is not None and abs(side - exact[index]) >= multiple:
            raise ValueError(
                f"An image of {width} x {height} pixels was asked for, and the image given for it, {_text(image.size)}, "
                f"has another shape: {fitting[1]} x {fitting[0]} fits. Ask for that, or crop the image."
            )
    return tuple(own if side is None else side for side, own in zip(given, fitting, strict=True))


def open_control(name: str, image: ImageLike) -> ControlImage:
    """A control image that is ready, as `control_image` returns it; for inpaint its transparent pixels are the holes.

    Raises:
        ValueError: an unknown name, an image that cannot be read, sides that are no multiples of 8, or no holes.
    """
    control = find_control(name)
    upright = read_image(image, f"The control image for {name!r}")
    if upright.width % SIDE_MULTIPLE or upright.height % SIDE_MULTIPLE:
        raise ValueError(
            f"The control image for {name!r} is {_text(upright.size)} pixels; expected multiples of {SIDE_MULTIPLE}. Make it "
            f"with: kosmos-g control {name} IMAGE"
        )
    if not control.needs_mask:
        return open_image(upright, f"The control image for {name!r}")
    rgba = upright.convert("RGBA") if upright.has_transparency_data else None
    if rgba is None or rgba.getchannel("A").getextrema()[0] > 127:
        raise ValueError(
            f"The control image for {name!r} has no transparent pixels, and those are what is filled. Make it with: "
            f"kosmos-g control {name} IMAGE --mask MASK"
        )
    return _with_holes(rgba.convert("RGB"), PIL.ImageOps.invert(rgba.getchannel("A")))


def control_preview(control: ControlImage) -> PIL.Image.Image:
    """What `control_image` returned -> PIL image to look at or to save as PNG; the holes of inpaint are transparent."""
    if isinstance(control, PIL.Image.Image):
        return control
    holes = (control[0] < 0).all(dim=0)
    rgba = torch.cat([control[0].clamp(min=0), (~holes)[None].float()])
    return PIL.Image.fromarray((rgba * 255).round().byte().permute(1, 2, 0).numpy(), "RGBA")


def save_control(control: ControlImage, path: str | Path, overwrite: bool = False) -> None:
    """Write what `control_image` returned as a PNG, atomically.

    Raises:
        FileExistsError: `path` is there already and `overwrite` is False.
    """
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} is there already and was not overwritten.")
    with written_atomically(path) as file:
        control_preview(control).save(file, format="PNG")


def _with_holes(image, mask):
    """RGB and L image of one size -> (1, 3, H, W) in [0, 1], -1 where the mask is light."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    return torch.where(torch.from_numpy(np.array(mask)) > 127, -1.0, values)


# ControlNets ----------------------------------------------------------------------------------------------------


def load_controlnet(source: str | Path, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    """Load the ControlNet of a control of the table, or of a folder, a .safetensors file or a Hub id.

    Raises:
        ValueError: an unknown name, or a ControlNet that cannot be fetched or read.
    """
    repo = CONTROLS[source].controlnet if source in CONTROLS else str(source)
    if repo == source and not Path(source).exists() and repo.count("/") != 1:
        known = ", ".join(CONTROLS)
        raise ValueError(f"{source!r} is not a folder, a Hub id or a control. Known controls: {known}.")
    try:
        if Path(repo).is_file():
            return load_single_file(ControlNetModel, repo, dtype=dtype)
        return load_pretrained(ControlNetModel, repo, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The ControlNet {repo!r} cannot be loaded ({first_line(error)}). If it is on the Hub, run where there is a "
            f"network: hf download {repo}"
        ) from error


def _text(size):
    return f"{size[0]} x {size[1]}"
