"""What an image was made from: written into every PNG of `kosmos-g generate`, and read back from it.

The settings are one JSON object in the PNG's text chunk `kosmos_g`. A PNG may come from anywhere, so reading one runs
nothing and decodes no pixels: it takes JSON of known keys, types and ranges, and refuses the rest.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import diffusers
import PIL
import PIL.Image
import PIL.PngImagePlugin
import torch
import transformers
from diffusers.utils import make_image_grid

import kosmos_g_diffusers

from ..control.controls import find_control
from .schedulers import SCHEDULERS

PNG_KEY = "kosmos_g"
FORMAT_VERSION = 1  # of the JSON object; raise it when an older package would read a new one wrongly
IMAGE_MARK = "<i>"

DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential")
CHOICES = {"scheduler": tuple(SCHEDULERS), "dtype": DTYPES, "offload": OFFLOADS}
RANGES = {
    "seed": (0, 2**63 - 1),
    "num_images": (1, 1000),
    "steps": (1, 10_000),
    "guidance": (0, 1000),
    "lora_scale": (-10, 10),
    "height": (8, 8192),
    "width": (8, 8192),
    "index": (0, 999),
}
FILES = ("images", "image_words")  # fields of GenerationSettings that hold an InputImage for each file
CONTROL_KNOBS = ("controlnet", "scale", "start", "end")  # fields of a ControlInput that a flag sets
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d{1,3})?")
MAX_TEXT = 100_000  # characters of a prompt or path


@dataclass(frozen=True)
class InputImage:
    """A file that a prompt needs, mostly a picture: where it was read, as the user wrote it, and what it held."""

    path: str
    sha256: str

    def __post_init__(self):
        _check_text("path of an input image", self.path)
        if (
            not isinstance(self.sha256, str)
            or len(self.sha256) != 64
            or set(self.sha256) - set("0123456789abcdef")
        ):
            raise ValueError(f"sha256 of {self.path!r} is no SHA-256 of 64 lower-case hexadecimal digits.")

    @classmethod
    def from_file(cls, path):
        """Raises ValueError if there is no file at `path`."""
        if not Path(path).is_file():
            raise ValueError(
                f"There is no file at {str(path)!r}. Pass the path of a file; download URLs first."
            )
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return cls(str(path), digest.hexdigest())

    def find(self, folder, advice="Pass --image for each picture of the prompt."):
        """The same file, looked for from the current folder and then from `folder`; `advice` ends the error.

        Raises:
            ValueError: there is none, or it holds something else by now.
        """
        found = [place / self.path for place in (Path(), Path(folder)) if (place / self.path).is_file()]
        for path in found:
            if self.from_file(path).sha256 == self.sha256:
                return path
        state = "has changed since" if found else "is not there"
        raise ValueError(f"The input file {self.path!r} {state}. {advice}")


@dataclass(frozen=True)
class ControlInput:
    """A ControlNet's part in an image: the kind of control, the picture it comes from, how strongly and when it acts.

    Raises:
        TypeError, ValueError: as GenerationSettings; an unknown kind of control.
    """

    name: str  # of control.CONTROLS
    picture: InputImage
    ready: bool = False  # the picture is the control image itself
    controlnet: str | None = None  # folder, file or Hub id; None takes the one of the table
    scale: float = 1.0  # of what the ControlNet adds
    start: float = 0.0  # share of the steps after which it acts
    end: float = 1.0  # and after which it no longer does

    def __post_init__(self):
        _check_types(self)
        if find_control(self.name).needs_mask and not self.ready:
            raise ValueError(
                f"The control {self.name!r} needs a mask. Make its control image with kosmos-g control {self.name} PICTURE "
                f"--mask MASK and pass that: --control {self.name}:@FILE"
            )
        if self.controlnet is not None:
            _check_text("controlnet", self.controlnet)
        if not 0 <= self.scale <= 10:
            raise ValueError(f"control scale is {self.scale}; expected a number from 0 to 10.")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"control start is {self.start} and control end {self.end}; expected shares of the steps, 0 to 1, the start "
                "before the end."
            )


@dataclass(frozen=True)
class GenerationSettings:
    """All that decides an image. Names, types and ranges are checked when it is made.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of its range, or another number of pictures than `<i>` marks.
    """

    prompt: str
    images: tuple = ()  # an InputImage for each `<i>`, in reading order
    controls: tuple = ()  # a ControlInput for each ControlNet
    negative_prompt: str | None = None
    model: str | None = None  # folder or Hub id; None is the small model that ships
    unet: str | None = None  # folder, file or Hub id of a U-Net in the place of the model's
    lora: str | None = None  # file, folder or Hub id
    lora_scale: float = 1.0  # of what the LoRA adds
    image_words: tuple = ()  # an InputImage for each file of image words that the prompt uses
    seed: int = 0  # image k of a run is made with seed + k
    num_images: int = 1
    steps: int = 50  # denoising steps
    guidance: float = 7.5  # classifier-free guidance; 1 or less turns it off
    height: int | None = None  # pixels; None takes the model's own
    width: int | None = None
    scheduler: str | None = None  # a name of SCHEDULERS; None takes the model's own
    dtype: str = "float32"
    device: str = "cpu"
    offload: str = "none"
    index: int | None = None  # place of an image in its run, for information; None for a grid
    versions: dict = field(default_factory=dict)  # package -> version it was made with, for information

    def __post_init__(self):
        _check_types(self)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None:
                continue
            if isinstance(value, str):
                _check_text(entry.name, value)
            if entry.name in CHOICES and value not in CHOICES[entry.name]:
                raise ValueError(
                    f"{entry.name} is {value!r}; expected one of {', '.join(CHOICES[entry.name])}."
                )
            if entry.name in RANGES:
                low, high = RANGES[entry.name]
                if not low <= value <= high:  # also for NaN
                    raise ValueError(f"{entry.name} is {value}; expected a number from {low} to {high}.")
            if entry.name in ("height", "width") and value % 8:
                raise ValueError(f"{entry.name} is {value} pixels; expected a multiple of 8.")
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device is {self.device!r}; expected a name such as cpu, cuda, cuda:1 or mps.")
        for name in FILES:
            if not all(isinstance(file, InputImage) for file in getattr(self, name)):
                raise TypeError(
                    f"{name} holds something other than InputImage. Make them with InputImage.from_file(path)."
                )
        if not all(isinstance(control, ControlInput) for control in self.controls):
            raise TypeError("controls holds something other than ControlInput.")
        n_marks = self.prompt.count(IMAGE_MARK)
        if n_marks != len(self.images):
            raise ValueError(
                f"The prompt has {n_marks} '<i>' marks but {len(self.images)} pictures were given. Pass one --image for "
                "each '<i>', in reading order."
            )
        for texts in self.versions.items():
            if (
                not all(isinstance(text, str) and len(text) <= 100 for text in texts)
                or len(self.versions) > 100
            ):
                raise TypeError("versions must hold at most 100 pairs of short strings: package and version.")

    def to_json(self):
        """One line of ASCII JSON."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text):
        """Read what `to_json` wrote.

        Raises:
            TypeError, ValueError: anything else; nothing is guessed or left out.
        """
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"they are no JSON ({type(error).__name__}).") from error
        if not isinstance(record, dict):
            raise TypeError(f"they are a JSON {type(record).__name__}; expected an object.")
        version = record.pop("format", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"they have format {version!r}; this package reads {FORMAT_VERSION}.")
        known = {entry.name for entry in fields(cls)}
        if set(record) - known or "prompt" not in record:
            names = ", ".join(repr(name[:50]) for name in sorted(set(record) - known)[:10])
            raise ValueError(f"they hold unknown names: {names}." if names else "they hold no prompt.")
        for name in FILES:
            files = record.get(name, [])
            if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
                raise TypeError(f"{name} must be a list of objects.")
            if any(set(file) != {"path", "sha256"} for file in files):
                raise ValueError(f"each of the {name} must have path and sha256, and nothing else.")
            record[name] = tuple(InputImage(**file) for file in files)
        controls = record.get("controls", [])
        names = {entry.name for entry in fields(ControlInput)}
        if not isinstance(controls, list) or not all(
            isinstance(control, dict)
            and set(control) == names
            and isinstance(control["picture"], dict)
            and set(control["picture"]) == {"path", "sha256"}
            for control in controls
        ):
            raise ValueError(f"controls must be a list of objects with {', '.join(sorted(names))}.")
        record["controls"] = tuple(
            ControlInput(**{**control, "picture": InputImage(**control["picture"])}) for control in controls
        )
        return cls(**record)


def package_versions():
    """Versions of the packages that decide the pixels, by name."""
    modules = (kosmos_g_diffusers, torch, diffusers, transformers, PIL)
    return {module.__name__: str(module.__version__) for module in modules}


def write_png(image, path, settings, overwrite=False):
    """Write a PIL image with its settings, whole or not at all.

    Raises:
        FileExistsError: `path` is there already and `overwrite` is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already and was not overwritten.")
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text(PNG_KEY, settings.to_json())
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            image.save(file, format="PNG", pnginfo=text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_settings(path):
    """The settings in a PNG that `write_png` wrote.

    Raises:
        ValueError: the file is no PNG, carries no settings, or carries something that is not settings.
    """
    try:
        with PIL.Image.open(
            path, formats=["PNG"]
        ) as image:  # reads the chunks before the pixels, and no more
            text = image.info.get(PNG_KEY)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file at {str(path)!r}. Pass a PNG that kosmos-g wrote.") from error
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as PNG ({error}). Pass a PNG that kosmos-g wrote."
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"{str(path)!r} carries no settings of kosmos-g. Pass a PNG that kosmos-g wrote.")
    try:
        settings = GenerationSettings.from_json(text)
        places = [settings.model, settings.unet, settings.lora]
        places += [file.path for name in FILES for file in getattr(settings, name)]
        for control in settings.controls:
            places += [control.picture.path, control.controlnet]
        for place in places:
            # on Windows, only looking at a path like this makes it log in at a server that the PNG names
            if place is not None and place.startswith(("//", "\\\\")):
                raise ValueError(f"{place!r} is a path on another machine.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"The settings in {str(path)!r} cannot be used: {error}") from error
    return settings


def grid_of(images):
    """Images of one size -> one image, as square as can be; places left over are white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = PIL.Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows, columns)


def output_paths(output, num_images):
    """Files of a run: `out.png` for one image; `out_0.png`, `out_1.png`, ... and the grid `out.png` for several.

    Raises:
        ValueError: `output` does not end in .png.
    """
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(
            f"The output {str(output)!r} does not end in .png, the format that carries the settings."
        )
    if num_images == 1:
        return [output]
    return [*(output.with_stem(f"{output.stem}_{index}") for index in range(num_images)), output]


def _check_types(record):
    """Every field of a dataclass is of its annotated type; a float may be given as int."""
    for entry in fields(record):
        value = getattr(record, entry.name)
        accepted = entry.type | int if entry.type is float else entry.type
        if not isinstance(value, accepted) or isinstance(value, bool) != (entry.type is bool):
            expected = getattr(accepted, "__name__", accepted)
            raise TypeError(f"{entry.name} is of type {type(value).__name__}; expected {expected}.")


def _check_text(name, text):
    if not isinstance(text, str):
        raise TypeError(f"{name} is of type {type(text).__name__}; expected str.")
    if len(text) > MAX_TEXT or "\0" in text:
        raise ValueError(
            f"{name} has {len(text)} characters; expected at most {MAX_TEXT}, without a null character."
        )
