"""What a program may ask for: bodies of requests, checked, and the same as settings with images that are read.

Bodies hold images as uploads or as data: URLs. Nothing here opens a path or an address.
"""

import io
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import PIL.Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..files import hash_bytes
from ..generation.schedulers import SCHEDULERS
from ..generation.settings import IMAGE_MARK, ControlInput, GenerationSettings, InputImage, LoraInput
from ..serving.errors import FieldError, at
from ..serving.images import MAX_FILES, check_image_file, open_square, read_data_url
from ..serving.job import MAX_SIDE
from ..serving.limits import LIMITS, MAX_PROMPT
from ..serving.models import NO_LORA, Models

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
STEPS, GUIDANCE = 30, 7.5
SMALL_STEPS, SMALL_GUIDANCE, SMALL_SCHEDULER = 12, 5.0, "dpm"  # what the small model's scores were drawn with
ANY_MODEL = "kosmos-g"  # the model that is served, whatever its name
MAX_CONTROLS = 3
MAX_LORAS = 8


@dataclass
class File:
    """The bytes of an image, and what the client calls it."""

    content: bytes
    name: str = ""

    @property
    def kept(self) -> InputImage:
        """As settings name it: by its own name, or by its contents."""
        digest = hash_bytes(self.content)
        name = re.sub(r"[^\w.-]+", "_", re.split(r"[/\\]", self.name)[-1]).lstrip(".")[:100]
        return InputImage(name or digest[:16], digest)


# Bodies ----------------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """null means the default, as in OpenAI's API."""
        if not isinstance(given, dict):
            return given
        fields = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in given.items() if value is not None or name not in fields}


class Lora(Body):
    name: str = Field(
        description="One of the LoRAs that the server offers (`GET /v1/models`).", max_length=200
    )
    scale: float = Field(1.0, ge=LIMITS["lora_scale"][0], le=LIMITS["lora_scale"][1])


class Control(Body):
    """A ControlNet's part in an image."""

    kind: str = Field(description="Such as canny; `GET /v1/models` lists them.", max_length=100)
    image: str = Field(description="Image that the control image is made of, or itself, as a data: URL.")
    ready: bool = Field(False, description="The image is the control image already.")
    scale: float = Field(1.0, ge=0, le=2)
    start: float = Field(0.0, ge=0, le=1, description="Of the steps before it acts.")
    end: float = Field(1.0, ge=0, le=1, description="Of the steps when it ends.")


class Prompted(Body):
    prompt: str | list[dict[str, Any]] = Field(
        description="Words, and `<i>` for each image; or chat content, whose images are data: URLs."
    )
    model: str | None = Field(None, description="Its name (`GET /v1/models`), or kosmos-g.", max_length=200)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT, description="What not to draw.")
    user: str | None = Field(None, description="Taken and not used.", max_length=1000)


class Drawn(Prompted):
    """What both endpoints of images take."""

    n: int = Field(1, ge=1, le=LIMITS["num_images"][1], description="Images, with the seeds seed + k.")
    size: str = Field("auto", description="WIDTHxHEIGHT in pixels, multiples of 8; auto: the model's own.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = Field(None, description="PNG alone carries settings.")
    quality: Literal["auto", "standard"] | None = Field(None, description="Taken and not used.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Taken and not used.")
    style: Literal["natural"] | None = Field(None, description="Taken and not used.")
    moderation: Literal["auto"] | None = Field(None, description="Taken and not used.")
    stream: Literal[False] | None = None
    seed: int | None = Field(None, ge=0, le=LIMITS["seed"][1], description="None draws one, and tells it.")
    steps: int | None = Field(None, ge=1, le=LIMITS["steps"][1])
    guidance_scale: float | None = Field(None, ge=0, le=LIMITS["guidance"][1])
    scheduler: str | None = Field(None, description=f"One of {', '.join(SCHEDULERS)}; none: the model's.")
    loras: list[Lora] = Field([], max_length=MAX_LORAS)
    controls: list[Control] = Field([], max_length=MAX_CONTROLS)

    @field_validator("scheduler")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in SCHEDULERS:
            raise ValueError(f"there is no such scheduler; expected one of {', '.join(SCHEDULERS)}")
        return value

    @field_validator("size")
    @classmethod
    def _is_size(cls, value: str) -> str:
        sides = SIZE.fullmatch(value)
        if value != "auto" and (
            sides is None or any(int(side) % 8 or not 8 <= int(side) <= MAX_SIDE for side in sides.groups())
        ):
            raise ValueError(
                f"expected WIDTHxHEIGHT in multiples of 8 up to {MAX_SIDE} pixels, such as 512x512, or auto"
            )
        return value


class Generation(Drawn):
    """Body of `POST /v1/images/generations`."""

    images: list[str] = Field([], description="The images of the `<i>`, in that order, as data: URLs.")


class Edit(Drawn):
    """Fields of `POST /v1/images/edits`; images are files, or texts with data: URLs. Lists are JSON."""

    image: list[File] = Field([], description="The images of the `<i>`, in that order.")
    init_image: File | None = Field(None, description="The image to change.")
    mask: File | None = Field(
        None, description="Of its shape: transparent (or else light) parts are drawn anew."
    )
    strength: float | None = Field(None, gt=0, le=1, description="Of the change; 1 draws it anew.")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="Taken and not used.")


class Condition(Prompted):
    """Body of `POST /v1/conditions`."""

    images: list[str] = Field([], description="The images of the `<i>`, in that order, as data: URLs.")


UPLOADS = ("image", "init_image", "mask")  # fields of an Edit


def edit_schema() -> dict[str, Any]:
    """JSON schema of the form of an Edit, whose files are binary."""
    file = {"type": "string", "format": "binary"}
    schema: dict[str, Any] = {"type": "object", "required": ["prompt"], "properties": {}}
    drawn = Drawn.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
    for name, entry in Edit.model_fields.items():
        shape = drawn.get(name, {"type": "number"} if name == "strength" else {"type": "string"})
        if name in UPLOADS:
            shape = {"type": "array", "items": file} if name == "image" else file
        elif name in ("loras", "controls"):
            shape = {"type": "string"}
        schema["properties"][name] = {**shape, "description": entry.description or name}
    return schema


# From bodies to what is drawn --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What a loaded model draws, as far as reading a request needs it."""

    model: str
    is_small: bool
    image_size: int  # pixels a side, which images of prompts are cut to
    loras: tuple[str, ...]
    controls: tuple[str, ...]
    device: str
    dtype: str
    is_builtin: bool = False


@dataclass(eq=False)
class Request:
    """Something to draw, or to encode alone. Nothing in it belongs to a process: it may be sent to another."""

    settings: GenerationSettings
    images: list[PIL.Image.Image]  # of the `<i>`, as the model's processor cuts them
    # files, checked and not decoded: large images are held by nobody who waits
    control_files: list[bytes] = field(default_factory=list)
    changed_files: list[bytes] = field(default_factory=list)  # the image to change, and its mask
    is_drawn: bool = True
    image_places: int = 1  # of each of its images in a batch
    arguments: dict[str, Any] = field(
        default_factory=dict
    )  # what the pipeline is called with, but for the prompt
    encoded: tuple[Any, Any] | None = None  # states of the prompt and of the negative prompt, (1, Q, D) each
    error: BaseException | None = None  # which it will end with


def read_request(body: Prompted, offer: Offer) -> Request:
    """A checked body -> Request. Decodes images, one at a time on the whole server.

    Raises:
        FieldError: with the field that is to be fixed.
    """
    if body.model not in (None, ANY_MODEL, offer.model):
        raise UnknownModel(body.model, offer.model)
    field = "image" if isinstance(body, Edit) else "images"
    given = body.image if isinstance(body, Edit) else [File(read_data_url(url, field)) for url in body.images]
    prompt, files = _read_prompt(body.prompt, given, field)
    if not prompt.strip():
        raise FieldError("prompt", f"Say what to draw, with {IMAGE_MARK} for each image.")
    if len(prompt) > MAX_PROMPT:
        raise FieldError("prompt", f"The prompt has {len(prompt)} characters; {MAX_PROMPT} are possible.")
    if len(files) > MAX_FILES:
        raise FieldError(field, f"A prompt may have {MAX_FILES} images, and {len(files)} were given.")
    arguments: dict[str, Any] = {"negative_prompt": body.negative_prompt or None}
    controls, changed = [], []
    if isinstance(body, Drawn):
        arguments |= _numbers(body, offer)
        controls = [File(read_data_url(control.image, "controls")) for control in body.controls]
        arguments["controls"] = _controls(body, controls, offer)
        arguments |= _loras(body, offer)
    if isinstance(body, Edit):
        changed = [file for file in (body.init_image, body.mask) if file is not None]
        if body.init_image is None and (body.mask or body.strength):
            raise FieldError("init_image", "A mask or a strength needs init_image, the image to change.")
        kept = {"init_image": body.init_image, "mask": body.mask}
        arguments |= {name: file.kept for name, file in kept.items() if file is not None}
        arguments["strength"] = body.strength
    with at("prompt"):
        settings = GenerationSettings(
            prompt=prompt,
            images=tuple(file.kept for file in files),
            model=None if offer.is_builtin else offer.model,
            device=offer.device,
            dtype=offer.dtype,
            **arguments,
        )
    return Request(
        settings,
        [_open(file, field, offer.image_size) for file in files],
        [_checked(file, "controls") for file in controls],
        [_checked(file, name) for file, name in zip(changed, ("init_image", "mask"), strict=False)],
        isinstance(body, Drawn),
    )


def offer_of(models: Models) -> Offer:
    """What loaded models draw."""
    return Offer(
        models.default,
        models.is_small(models.default),
        models.pipe.get_processor().image_size,
        tuple(name for name in models.loras if name != NO_LORA),
        models.controls(models.default),
        models.device,
        models.dtype,
        models.is_builtin(models.default),
    )


class UnknownModel(FieldError):
    """A model that is not offered here."""

    def __init__(self, asked: str, offered: str):
        super().__init__("model", f"There is no model {asked[:100]!r} here. Expected {offered!r}, or none.")


def _read_prompt(prompt: str | Sequence[Mapping[str, Any]], given: list[File], field: str):
    """(text with marks, images in its order) of a text or of chat content."""
    if isinstance(prompt, str):
        return prompt, given
    if given:
        raise FieldError(field, "Images are given in the prompt and beside it. Use one way.")
    text, files = [], []
    for part in prompt:
        kind, content = part.get("type"), None
        if part.get("role") == "user":
            inner = part.get("content")
            inner_text, inner_files = (
                (inner, []) if isinstance(inner, str) else _read_prompt(_parts(inner), [], field)
            )
            text.append(inner_text)
            files += inner_files
            continue
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            if IMAGE_MARK in part["text"]:
                raise FieldError("prompt", f"Chat content has its images in it; {IMAGE_MARK} is for a text.")
            text.append(part["text"])
            continue
        if kind in ("image", "image_url", "input_image"):
            content = part.get("image_url", part.get("image"))
            content = content.get("url") if isinstance(content, dict) else content
        if content is None:
            raise FieldError(
                "prompt",
                "A part of the chat content is neither {'type': 'text', 'text': ...} nor {'type': 'image_url', 'image_url': "
                "{'url': 'data:...'}}.",
            )
        files.append(File(read_data_url(content, "prompt")))
        text.append(IMAGE_MARK)
    return " ".join(text), files


def _parts(content):
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise FieldError("prompt", "The content of a message is a text or a list of parts.")
    return content


def _numbers(body, offer):
    steps, guidance = (SMALL_STEPS, SMALL_GUIDANCE) if offer.is_small else (STEPS, GUIDANCE)
    width, height = (None, None) if body.size == "auto" else map(int, body.size.split("x"))
    return {
        "num_images": body.n,
        "steps": body.steps or steps,
        "guidance": float(guidance if body.guidance_scale is None else body.guidance_scale),
        "seed": secrets.randbelow(2**32) if body.seed is None else body.seed,
        "scheduler": body.scheduler or (SMALL_SCHEDULER if offer.is_small else None),
        "width": width,
        "height": height,
    }


def _controls(body, files, offer):
    for control in body.controls:
        if control.kind not in offer.controls:
            kinds = ", ".join(offer.controls) or "none"
            raise FieldError("controls", f"There is no control {control.kind[:50]!r} here. Offered: {kinds}.")
    with at("controls"):
        return tuple(
            ControlInput(
                control.kind, file.kept, control.ready, None, control.scale, control.start, control.end
            )
            for control, file in zip(body.controls, files, strict=True)
        )


def _loras(body, offer):
    for lora in body.loras:
        if lora.name not in offer.loras:
            names = ", ".join(offer.loras) or "none"
            raise FieldError("loras", f"There is no LoRA {lora.name[:50]!r} here. Offered: {names}.")
    if len({lora.name for lora in body.loras}) < len(body.loras):
        raise FieldError("loras", "A LoRA is named twice. Name each once.")
    loras = tuple(LoraInput(lora.name, lora.scale) for lora in body.loras)
    return GenerationSettings.lora_fields(loras)


def _open(file, field, side):
    source = io.BytesIO(file.content)
    check_image_file(source, field)
    return open_square(source, field, side)


def _checked(file, field):
    check_image_file(io.BytesIO(file.content), field)
    return file.content
