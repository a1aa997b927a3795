"""What an image was made from: all that decides it, checked, as one JSON object (which png.py keeps inside the image)."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from ..control.table import find_control
from ..environment import DTYPES
from ..fields import check, check_value, is_of_type, setting
from ..files import hash_file
from ..maps.boxes import Box, read_box
from ..quantization import QUANTIZATIONS
from .schedulers import SCHEDULERS

FORMAT_VERSION = 1  # of the JSON object; raise it when an older package would read a new one wrongly

OFFLOADS = ("none", "model", "sequential")
FILES = ("images", "image_words")  # fields of GenerationSettings that hold an InputImage for each file
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d{1,3})?")
# as in processing_kosmos_g, which needs torch
IMAGE_MARK = "<i>"
IMAGE_WORD_PATTERN = re.compile(r"<[a-z][a-z0-9-]*>")
SIDE: dict[str, Any] = {
    "help": "multiple of 8 (default: the model's)",
    "low": 8,
    "high": 8192,
    "metavar": "PIXELS",
}
LORA_SCALE: dict[str, Any] = {
    "help": "weight of the --lora before it (default: 1)",
    "low": -10,
    "high": 10,
    "metavar": "N",
}
BINDING: dict[str, Any] = {"low": 0, "high": 10, "metavar": "WEIGHT"}
PLACES = ("model", "unet", "lora")  # fields of GenerationSettings that hold a path or Hub id
NEWER = (
    "loras",
    "binding",
    "regions",
    "init_image",
    "mask",
    "strength",
    "quantize",
)  # fields that are written only where they say something: older packages refuse names that they do not know
STRENGTH = 0.8  # of a change, as in diffusers' image-to-image
MAX_TEXT = 100_000  # characters of a prompt or path


@dataclass(frozen=True)
class InputImage:
    """A file that a prompt needs, mostly an image: where it was read, as the user wrote it, and what it held."""

    path: str
    sha256: str

    def __post_init__(self) -> None:
        _check_place("path of an input image", self.path)
        if (
            not isinstance(self.sha256, str)
            or len(self.sha256) != 64
            or set(self.sha256) - set("0123456789abcdef")
        ):
            raise ValueError(f"sha256 of {self.path!r} is not a SHA-256 of 64 lower-case hexadecimal digits.")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Raises ValueError if there is no file at `path`."""
        if not Path(path).is_file():
            raise ValueError(f"There is no file at {str(path)!r}. Pass the path of one; download URLs first.")
        return cls(str(path), hash_file(path))

    def find(self, folder: str | Path, advice: str = "Pass --image for each image of the prompt.") -> Path:
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
    """A ControlNet's part in an image: the kind of control, the image it comes from, how strongly and when it acts.

    Raises:
        TypeError, ValueError: as GenerationSettings; an unknown kind of control.
    """

    name: str  # of control.CONTROLS
    picture: InputImage
    ready: bool = False  # it is the control image itself
    controlnet: str | None = setting(
        None, "folder, file or Hub id for the --control before it (default: of the table)", metavar="MODEL"
    )
    scale: float = setting(1.0, "weight of the --control before it (default: 1)", metavar="N")
    start: float = setting(0.0, "of the steps before it acts", metavar="SHARE")
    end: float = setting(1.0, "of the steps when it ends", metavar="SHARE")

    def __post_init__(self) -> None:
        check(self)
        if find_control(self.name).needs_mask and not self.ready:
            raise ValueError(
                f"The control {self.name!r} needs a mask. Make its control image with kosmos-g control {self.name} IMAGE "
                f"--mask MASK and pass that: --control {self.name}:@FILE"
            )
        if self.controlnet is not None:
            _check_place("controlnet", self.controlnet)
        if not 0 <= self.scale <= 10:
            raise ValueError(f"control scale is {self.scale}; expected a number from 0 to 10.")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"control start is {self.start} and control end {self.end}; expected shares of the steps, 0 to 1, the start "
                "before the end."
            )


@dataclass(frozen=True)
class LoraInput:
    """One of several LoRAs for the U-Net. Raises TypeError, ValueError, as GenerationSettings."""

    path: str
    scale: float = setting(1.0, **LORA_SCALE)

    def __post_init__(self) -> None:
        _check_place("path of a LoRA", self.path)
        check_value("lora_scale", self.scale, float, **LORA_SCALE)


@dataclass(frozen=True)
class GenerationSettings:
    """All that decides an image. Names, types and ranges are checked when it is made.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of its range, or another number of images than `<i>` marks.
    """

    prompt: str
    images: tuple[InputImage, ...] = ()  # an InputImage for each `<i>`, in reading order
    controls: tuple[ControlInput, ...] = ()  # a ControlInput for each ControlNet
    negative_prompt: str | None = None
    # None is the small model that ships
    model: str | None = setting(
        None, "folder or Hub id (default: the small model that ships, of sprites)", metavar="MODEL"
    )
    unet: str | None = setting(
        None, "folder, file or Hub id of a fine-tune's U-Net (default: the model's)", metavar="MODEL"
    )
    lora: str | None = setting(
        None, "file, folder or Hub id of a LoRA for the U-Net; repeat it", metavar="MODEL"
    )
    lora_scale: float = setting(1.0, **LORA_SCALE)
    loras: tuple[
        LoraInput, ...
    ] = ()  # a LoraInput for each, where there are two or more; `lora` is None then
    image_words: tuple[
        InputImage, ...
    ] = ()  # an InputImage for each file of image words that the prompt uses
    # an image that is changed, and what of it: where it has no transparency light, else transparent is drawn anew
    init_image: InputImage | None = None
    mask: InputImage | None = None
    strength: float | None = setting(
        None,
        "of the change of --init-image: 1 draws it anew (default: 0.8; with --mask 1)",
        low=0,
        high=1,
        metavar="SHARE",
    )
    # image k of a run is made with seed + k
    seed: int = setting(0, "of the first image (default: drawn, and stored)", low=0, high=2**63 - 1)
    num_images: int = setting(1, "images to make", low=1, high=1000)
    steps: int = setting(50, "denoising steps", low=1, high=10_000)
    # classifier-free guidance
    guidance: float = setting(7.5, "weight of the prompt; 1 or less: off", low=0, high=1000, metavar="SCALE")
    binding: float = setting(
        0.0, "gives each image of the prompt a region of its own (default: 0, off; try 1)", **BINDING
    )
    regions: tuple[Box | None, ...] = ()  # for each image of the prompt, image words too; () for none
    height: int | None = setting(None, **SIDE)
    width: int | None = setting(None, **SIDE)
    scheduler: str | None = setting(
        None, f"one of {', '.join(SCHEDULERS)} (default: the model's)", choices=SCHEDULERS, metavar="NAME"
    )
    dtype: str = setting(
        "float32", f"one of {', '.join(DTYPES)} (default: by the device)", choices=DTYPES, metavar="NAME"
    )
    quantize: str = setting(
        "none",
        f"weights of the text encoder, one of {', '.join(QUANTIZATIONS)} (default: none)",
        choices=QUANTIZATIONS,
        metavar="NAME",
    )
    device: str = setting(
        "cpu", "cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)", metavar="DEVICE"
    )
    offload: str = setting(
        "none", f"one of {', '.join(OFFLOADS)}; saves GPU memory", choices=OFFLOADS, metavar="NAME"
    )
    index: int | None = setting(None, low=0, high=999)  # place of an image in its run; None for a grid
    versions: dict[str, str] = setting(dict)  # package -> version it was made with, for information

    def __post_init__(self) -> None:
        for entry in fields(self):
            if isinstance(value := getattr(self, entry.name), str):
                (_check_place if entry.name in PLACES else _check_text)(entry.name, value)
        check(self)
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side % 8:
                raise ValueError(f"{name} is {side} pixels; expected a multiple of 8.")
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device is {self.device!r}; expected a name such as cpu, cuda, cuda:1 or mps.")
        for name in FILES:
            if not all(isinstance(file, InputImage) for file in getattr(self, name)):
                raise TypeError(
                    f"{name} holds something other than InputImage; InputImage.from_file makes it."
                )
        self._check_change()
        if not all(isinstance(control, ControlInput) for control in self.controls):
            raise TypeError("controls holds something other than ControlInput.")
        if not all(isinstance(lora, LoraInput) for lora in self.loras):
            raise TypeError("loras holds something other than LoraInput.")
        if len(self.loras) == 1 or (self.loras and self.lora is not None):
            raise ValueError(
                "loras holds two LoRAs or more, and then lora none; a single one stands in lora."
            )
        for number, region in enumerate(self.regions, 1):
            if region is not None:
                if not isinstance(region, tuple):
                    raise TypeError(
                        f"region {number} is of type {type(region).__name__}; expected four numbers."
                    )
                read_box(region, f"region {number}")
        n_marks = self.prompt.count(IMAGE_MARK)
        # whether what looks like an image word is one, the model alone knows
        n_most = len(IMAGE_WORD_PATTERN.findall(self.prompt))
        if self.regions and not n_marks <= len(self.regions) <= n_most:
            raise ValueError(
                f"{len(self.regions)} regions were given for a prompt of {n_marks} '<i>' marks and {n_most - n_marks} image words. "
                "Pass one --region for each, in reading order; none leaves an image free."
            )
        if n_marks != len(self.images):
            raise ValueError(
                f"The prompt has {n_marks} '<i>' marks but {len(self.images)} images were given. Pass one --image for "
                "each '<i>', in reading order."
            )
        texts = [text for pair in self.versions.items() for text in pair]
        if len(texts) > 200 or not all(isinstance(text, str) and len(text) <= 100 for text in texts):
            raise TypeError("versions must hold at most 100 pairs of short strings: package and version.")

    def _check_change(self):
        if self.init_image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"A {name} was given without an image to change. Pass --init-image as well."
                    )
            return
        if self.is_guided:
            raise ValueError("Binding and regions draw whole images. Leave them or --init-image out.")
        if self.strength is None:
            object.__setattr__(self, "strength", STRENGTH if self.mask is None else 1.0)
        if int(self.steps * self.strength) < 1:
            raise ValueError(
                f"strength={self.strength} of {self.steps} steps leaves no step to draw. Expected {1 / self.steps:.3g} or more, "
                "or more steps."
            )

    @property
    def files(self) -> tuple[InputImage, ...]:
        """An InputImage for each file that is needed to make the image again."""
        changed = [file for file in (self.init_image, self.mask) if file is not None]
        return (
            *self.images,
            *self.image_words,
            *(control.picture for control in self.controls),
            *changed,
        )

    @property
    def is_composite(self) -> bool:
        """Whether it shows another image, kept or changed: image-to-image, inpainting, or a control that shows the image itself."""
        return self.init_image is not None or any(
            find_control(control.name).annotator is None for control in self.controls
        )

    @property
    def is_guided(self) -> bool:
        """Whether maps of the prompt's images guide the drawing."""
        return bool(self.binding) or any(region is not None for region in self.regions)

    @property
    def all_loras(self) -> tuple[LoraInput, ...]:
        """A LoraInput for each LoRA, however many there are."""
        return self.loras or (() if self.lora is None else (LoraInput(self.lora, self.lora_scale),))

    @staticmethod
    def lora_fields(loras: tuple[LoraInput, ...]) -> dict[str, Any]:
        """What to replace in settings so that `all_loras` is `loras`, a tuple of LoraInput."""
        if len(loras) > 1:
            return {"lora": None, "lora_scale": 1.0, "loras": tuple(loras)}
        lora, scale = (loras[0].path, loras[0].scale) if loras else (None, 1.0)
        return {"lora": lora, "lora_scale": scale, "loras": ()}

    def as_record(self) -> dict[str, Any]:
        """The settings as a dict, as far as `to_json` writes them."""
        plain = {entry.name: entry.default for entry in fields(self) if entry.name in NEWER}
        return {
            name: value for name, value in asdict(self).items() if name not in plain or value != plain[name]
        }

    def to_json(self) -> str:
        """One line of ASCII JSON."""
        return json.dumps({"format": FORMAT_VERSION, **self.as_record()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. TypeError or ValueError for anything else; nothing is guessed or left out."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"they are not JSON ({type(error).__name__}).") from error
        if not isinstance(record, dict):
            raise TypeError(f"they are a JSON {type(record).__name__}; expected an object.")
        version = record.pop("format", None)
        if version != FORMAT_VERSION or not is_of_type(version, int):
            raise ValueError(f"they have format {version!r}; this package reads {FORMAT_VERSION}.")
        known = {entry.name for entry in fields(cls)}
        if set(record) - known or "prompt" not in record:
            names = ", ".join(repr(name[:50]) for name in sorted(set(record) - known)[:10])
            raise ValueError(f"they hold unknown names: {names}." if names else "they hold no prompt.")
        for name in FILES:
            record[name] = _read_records(InputImage, name, record.get(name, []))
        controls = record.get("controls", [])
        for control in controls if isinstance(controls, list) else ():
            if isinstance(control, dict):
                images = _read_records(InputImage, "images of controls", [control.get("picture")])
                control["picture"] = images[0]
        record["controls"] = _read_records(ControlInput, "controls", controls)
        for name in ("init_image", "mask"):
            if record.get(name) is not None:
                (record[name],) = _read_records(InputImage, name, [record[name]])
        regions = record.get("regions", [])
        if not isinstance(regions, list):
            raise TypeError("regions must be a list.")
        record["regions"] = tuple(tuple(box) if isinstance(box, list) else box for box in regions)
        record["loras"] = _read_records(LoraInput, "loras", record.get("loras", []))
        return cls(**record)


def _read_records(record_class, name, values):
    """Objects of JSON -> tuple of a dataclass; they must have its fields and nothing else."""
    names = [entry.name for entry in fields(record_class)]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise TypeError(f"{name} must be a list of objects.")
    if any(set(value) != set(names) for value in values):
        raise ValueError(f"each of the {name} must have {' and '.join(names)}, and nothing else.")
    return tuple(record_class(**value) for value in values)


def _check_text(name, text):
    if not isinstance(text, str):
        raise TypeError(f"{name} is of type {type(text).__name__}; expected str.")
    if len(text) > MAX_TEXT or "\0" in text:
        raise ValueError(f"{name} has {len(text)} characters; expected up to {MAX_TEXT}, no null character.")


def _check_place(name, text):
    """Of a path or Hub id."""
    _check_text(name, text)
    if not text.strip():
        raise ValueError(f"{name} is {text!r}; expected a path or Hub id.")
