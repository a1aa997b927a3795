"""From settings to image files: what `kosmos-g generate` does once its flags are read."""

from dataclasses import replace

import torch

from .control import build_random_controlnet, control_image, load_controlnet, open_control
from .pipeline_kosmos_g import DTYPE_KEYWORD, KosmosGControlNetPipeline, KosmosGPipeline
from .schedulers import make_scheduler
from .settings import grid_of, output_paths, write_png
from .tiny import build_tiny_pipeline


def default_device():
    """The accelerator of this machine, or "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def load_pipeline(settings):
    """Load the model that the settings name, on their device, with their scheduler.

    Raises:
        ValueError: the device is not there, or there is nothing to offload from.
        OSError: the model cannot be loaded.
    """
    device = torch.device(settings.device)
    if device.type not in ("cpu", default_device()):
        raise ValueError(
            f"The device {settings.device!r} is not there; {default_device()!r} is. Pass --device."
        )
    if settings.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"Offload {settings.offload!r} saves memory of an accelerator, and the device is the CPU."
        )
    dtype = getattr(torch, settings.dtype)
    if settings.model is None:
        pipe = build_tiny_pipeline()
        if dtype != pipe.dtype:
            pipe.to(dtype)
    else:
        # Kosmos-G folders never hold pickle files; refuse to load any
        pipe = KosmosGPipeline.from_pretrained(settings.model, use_safetensors=True, **{DTYPE_KEYWORD: dtype})
    if settings.controls:
        pipe = KosmosGControlNetPipeline.from_pipe(pipe, controlnet=_load_controlnets(settings, pipe.unet))
    if settings.scheduler is not None:
        pipe.scheduler = make_scheduler(settings.scheduler, pipe.scheduler.config)
    if settings.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif settings.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _load_controlnets(settings, unet):
    """The ControlNet of each control; for the small random model, which none was made for, random ones."""
    controlnets = [
        build_random_controlnet(unet, index)
        if settings.model is None and control.controlnet is None
        else load_controlnet(control.controlnet or control.name, getattr(torch, settings.dtype))
        for index, control in enumerate(settings.controls)
    ]
    return controlnets if len(controlnets) > 1 else controlnets[0]


def control_arguments(settings, pictures, short_side):
    """What a ControlNet pipeline is called with for the controls of the settings.

    The image gets the size that the settings ask for; else that of a control image that is ready; else the shape of the
    first picture, its shorter side `short_side` pixels. Annotators run on the CPU, so that every device gets the same
    control image.

    Args:
        pictures: for each control the path of its picture, or of the control image itself.

    Raises:
        ValueError: a picture or a control image does not fit that size; see also `control_image`.
    """
    controls = list(zip(settings.controls, pictures, strict=True))
    images = [open_control(control.name, path) if control.ready else None for control, path in controls]
    size = (settings.height, settings.width)
    if size == (None, None):
        size = next((_size_of(image) for image in images if image is not None), size)
    for index, (control, path) in enumerate(controls):
        if images[index] is None:
            height, width = size
            images[index] = control_image(
                control.name, path, height=height, width=width, short_side=short_side
            )
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


def _size_of(image):
    """PIL image or tensor (1, 3, H, W) -> (H, W)."""
    return tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else (image.height, image.width)


def generate_images(pipe, settings, pictures, control_pictures=()):
    """Make the images of a run, one after the other, and yield each with settings that make it alone.

    Image k has a generator of its own, seeded with `settings.seed + k`, and a pipeline call of its own: in a batch
    the same image would differ by rounding. So the settings that come with it give the same pixels again, bit for
    bit, on the same machine with the same package versions. The prompt is encoded once.

    Args:
        pictures: what `images=` of the pipeline takes, one picture for each `<i>` of the prompt.
        control_pictures: see `control_arguments`.
    """
    # diffusers ignores a height without a width, and the other way round
    sides = pipe.unet.config.sample_size
    height, width = (
        side * pipe.vae_scale_factor for side in ((sides, sides) if isinstance(sides, int) else sides)
    )
    if settings.controls:
        arguments = control_arguments(settings, control_pictures, min(height, width))
    else:
        arguments = {"height": settings.height or height, "width": settings.width or width}
    size = {"height": arguments["height"], "width": arguments["width"]}
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(
            settings.prompt,
            images=pictures,
            negative_prompt=settings.negative_prompt,
            do_classifier_free_guidance=settings.guidance > 1,
        )
    for index in range(settings.num_images):
        seed = settings.seed + index
        pipe.set_progress_bar_config(desc=f"image {index + 1} of {settings.num_images}, seed {seed}")
        image = pipe(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            **arguments,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        yield image, replace(settings, seed=seed, num_images=1, index=index, **size)


def generate_files(settings, pictures, output, overwrite=False, control_pictures=()):
    """Load the model, make the images and write them; yields each path once its file is whole.

    Args:
        pictures, control_pictures: as in `generate_images`.
        output: a path ending in .png. One image goes there; several go to `<stem>_0.png`, `<stem>_1.png`, ..., and a
            grid of them to `output`, with the settings of the whole run.
        overwrite: replace files that are there.

    Raises:
        ValueError, OSError: see `load_pipeline` and the pipeline. Nothing is written then.
        FileExistsError: a file of the run is there already. No model has been loaded then.
    """
    paths = output_paths(output, settings.num_images)
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{', '.join(existing)} would be overwritten. Pass --force, or another --output."
        )
    if not paths[0].parent.is_dir():
        raise ValueError(f"There is no folder {str(paths[0].parent)!r} to write into. Make it first.")
    pipe = load_pipeline(settings)
    images = []
    made = generate_images(pipe, settings, pictures, control_pictures)
    for (image, image_settings), path in zip(made, paths, strict=False):
        write_png(image, path, image_settings, overwrite)
        images.append(image)
        yield path
    if len(images) > 1:
        run_settings = replace(settings, height=image.height, width=image.width, index=None)
        write_png(grid_of(images), paths[-1], run_settings, overwrite)
        yield paths[-1]
