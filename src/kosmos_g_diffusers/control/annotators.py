"""What makes control images: detectors of controlnet_aux (extra `control`) and, where it has none, models of transformers.

Each `load_...(weights, device)` returns a function (RGB PIL image, keywords of the annotator) -> PIL image of the same
shape. `weights` is a Hub id or a folder. Everything is imported where it is used.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import torch

from ..quiet import brief_bars

Annotator = Callable[..., PIL.Image.Image]  # of an RGB PIL image and the annotator's keywords

INSTALL = "pip install 'kosmos-g-diffusers[control]'"
SIDE_MULTIPLE = 64  # controlnet_aux rounds both sides of what it looks at to this
SIZES = ("detect_resolution", "image_resolution")  # its keywords for the shorter side


def aux_module(name: str) -> ModuleType:
    """A module of controlnet_aux, without what `import controlnet_aux` does besides.

    The package imports every annotator at once: seconds, a dozen warnings, replaced entries in timm's registry, and none
    of them works once a dependency of one is missing or has moved. So its module is imported alone, by another name.

    Raises:
        ImportError: controlnet_aux, or what the module needs, is not installed.
    """
    alias = f"{__package__}._controlnet_aux"
    if alias not in sys.modules:
        spec = importlib.util.find_spec("controlnet_aux")
        if spec is None:
            raise ImportError(f"This control needs controlnet_aux, which is not installed. Run: {INSTALL}")
        package = types.ModuleType(alias)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[alias] = package
    try:
        with _quiet():
            return importlib.import_module(f"{alias}.{name}")
    # RuntimeError: torchvision next to another torch than its own
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"controlnet_aux.{name} cannot be imported ({error}). Install what it needs: {INSTALL}"
        ) from error


@contextlib.contextmanager
def _quiet():
    """Keep from the user what controlnet_aux says of itself while it loads."""
    # NormalBae prints its progress
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", ".*scipy.ndimage.filters", DeprecationWarning)
        # its category differs between releases
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated")
        yield


def _detect(detector, image, resolution=None, sizes=SIZES, **arguments):
    """Let a detector of controlnet_aux look at `image`, its shorter side `resolution` pixels (None: as it is).

    A detector bends what it looks at to sides of multiples of 64. So it gets an image that has such sides, mirrored at
    the right and at the bottom, and what it finds there is cut off.
    """
    scale = 1 if resolution is None else resolution / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    array = np.asarray(image.resize((width, height), PIL.Image.Resampling.LANCZOS))
    margins = ((0, -height % SIDE_MULTIPLE), (0, -width % SIDE_MULTIPLE), (0, 0))
    array = np.pad(array, margins, mode="symmetric")
    arguments.update(dict.fromkeys(sizes, min(array.shape[:2])))
    found = PIL.Image.fromarray(np.asarray(detector(array, **arguments)))
    return found.crop((0, 0, width, height))


def load_detector(path: str, weights: str | Path | None, device: str | torch.device) -> Annotator:
    """A detector of controlnet_aux, `path` as in "canny.CannyDetector"; weights None for one that has none."""
    module, _, class_name = path.partition(".")
    detector_class = getattr(aux_module(module), class_name)
    if weights is None:
        return functools.partial(_detect, detector_class())
    with _quiet():
        detector = detector_class.from_pretrained(weights)
    return functools.partial(_detect, detector.to(device))


def load_lineart_standard(weights: str | Path | None, device: str | torch.device) -> Annotator:
    detector = aux_module("lineart_standard").LineartStandardDetector()
    return functools.partial(_detect, detector, sizes=SIZES[:1])  # it takes no second one


def load_shuffle(weights: str | Path | None, device: str | torch.device) -> Annotator:
    """Content shuffle, with a seed."""
    detector = aux_module("shuffle").ContentShuffleDetector()

    def shuffle(array, seed, **arguments):
        state = np.random.get_state()  # the detector draws from numpy's global generator and takes no other
        np.random.seed(seed)
        try:
            return detector(array, **arguments)
        finally:
            np.random.set_state(state)

    return functools.partial(_detect, shuffle)


def load_drawing(weights: str | Path | None, device: str | torch.device) -> Annotator:
    """White strokes on black from a drawing with dark strokes on white, at the threshold of ControlNet's own demo."""
    return lambda image: image.convert("L").point(lambda value: 255 if value < 127 else 0)


def load_depth(weights: str | Path | None, device: str | torch.device) -> Annotator:
    """Depth from 0, the farthest, to 255, the nearest."""
    from transformers import pipeline

    estimator = pipeline("depth-estimation", model=weights, device=device)
    return lambda image: estimator(image)["depth"]


@brief_bars()
def load_segmentation(weights: str | Path | None, device: str | torch.device) -> Annotator:
    """Each pixel in the ADE20K colour of its class, by UPerNet."""
    from transformers import AutoImageProcessor, UperNetForSemanticSegmentation

    palette = np.array(aux_module("util").ade_palette(), dtype=np.uint8)  # (150, 3)
    model = UperNetForSemanticSegmentation.from_pretrained(weights).to(device)
    processor = AutoImageProcessor.from_pretrained(weights)

    @torch.no_grad()
    def segment(image):
        output = model(**processor(image, return_tensors="pt").to(device))
        sizes = [(image.height, image.width)]
        classes = processor.post_process_semantic_segmentation(output, target_sizes=sizes)[0]
        return PIL.Image.fromarray(palette[classes.cpu().numpy()])

    return segment
