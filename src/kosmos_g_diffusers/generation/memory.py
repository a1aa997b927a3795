"""How a model fits into the memory of a device, counted from its files before it is loaded: `--memory` of the command line.

    plan = plan_memory(settings, find_budget("auto", settings.device), fixed=("dtype",))
    settings = plan.applied_to(settings)

The plan is the first of a list, which begins with what costs nothing, whose count fits (docs/memory.md has the list, and how
well the counts are founded).
"""

import argparse
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..environment import as_dtype, check_device, free_memory
from ..files import read_json
from ..quantization import BITS_A_WEIGHT, has_library, is_kept, saved_quantization
from .settings import GenerationSettings

GIB = 2**30
OFF, AUTO = "off", "auto"
# of the device besides weights and states: fragments of torch's allocator, workspaces of matrix products and convolutions
RESERVE = 0.15 * GIB
PROMPT_TOKENS = 77  # of words, in a prompt that is counted for
# numbers that are alive at once, counted by torch's own tracker in SD 1.5 and the released encoder (benchmarks/memory.py):
# for a latent pixel and each channel of the U-Net's first level; for a pixel and each channel of the VAE's second level; for a
# token and each number of its widest state
UNET_STATES, VAE_STATES, ENCODER_STATES = 27, 3, 3
OF_IMAGES = ("dtype", "quantize")  # of what is chosen, that which changes images
TOGETHER, FIRST, BY_LAYER = "together", "first", "by layer"  # when the prompts are encoded


@dataclass(frozen=True)
class Counts:
    """Bytes of the parts of a model and of what they compute in, for one dtype and one way to hold the encoder's weights."""

    encoder: int
    unet: int  # with its LoRAs
    controlnets: int
    vae: int
    layer: int  # the largest that offloading layer by layer fetches
    encoding: int
    denoising: int
    decoding: int

    def peak(self, encode: str, offload: str) -> int:
        """The most that is on the device at once."""
        encoding = (self.layer if encode == BY_LAYER else self.encoder) + self.encoding
        denoising = self.unet + self.controlnets + self.denoising
        if offload == "sequential":
            most = self.layer + max(self.encoding, self.denoising, self.decoding)
        elif offload == "model":
            most = max(encoding, denoising, self.vae + self.decoding)
        else:
            rest = self.unet + self.controlnets + self.vae + max(self.denoising, self.decoding)
            most = max(encoding, rest if encode != TOGETHER else self.encoder + rest)
        return int(most + RESERVE)


@dataclass(frozen=True)
class Plan:
    """What was chosen: of the settings, and when prompts are encoded (TOGETHER, FIRST, BY_LAYER)."""

    dtype: str
    quantize: str
    offload: str
    encode: str
    peak: int  # bytes
    budget: int

    def applied_to(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings with what was chosen."""
        return replace(settings, dtype=self.dtype, quantize=self.quantize, offload=self.offload)

    def __str__(self) -> str:
        said = [self.dtype]
        if self.quantize != "none":
            said.append(f"{self.quantize} weights of the text encoder")
        if self.encode != TOGETHER:
            layers = " layer by layer" if self.encode == BY_LAYER else ""
            said.append(f"prompts encoded{layers} before the U-Net is loaded")
        if self.offload != "none":
            said.append(f"--offload {self.offload}")
        if len(said) == 1:
            said.append("everything at once")
        counts = f"{self.peak / GIB:.1f} GiB are counted, {self.budget / GIB:.1f} GiB are free"
        warning = ": IT MAY NOT FIT, a smaller image needs less" if self.peak > self.budget else ""
        return f"Memory: {', '.join(said)} ({counts}{warning}; --memory off takes the flags alone)."


def add_flag(add: Callable[..., Any]) -> None:
    """Give a parser, by its `add_argument`, the flag `--memory`."""
    text = (
        "choose dtype, --offload and --quantize, as far as they are not given, by what fits: auto into what is free on the "
        "device, a number into so many GiB, off: choose nothing (default: auto on an accelerator, off on the CPU)"
    )
    add("--memory", default=None, type=read_flag, metavar="auto|GIB|off", help=text)


def read_flag(text: str) -> str | float:
    """AUTO, OFF, or a number of GiB. argparse.ArgumentTypeError for anything else."""
    if text in (AUTO, OFF):
        return text
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e5:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given; expected auto, off, or GiB such as 4 or 3.8, more than 0."
        )
    return gib


def find_budget(flag: str | float | None, device: str) -> int | None:
    """Bytes that may be planned with, or None where nothing is planned.

    Args:
        flag: of `read_flag`; None, which was not given, is AUTO on an accelerator and OFF on the CPU.
        device: as settings name it.

    Raises:
        ValueError: AUTO was given, and this device does not say what is free.
    """
    check_device(device)
    if flag == OFF or (flag is None and device.partition(":")[0] == "cpu"):
        return None
    if isinstance(flag, float):
        return int(flag * GIB)
    free = free_memory(device)
    if free is None and flag == AUTO:
        raise ValueError(
            f"The device {device!r} does not say what is free. Pass --memory with a number of GiB."
        )
    return free


def plan_memory(
    settings: GenerationSettings,
    budget: int,
    *,
    fixed: Collection[str] = (),
    encodes_first: bool = False,
    batch: int = 1,
    images: int | None = None,
    controls: int | None = None,
) -> Plan:
    """The first way to hold a model that fits, in this order: the dtype as it is (on a CPU also bfloat16), prompts encoded
    before the U-Net is loaded, one part at a time on the device, one layer of the encoder at a time; then int8 and int4
    weights of the encoder in the same ways; at last one layer of all at a time, which takes many times as long.

    Args:
        settings: with a model (`with_small_model`).
        budget: bytes.
        fixed: names of settings that were given by hand and stay: dtype, quantize, offload.
        encodes_first: prompts may be encoded before the rest is loaded: all of them are known, no maps are asked for.
        batch: images at once.
        images, controls: input images of a prompt and ControlNets to count; None counts those of the settings.

    Returns:
        The plan; where nothing fits, the one that takes least.

    Raises:
        OSError, ValueError: the model cannot be found or read.
    """
    folder = _find_folder(settings.model)
    is_saved = saved_quantization(folder) is not None
    plans, counted = [], {}
    for dtype, quantize, encode, offload in _options(settings, fixed, encodes_first, is_saved):
        if (dtype, quantize) not in counted:
            counts = count(folder, settings, dtype, quantize, batch, images, controls)
            counted[dtype, quantize] = counts
        peak = counted[dtype, quantize].peak(encode, offload)
        plan = Plan(dtype, quantize, offload, encode, peak, budget)
        if plan.peak <= budget:
            return plan
        plans.append(plan)
    return min(plans, key=lambda one: one.peak)


def _options(settings, fixed, encodes_first, is_saved) -> Iterator[tuple[str, str, str, str]]:
    """(dtype, quantize, encode, offload), the one that is preferred first."""
    on_cpu = settings.device.partition(":")[0] == "cpu"
    dtypes = [settings.dtype]
    if on_cpu and "dtype" not in fixed and settings.dtype == "float32":
        dtypes.append("bfloat16")
    quantizations = ["none", *filter(has_library, () if is_saved else BITS_A_WEIGHT)]
    if "quantize" in fixed:
        quantizations = [settings.quantize]
    ways = [(TOGETHER, "none"), (FIRST, "none"), (TOGETHER, "model"), (BY_LAYER, "none"), (BY_LAYER, "model")]
    if "offload" in fixed:
        ways = [(encode, settings.offload) for encode in (TOGETHER, FIRST)]
    elif on_cpu:
        ways = [(encode, offload) for encode, offload in ways if offload == "none" and encode != BY_LAYER]
    ways = [(encode, offload) for encode, offload in ways if encodes_first or encode == TOGETHER]
    for quantize in quantizations:
        # rounded weights only with the smaller dtype, and never together with hooks at each layer
        for dtype in dtypes if quantize == "none" else dtypes[-1:]:
            for encode, offload in ways:
                if quantize == "none" or encode != BY_LAYER:
                    yield dtype, quantize, encode, offload
    if not on_cpu and "offload" not in fixed and quantizations[0] == "none":
        yield dtypes[-1], "none", TOGETHER, "sequential"


def count(
    folder: Path,
    settings: GenerationSettings,
    dtype: str,
    quantize: str = "none",
    batch: int = 1,
    images: int | None = None,
    controls: int | None = None,
) -> Counts:
    """Count what a pipeline of a folder takes, from the headers and configs of its files.

    Args:
        folder: of a pipeline.
        settings: the U-Net, LoRAs, controls, images of the prompt, size and guidance.
        dtype, quantize: of the weights.
        batch, images, controls: see `plan_memory`.

    Raises:
        OSError, ValueError: a file is not there or damaged.
    """
    from ..modeling_kosmos_g import KosmosGTextEncoderConfig

    size = as_dtype(dtype).itemsize
    shapes = {part: _shapes_of(folder / part) for part in ("text_encoder", "unet", "vae")}
    # a single file has weights for the layers of the model's own, and a whole checkpoint more than that
    if settings.unet is not None and not Path(settings.unet).is_file():
        place = Path(settings.unet)
        shapes["unet"] = _shapes_of(place, "unet") or _shapes_of(place) or shapes["unet"]
    unet, vae = (
        read_json(folder / part / "config.json", "Download or make it again.") for part in ("unet", "vae")
    )
    config = KosmosGTextEncoderConfig.from_pretrained(folder / "text_encoder")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    area = (settings.height or height * factor) * (settings.width or width * factor)
    guided = 2 if settings.guidance > 1 else 1
    # a ControlNet is the half of a U-Net that goes down, and its middle
    down = {
        name: shape
        for name, shape in shapes["unet"].items()
        if not name.startswith(("up_blocks", "conv_out"))
    }
    if images is None:
        images = len(settings.images) + len(settings.image_words)
    tokens = guided * batch * (PROMPT_TOKENS + images * (config.latent_query_num + 2))
    text, vision = config.text_config, config.vision_config
    patches = images * batch * ((vision.image_size // vision.patch_size) ** 2 + 1)
    widest = max(tokens * text.ffn_dim, patches * vision.intermediate_size)
    lora = sum(_size_of_files(lora.path) for lora in settings.all_loras)
    n_controls = len(settings.controls) if controls is None else controls
    return Counts(
        encoder=_encoder_bytes(folder, shapes["text_encoder"], size, quantize),
        unet=_numbers(shapes["unet"]) * size + lora,
        controlnets=n_controls * _numbers(down) * size,
        vae=_numbers(shapes["vae"]) * size,
        layer=max(_product(shape) for part in shapes.values() for shape in part.values()) * size,
        encoding=ENCODER_STATES * widest * size,
        denoising=UNET_STATES * unet["block_out_channels"][0] * (area // factor**2) * guided * batch * size,
        decoding=VAE_STATES
        * vae["block_out_channels"][min(1, len(vae["block_out_channels"]) - 1)]
        * area
        * size,
    )


def _encoder_bytes(folder, shapes, size, quantize):
    if saved_quantization(folder):
        return _size_of_files(folder / "text_encoder")
    rounded = 0
    if quantize != "none":
        rounded = sum(
            _product(shape)
            for name, shape in shapes.items()
            # linear layers: tables of embeddings have two sides as well
            if len(shape) == 2
            and name.endswith(".weight")
            and "embed" not in name
            and not is_kept(name.removesuffix(".weight"), quantize)
        )
    return (_numbers(shapes) - rounded) * size + int(rounded * BITS_A_WEIGHT.get(quantize, 0) / 8)


def _find_folder(model):
    if Path(model).is_dir():
        return Path(model)
    from .generate import download_model

    return download_model(model)


def _shapes_of(place, subfolder=None):
    """Name -> shape of the weights of a part; {} where none are known."""
    from ..loading import declared_weights, weight_files

    declared = declared_weights(weight_files(place, subfolder))
    return {name: tuple(weight.shape) for name, weight in declared.items()}


def _product(shape):
    numbers = 1
    for side in shape:
        numbers *= side
    return numbers


def _numbers(shapes):
    return sum(map(_product, shapes.values()))


def _size_of_files(place):
    """Bytes of a file of weights, or of those of a folder; 0 for what is not here."""
    place = Path(place)
    files = place.glob("*.safetensors") if place.is_dir() else [place] if place.is_file() else []
    return sum(file.stat().st_size for file in files)
