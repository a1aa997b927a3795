"""From settings to images and files: what `kosmos-g generate` does once its flags are read, and `kosmos-g app`."""

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from ..control.controls import control_image, control_size, load_controlnet, open_control
from ..environment import as_dtype, check_device, package_versions
from ..files import first_line
from ..generation.settings import GenerationSettings
from ..loading import load_pretrained, load_single_file
from ..maps.overlay import draw_overlay
from ..modeling_kosmos_g import VisionCache
from ..pipeline_kosmos_g import (
    KosmosGControlNetImg2ImgPipeline,
    KosmosGControlNetInpaintPipeline,
    KosmosGControlNetPipeline,
    KosmosGImg2ImgPipeline,
    KosmosGInpaintPipeline,
    KosmosGPipeline,
)
from ..processing_kosmos_g import open_image, open_mask, read_image
from ..provenance import MARKED, Marker
from ..quantization import quantization_config, saved_quantization
from .grid import enlarge, grid_of
from .png import maps_path, read_kept, write_png
from .schedulers import make_scheduler
from .settings import LoraInput

Pipeline = KosmosGPipeline | KosmosGControlNetPipeline
# whether there are controls, an image to change, a mask -> what draws
PIPELINES: dict[tuple[bool, bool, bool], Any] = {
    (False, False, False): KosmosGPipeline,
    (False, True, False): KosmosGImg2ImgPipeline,
    (False, True, True): KosmosGInpaintPipeline,
    (True, False, False): KosmosGControlNetPipeline,
    (True, True, False): KosmosGControlNetImg2ImgPipeline,
    (True, True, True): KosmosGControlNetInpaintPipeline,
}

VISION_CACHE_BYTES = 2**26  # states of 128 images of the released size in float32
UNCHANGEABLE = "cannot be changed"  # what is said of an image that is too small or too thin
LORA_NAME = "lora"  # of the adapter in the U-Net
UNET_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt")  # of files; a Hub id has none of them


def load_pipeline(settings: GenerationSettings, encoded: bool = False) -> Pipeline:
    """Load the model that the settings name, on their device, with their scheduler.

    Settings without a model mean the small one that ships: `sprites.pretrained.with_small_model` says where it is.

    Args:
        encoded: prompts are encoded (`encode_first`): the pipeline gets no text encoder.

    Raises:
        ValueError: the device is not there, or there is nothing to offload from.
        OSError: the model cannot be loaded.
    """
    check_device(settings.device)
    if settings.offload != "none" and torch.device(settings.device).type == "cpu":
        raise ValueError(f"Offload {settings.offload!r} saves memory of accelerators; the device is the CPU.")
    dtype = as_dtype(settings.dtype)
    pipe = load_model(settings.model, dtype, "none", text_encoder=None) if encoded else _load_whole(settings)
    if settings.unet is not None:
        pipe = KosmosGPipeline.from_pipe(pipe, unet=load_unet(settings.unet, pipe.unet))
    if settings.num_images > 1:  # each image of a run with maps is drawn from the prompt
        pipe.vision_cache = VisionCache(VISION_CACHE_BYTES)
    add_loras(pipe, settings.all_loras)
    sources = [control.controlnet or control.name for control in settings.controls]
    pipe = pipeline_for(pipe, settings, [load_controlnet(source, dtype) for source in sources])
    if settings.scheduler is not None:
        pipe.scheduler = make_scheduler(settings.scheduler, pipe.scheduler.config)
    place(pipe, settings.device, settings.offload)
    return pipe


def _load_whole(settings, **without):
    """The pipeline of the settings with their image words, on the CPU."""
    pipe = load_model(settings.model, as_dtype(settings.dtype), settings.quantize, **without)
    for words in settings.image_words:
        pipe.load_image_words(words.find(Path(), "Run the command where it is."))
    return pipe


def load_model(
    model: str | Path, dtype: torch.dtype | str, quantize: str = "none", **without: None
) -> KosmosGPipeline:
    """The pipeline of a folder or Hub id, on the CPU.

    Args:
        dtype: torch's, or its name.
        quantize: how the weights of the text encoder are rounded while they are loaded, see quantization.py.
        without: parts that are not loaded, such as `unet=None`.

    Raises:
        ValueError: the weights were rounded before they were saved, and cannot be again.
        ImportError: the library that rounds them is not installed.
        OSError: the model cannot be loaded.
    """
    dtype = as_dtype(dtype) if isinstance(dtype, str) else dtype
    if quantize != "none":
        if saved := saved_quantization(model):
            raise ValueError(
                f"The text encoder of {str(model)!r} was saved with quantised weights ({saved}), and quantize {quantize!r} was "
                "asked for. Leave out --quantize, or take the model that it was made of."
            )
        without["quantization_config"] = quantization_config(quantize, dtype)
    # Kosmos-G folders never hold pickle files; refuse to load any
    return KosmosGPipeline.from_pretrained(model, use_safetensors=True, dtype=dtype, **without)


def place(pipe: Pipeline, device: str | torch.device, offload: str = "none") -> None:
    """Put a pipeline on a device: whole, or one part or one layer at a time ("model", "sequential")."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def encode_first(
    settings: GenerationSettings, reference_images: Sequence[Any], by_layer: bool = False
) -> dict[str, Any]:
    """`prompt_arguments` by a pipeline that has nothing but the text encoder, which is freed before the rest is loaded.

    Args:
        by_layer: only one layer of the text encoder at a time is on the device.

    Raises:
        ValueError: the device is not there.
        OSError: the model cannot be loaded.
    """
    check_device(settings.device)
    pipe = _load_whole(settings, unet=None, vae=None)
    place(pipe, settings.device, "sequential" if by_layer else "none")
    arguments = prompt_arguments(pipe, settings, reference_images)
    del pipe
    gc.collect()
    if torch.device(settings.device).type != "cpu":
        torch.accelerator.empty_cache()
    return arguments


def download_model(model: str) -> Path:
    """Fetch the pipeline of a Hub id, as `load_model` would; returns its folder in the cache, named after the revision."""
    return Path(KosmosGPipeline.download(model, use_safetensors=True))


def load_unet(source: str | Path, like: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net that takes the place of a model's, in the same dtype.

    Args:
        source: folder or Hub id of a U-Net or of a Stable Diffusion, in diffusers' format; or a single .safetensors or .ckpt
            file, as fine-tunes are shared, a whole checkpoint or the U-Net alone.
        like: the U-Net whose place it takes. A single file holds weights alone; the layers are those of this one.

    Raises:
        ValueError: there is no such U-Net, or it cannot be read.
    """
    path = Path(source)
    if not path.exists() and (
        str(source).count("/") != 1 or path.is_absolute() or path.suffix in UNET_SUFFIXES
    ):
        raise ValueError(
            f"There is no U-Net at {str(source)!r}. Pass a folder in diffusers' format, a .safetensors or .ckpt file, or a "
            "Hub id."
        )
    try:
        if path.is_file():
            with tempfile.TemporaryDirectory() as config:
                like.save_config(config)
                return load_single_file(UNet2DConditionModel, path, like, config=config, dtype=like.dtype)
        load = partial(load_pretrained, UNet2DConditionModel, str(source), dtype=like.dtype)
        if path.is_dir():
            return load(subfolder="unet" if (path / "unet").is_dir() else None)
        try:
            return load(subfolder="unet")
        except OSError:  # a repository of a U-Net alone
            return load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The U-Net {str(source)!r} cannot be loaded ({first_line(error)}). Take one made for the same Stable "
            "Diffusion, with 4 input channels; if it is on the Hub, run where there is a network."
        ) from error


def add_loras(pipe: Pipeline, loras: Sequence[LoraInput]) -> None:
    """Let LoRAs act on the U-Net of a pipeline, all at once; `loras` are LoraInputs. Raises as `add_lora`."""
    names = adapter_names(len(loras))
    for name, lora in zip(names, loras, strict=True):
        add_lora(pipe, lora.path, lora.scale, name)
    if len(loras) > 1:  # each that was added took the place of those before
        pipe.set_adapters(names, [float(lora.scale) for lora in loras])


def adapter_names(count: int) -> list[str]:
    """Names of the adapters of so many LoRAs."""
    return [LORA_NAME if index == 0 else f"{LORA_NAME}_{index}" for index in range(count)]


def add_lora(pipe: Pipeline, source: str | Path, scale: float, name: str = LORA_NAME) -> None:
    """Let a LoRA act on the U-Net of a pipeline, and no other.

    Args:
        source: a file, a folder or a Hub id.
        name: of the adapter.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is no such LoRA, or it does not fit.
    """
    try:
        pipe.load_lora_weights(source, adapter_name=name)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise
        raise ValueError(
            f"The LoRA {str(source)!r} cannot be loaded ({first_line(error)}). Pass a .safetensors file, or the Hub id of one "
            "where there is a network."
        ) from error
    pipe.set_adapters([name], [float(scale)])


def pipeline_for(
    pipe: KosmosGPipeline, settings: GenerationSettings, controlnets: Sequence[ControlNetModel] = ()
) -> Pipeline:
    """The pipeline that draws settings: text-to-image, image-to-image or inpainting, with the components of `pipe`.

    Args:
        controlnets: one for each control of the settings.
    """
    pipeline = PIPELINES[bool(settings.controls), settings.init_image is not None, settings.mask is not None]
    if not settings.controls:
        return pipe if pipeline is KosmosGPipeline else pipeline.from_pipe(pipe)
    return pipeline.from_pipe(pipe, controlnet=controlnets if len(controlnets) > 1 else controlnets[0])


def control_arguments(
    settings: GenerationSettings, paths: Sequence[str | Path], short_side: int
) -> dict[str, Any]:
    """What a ControlNet pipeline is called with for the controls of the settings.

    The image gets the size that the settings ask for; else that of a control image that is ready; else the shape of the
    first of its images, its shorter side `short_side` pixels. Annotators run on the CPU, so that every device gets the same
    control image.

    Args:
        paths: for each control of the image that it is made of, or of the control image itself.

    Raises:
        ValueError: an image or a control image does not fit that size; see also `control_image`.
    """
    controls = list(zip(settings.controls, paths, strict=True))
    images = [open_control(control.name, path) if control.ready else None for control, path in controls]
    size = (settings.height, settings.width)
    if size == (None, None):
        size = next((_size_of(image) for image in images if image is not None), size)
    for index, (control, path) in enumerate(controls):
        if images[index] is None:
            asked = {"height": size[0], "width": size[1], "short_side": short_side}
            images[index] = control_image(control.name, path, **asked)
        own = _size_of(images[index])
        if any(side not in (None, own_side) for side, own_side in zip(size, own, strict=True)):
            raise ValueError(
                f"The control image {str(path)!r} has the height and width {own}, and an image of {size} is made. Pass "
                "control images of one size, and --height and --width, if at all, of that size."
            )
        size = own
    lists = {
        "image": images,
        "controlnet_conditioning_scale": [float(control.scale) for control, _ in controls],
        "control_guidance_start": [float(control.start) for control, _ in controls],
        "control_guidance_end": [float(control.end) for control, _ in controls],
    }
    if len(controls) == 1:  # a single ControlNet takes no lists
        lists = {name: values[0] for name, values in lists.items()}
    return {"height": size[0], "width": size[1], **lists}


def change_arguments(settings: GenerationSettings, image: Any, mask: Any, short_side: int) -> dict[str, Any]:
    """What a pipeline is called with for the image that the settings change; it gets its size as `control_arguments` says.

    Args:
        image: what `open_image` takes.
        mask: the same, of the image's shape, or None.

    Raises:
        ValueError: an image cannot be read or does not fit.
    """
    image = open_image(image, "The image to change")
    height, width = control_size(image, settings.height, settings.width, short_side, UNCHANGEABLE)
    arguments = {"height": height, "width": width, "strength": float(settings.strength)}
    if mask is not None:
        mask = read_mask(mask)
        if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
            raise ValueError(
                f"The mask has {mask.width} x {mask.height} pixels and the image {image.width} x {image.height}. Pass a mask of "
                "the image's shape."
            )
        arguments["mask_image"] = mask.resize((width, height), PIL.Image.Resampling.NEAREST)
    arguments["image"] = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    return arguments


def read_mask(mask: Any) -> PIL.Image.Image:
    """A mask -> L PIL image, light where an image is drawn anew: where the mask is transparent, or light where nothing of it is.

    ValueError, TypeError: as `open_mask`; or it marks nothing.
    """
    image = read_image(mask, "The mask", any_channels=True)
    if image.has_transparency_data:
        alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
        if alpha.getextrema()[0] < 255:
            return alpha.point(lambda value: 255 - value)
        image = image.convert("RGB")
    return open_mask(image, "The mask")


def _size_of(image):
    """PIL image or tensor (1, 3, H, W) -> (H, W)."""
    return tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else (image.height, image.width)


def generate_images(
    pipe: Pipeline,
    settings: GenerationSettings,
    reference_images: Sequence[Any],
    control_images: Sequence[str | Path] = (),
    changed: Sequence[Any] = (),
) -> Iterator[tuple[PIL.Image.Image, GenerationSettings]]:
    """Make the images of a run, one after the other, and yield each with settings that make it alone.

    Args:
        reference_images: what `images=` of the pipeline takes, one for each `<i>` of the prompt.
        control_images: paths, see `control_arguments`.
        changed: see `size_arguments`.
    """
    arguments = size_arguments(pipe, settings, control_images, changed)
    arguments.update(prompt_arguments(pipe, settings, reference_images))
    yield from draw_images(pipe, settings, arguments)


def own_size(pipe: Pipeline) -> tuple[int, int]:
    """(height, width) of what a pipeline draws unless it is told otherwise, in pixels."""
    size = pipe.unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else size
    return tuple(side * pipe.vae_scale_factor for side in sides)


def size_arguments(
    pipe: Pipeline,
    settings: GenerationSettings,
    control_images: Sequence[str | Path] = (),
    changed: Sequence[Any] = (),
) -> dict[str, Any]:
    """What a pipeline is called with for the size of an image, its controls, and what is changed, if there is any of it.

    Args:
        changed: of settings with `init_image`, that image, and its mask if they have one; what `open_image` takes.
    """
    # diffusers ignores a height without a width, and the other way round
    height, width = own_size(pipe)
    short_side, change = min(height, width), {}
    if settings.init_image is not None:
        image, mask = (*changed, None)[:2]
        change = change_arguments(settings, image, mask, short_side)
        settings = replace(settings, height=change["height"], width=change["width"])
    if settings.controls:
        arguments = control_arguments(settings, control_images, short_side)
        if change:
            arguments["control_image"] = arguments.pop("image")
        return {**change, **arguments}
    return change or {"height": settings.height or height, "width": settings.width or width}


def prompt_arguments(
    pipe: Pipeline, settings: GenerationSettings, reference_images: Sequence[Any], return_maps: bool = False
) -> dict[str, Any]:
    """What a pipeline is called with for the prompts of the settings: encoded, unless maps of its images are needed."""
    if return_maps or settings.is_guided:
        arguments = {"prompt": pipe.get_processor().parse(settings.prompt, reference_images)}
        arguments |= {"negative_prompt": settings.negative_prompt, "binding": settings.binding}
        if settings.negative_prompt is None and settings.guidance > 1:
            arguments["negative_prompt_embeds"] = null_condition(pipe)
        return arguments | {"regions": list(settings.regions) or None, "return_maps": return_maps}
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(
            settings.prompt,
            images=reference_images,
            negative_prompt=settings.negative_prompt,
            do_classifier_free_guidance=settings.guidance > 1,
        )
    return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}


@torch.no_grad()
def null_condition(pipe: Pipeline) -> torch.Tensor:
    """(1, K, A) that guidance draws away from where there is no negative prompt: made once for all calls of a pipeline."""
    return pipe.encode_prompt("", do_classifier_free_guidance=False)[0]


def draw_images(
    pipe: Pipeline,
    settings: GenerationSettings,
    arguments: dict[str, Any],
    callback_on_step_end: Callable[..., Any] | None = None,
    indices: Sequence[int] | None = None,
    take_maps: Callable[[torch.Tensor, list[str]], None] | None = None,
) -> Iterator[tuple[PIL.Image.Image, GenerationSettings]]:
    """Call a pipeline for each image of a run, and yield the image with settings that make it alone.

    Image k has a generator of its own, seeded with `settings.seed + k`, and a pipeline call of its own: in a batch
    the same image would differ by rounding. So the settings that come with it give the same pixels again, bit for
    bit, on the same machine with the same package versions.

    Args:
        arguments: of `size_arguments` and `prompt_arguments`, together.
        callback_on_step_end: as diffusers calls it; None shows a progress bar on the terminal instead.
        indices: places in the run of those to draw; None draws all.
        take_maps: is called with the maps of each image and their labels, before it is yielded; `prompt_arguments` was asked
            for them.

    Raises:
        ValueError: an image is not finite, in float16 above all.
    """
    size = {name: arguments[name] for name in ("height", "width")}
    for index in range(settings.num_images) if indices is None else indices:
        seed = settings.seed + index
        pipe.set_progress_bar_config(
            desc=f"image {index + 1} of {settings.num_images}, seed {seed}",
            disable=callback_on_step_end is not None,
        )
        pipe.warns_outside_world = index == 0  # all images of a run have one size
        try:
            output = pipe(
                **call_arguments(pipe, settings, arguments),
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=callback_on_step_end,
                output_type="np",
            )
        finally:
            pipe.warns_outside_world = True
        (image,) = finite_images(pipe, output.images, [seed])
        if take_maps is not None:
            take_maps(output.maps[0], output.map_labels[0])
        made = {"seed": seed, "num_images": 1, "index": index, "versions": package_versions(), **size}
        yield image, replace(settings, **made)


def call_arguments(pipe: Pipeline, settings: GenerationSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with what the settings alone decide, for a pipeline of the settings' task."""
    if settings.init_image is not None and settings.mask is None and not settings.controls:
        # image-to-image takes the size of its image
        arguments = {name: value for name, value in arguments.items() if name not in ("height", "width")}
    return {**arguments, "num_inference_steps": settings.steps, "guidance_scale": settings.guidance}


def finite_images(pipe: Pipeline, pixels: np.ndarray, seeds: Sequence[int]) -> list[PIL.Image.Image]:
    """Pixels (N, H, W, 3) that a pipeline drew -> PIL images, none of them made black by NaN.

    Raises:
        ValueError: the image of a seed has values that are NaN or infinite.
    """
    for seed, one in zip(seeds, pixels, strict=True):
        if not np.isfinite(one).all():
            text = f"The image of seed {seed} has values that are NaN or infinite, and was not written."
            if pipe.unet.dtype == torch.float16:
                raise ValueError(
                    f"{text} float16 was too narrow for it: pass --dtype float32 or bfloat16, or in Python keep the VAE alone in "
                    "float32 (output_type='latent', then pipe.vae.float().decode)."
                )
            raise ValueError(
                f"{text} Try another scheduler, a guidance nearer to 7.5, or weights from elsewhere."
            )
    return pipe.image_processor.numpy_to_pil(pixels)


def generate_files(
    pipe: Pipeline,
    settings: GenerationSettings,
    paths: Sequence[Path],
    reference_images: Sequence[Any],
    control_images: Sequence[str | Path] = (),
    changed: Sequence[Any] = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
    enlarged: int = 1,
    maps: bool = False,
    marker: Marker = MARKED,
    encoded: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Make the images of a run and write them; yields each path once its file is complete.

    Args:
        pipe: of `load_pipeline`.
        paths: of `output_paths`: for each image, then, if there are several, for a grid of them with the settings of the
            whole run, then for an enlarged copy of the last of these.
        reference_images, control_images, changed: as in `generate_images`.
        overwrite: replace files that are there.
        resume: keep those that are there.
        enlarged: how many times as long the sides of the enlarged copy are; 1 makes none.
        maps: also write, next to each image, where each image of the prompt went (`maps_path`).
        marker: a `provenance.Marker`.
        encoded: of `encode_first`, for a pipeline without a text encoder; not with `maps`.

    Raises:
        ValueError: an image that is to be kept was made with other settings, see `read_kept`; one is not finite.
    """
    arguments = size_arguments(pipe, settings, control_images, changed)
    settings = replace(settings, height=arguments["height"], width=arguments["width"], index=None)
    kept = read_kept(settings, paths) if resume else {}
    missing = [
        path
        for path in paths[: settings.num_images]
        if path not in kept or (maps and not (resume and maps_path(path).exists()))
    ]
    if missing:
        arguments.update(encoded or prompt_arguments(pipe, settings, reference_images, maps))
    found, images = [], []
    take_maps = (lambda *of_image: found.append(of_image)) if maps else None
    indices = [paths.index(path) for path in missing]
    drawn = draw_images(pipe, settings, arguments, indices=indices, take_maps=take_maps)
    for path in paths[: settings.num_images]:
        image = kept.get(path)
        if path in missing:
            again, image_settings = next(drawn)
            if image is None:
                image = again
                write_png(image, path, image_settings, overwrite, marker)
        images.append(image)
        yield path
        if maps and path in missing:
            overlay = draw_overlay(image, *found.pop())
            write_png(overlay, maps_path(path), image_settings, overwrite or resume, marker)
            yield maps_path(path)
    run_settings = settings if len(images) > 1 else replace(settings, index=0)
    shown = images[0]
    if len(images) > 1:
        path = paths[settings.num_images]
        shown = kept.get(path)
        if shown is None:
            shown = grid_of(images)
            write_png(shown, path, run_settings, overwrite, marker)
        yield path
    if enlarged > 1:
        write_png(enlarge(shown, enlarged), paths[-1], run_settings, overwrite or resume, marker)
        yield paths[-1]
