"""The first pass over a manifest: its images, made by any number of processes; a run that was killed is resumed.

A results folder:

    manifest.jsonl          what is run (manifest.py)
    words/                  input images of several prompts, encoded once, as image words
    images/<id>.png         with prompt, seed and settings inside (generation/png.py)
    maps/<id>.safetensors   where the images of the prompt went, if a scorer asks for it
    scores/<scorer>.jsonl   a line for each image (scoring.py)
    report.json, report.md, plots/, sheets/    (report.py)

Batches are the same in every process and after every kill, and a batch that is incomplete is computed whole. So what is
written does not depend on who writes it: not even by the rounding with which some kernels tell batches apart.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm.auto import tqdm

from ..files import hash_bytes, hash_folder, remove_partial_files, write_bytes
from ..generation.generate import (
    VISION_CACHE_BYTES,
    download_model,
    finite_images,
    load_pipeline,
    null_condition,
)
from ..generation.png import read_settings, write_png
from ..generation.settings import GenerationSettings, InputImage
from ..modeling_kosmos_g import VisionCache
from ..processing_kosmos_g import IMAGE_MARK, open_image
from ..provenance import MARKED, UNMARKED, Marker, read_mark
from ..sprites.pretrained import SPRITES, with_small_model
from .generated import Generated
from .manifest import FILE_NAME, Manifest, Task, hash_images

if TYPE_CHECKING:
    from accelerate import PartialState

COMPONENTS = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")  # what decides an image
IN_IMAGES = (
    "steps",
    "guidance",
    "scheduler",
    "dtype",
    "binding",
    "quantize",
)  # settings of a run that images carry unchanged
INSTALL = "pip install 'kosmos-g-diffusers[eval]'"


def join_processes(device: str | torch.device) -> "PartialState":
    """accelerate's `PartialState`: this process alone, or one of those that `accelerate launch` has started.

    Raises:
        ImportError: accelerate is not installed.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(f"Evaluation needs the package accelerate: {INSTALL}") from error
    return PartialState(cpu=torch.device(device).type == "cpu")


def gather(state: "PartialState", values: list[Any]) -> list[Any]:
    """Lists of all processes, joined."""
    if state.num_processes == 1:
        return values
    from accelerate.utils import gather_object

    return gather_object(values)


def identify_model(model: str | Path | None) -> dict[str, Any]:
    """What tells a model from any other: its weights' SHA-256, or the revision on the Hub.

    Args:
        model: folder, Hub id, or None for the small model that ships.

    Raises:
        ValueError: the folder holds no model.
        OSError: there is no such folder, and nothing of that name can be fetched from the Hub.
    """
    if model is None:
        return {"path": None, "name": "sprites", "sha256": hash_folder(SPRITES, COMPONENTS)}
    if not Path(model).is_dir():
        try:
            revision = download_model(model).name
        except (OSError, ValueError) as error:
            raise OSError(
                f"The model {str(model)!r} is not a folder and cannot be fetched from the Hub ({error}). Pass the folder that "
                "kosmos-g convert has written, a Hub id, or no --model for the small one that ships."
            ) from error
        return {"path": model, "revision": revision}
    if not (Path(model) / "model_index.json").is_file():
        raise ValueError(
            f"The folder {str(model)!r} holds no model: it has no model_index.json. Pass the folder that kosmos-g convert "
            "has written."
        )
    return {"path": str(model), "sha256": hash_folder(model, COMPONENTS)}


def identify_generated(generated: Generated) -> dict[str, Any]:
    """What tells images that another model made from any others: their layout and a SHA-256 of all of them.

    Raises:
        ValueError: images cannot be read; all of them are named.
    """
    digests = hash_images(generated.folder, generated.files.values())
    lines = "".join(f"{name} {digests[path]}\n" for name, path in generated.files.items())
    return {"path": generated.folder, "layout": generated.layout, "sha256": hash_bytes(lines.encode())}


def open_folder(folder: str | Path, manifest: Manifest) -> None:
    """Write the manifest into a new results folder, or check that the folder holds this very run.

    Raises:
        ValueError: it holds a run of other settings, or something else.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).exists():
        left = sum(not image_path(folder, task).exists() for task in manifest.tasks)
        Manifest.read(folder).check_same(manifest, left)
        for place in folder.glob("**/"):
            remove_partial_files(place)
        return
    if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
        advice = "Pass another --output, or empty it."
        raise ValueError(f"{str(folder)!r} is there and is not a results folder. {advice}")
    manifest.write(folder)


def image_path(folder: str | Path, task: Task) -> Path:
    return Path(folder) / "images" / f"{task.id}.png"


def _maps_path(folder, task):
    return Path(folder) / "maps" / f"{task.id}.safetensors"


def read_maps(folder: str | Path, task: Task) -> torch.Tensor:
    """The (sources, h, w) maps of an image of a run that keeps them. ValueError if they are not there."""
    path = _maps_path(folder, task)
    try:
        return load(path.read_bytes())["maps"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"The maps {path} cannot be read. Delete the image {task.id}, and both are made again."
        ) from error


def check_complete(folder: str | Path, manifest: Manifest) -> None:
    """ValueError if images of a run are still to be made."""
    missing = [task.id for task in manifest.tasks if not image_path(folder, task).exists()]
    if missing:
        made = f"{len(missing)} images of {str(folder)!r} are not made yet, such as {missing[0]}"
        raise ValueError(f"{made}. Finish the run first.")


# Images --------------------------------------------------------------------------------------------------------------


def generate(
    folder: str | Path,
    manifest: Manifest,
    state: "PartialState",
    device: str,
    repair: bool = False,
    marker: Marker = MARKED,
    offload: str = "none",
) -> int:
    """Make the images that are not there.

    Args:
        folder: results folder that `open_folder` has accepted.
        state: of `join_processes`.
        device: where to, if this process is alone; several take one each of the kind that `state` knows.
        repair: make images again that cannot be read.
        marker: a `provenance.Marker`.
        offload: of GenerationSettings.

    Returns:
        Number of images that this process has made.

    Raises:
        ValueError: images cannot be read, or have other settings; all of them are named.
    """
    folder = Path(folder)
    _check_images(folder, manifest, state, repair)
    batches = manifest.chunks(manifest.conditions["batch_size"])
    todo = [tasks for tasks in batches if not all(image_path(folder, task).exists() for task in tasks)]
    state.wait_for_everyone()  # nobody writes before all have looked
    if not todo:
        return 0
    settings = _base_settings(manifest, device if state.num_processes == 1 else state.device)
    pipe = load_pipeline(replace(with_small_model(settings), offload=offload))
    pipe.register_modules(safety_checker=None)  # it paints images black, and the paper's code has none
    pipe.set_progress_bar_config(disable=True)
    pipe.warns_outside_world = False  # a benchmark asks what it asks
    pipe.vision_cache = VisionCache(VISION_CACHE_BYTES)
    words = _prepare_words(pipe, folder, manifest, state)
    null = null_condition(pipe) if settings.guidance > 1 else None
    made = 0
    mine = todo[state.process_index :: state.num_processes]
    for tasks in tqdm(mine, desc="batches of images", disable=not state.is_main_process):
        images, maps = _draw(pipe, manifest, tasks, words, null)
        for index, (task, image) in enumerate(zip(tasks, images, strict=True)):
            path = image_path(folder, task)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if maps:  # before the image: one that is there has its maps
                write_bytes(_maps_path(folder, task), save({"maps": maps[index]}))
            write_png(image, path, _settings_of(settings, folder, manifest, task, image), marker=marker)
            made += 1
    state.wait_for_everyone()
    return made


def copy_generated(folder: str | Path, manifest: Manifest, state: "PartialState") -> None:
    """Copy the images that another model made into a results folder, as PNGs of the same pixels, and with the marks they have.

    Args:
        folder: results folder that `open_folder` has accepted.
        state: of `join_processes`.
    """
    for task in manifest.tasks[state.process_index :: state.num_processes]:
        path, source = (
            image_path(folder, task),
            Path(manifest.generated.folder) / manifest.generated.files[task.id],
        )
        if path.exists():
            continue
        with PIL.Image.open(source) as image:
            form = image.format
        if form == "PNG":
            write_bytes(path, source.read_bytes())
        else:
            marker_of(source).save(open_image(source, str(source), in_srgb=False), path)
    state.wait_for_everyone()


def marker_of(path: str | Path) -> Marker:
    """The `Marker` for a copy of an image: it is marked as the image is."""
    try:
        return MARKED if read_mark(path) else UNMARKED
    except ValueError:  # of no format with marks, or with XMP that cannot be read
        return UNMARKED


def repeated_inputs(manifest: Manifest) -> list[str]:
    """Input images that stand in several prompts: encoded once and for all, as image words."""
    prompts = {}
    for task in manifest.tasks:
        for path in task.pictures:
            prompts.setdefault(path, set()).add(task.prompt)
    return [path for path, found in prompts.items() if len(found) > 1]


def _prepare_words(pipe, folder, manifest, state):
    """Encode repeated input images, each in one process, and give them all to `pipe`; path -> image word."""
    digests = {manifest.pictures[path]: path for path in repeated_inputs(manifest)}
    files = {digest: folder / "words" / f"{digest[:16]}.safetensors" for digest in digests}
    missing = [digest for digest, path in files.items() if not path.exists()]
    state.wait_for_everyone()
    if digests:
        (folder / "words").mkdir(exist_ok=True)
    for digest in missing[state.process_index :: state.num_processes]:
        image = open_image(Path(manifest.data) / digests[digest], digests[digest])
        pipe.add_image_word(_word(digest), image)
        pipe.save_image_words(files[digest], [_word(digest)])
    state.wait_for_everyone()
    for digest, path in files.items():
        if _word(digest) not in pipe.image_words:
            try:
                pipe.load_image_words(path)
            except ValueError as error:
                raise ValueError(f"{error} Delete {path}, and it is made again.") from error
    return {path: _word(digest) for path, digest in manifest.pictures.items() if digest in digests}


def _word(digest):
    return f"<picture-{digest[:16]}>"


def _draw(pipe, manifest, tasks, words, null):
    """Images of one batch, each from a generator of its own, and their maps if they are kept."""
    prompts, input_images = [], []
    for task in tasks:
        prompt, *rest = task.prompt.split(IMAGE_MARK)
        paths = []
        for path, stretch in zip(task.pictures, rest, strict=True):
            prompt += words.get(path, IMAGE_MARK) + stretch
            if path not in words:
                paths.append(path)
        prompts.append(prompt)
        input_images.append([open_image(Path(manifest.data) / path, path) for path in paths])
    settings, seeds = manifest.settings, [task.seed for task in tasks]
    regions = [_regions_of(task) for task in tasks]
    output = pipe(
        prompts,
        images=input_images,
        negative_prompt_embeds=None if null is None else null.expand(len(tasks), -1, -1),
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="np",
        binding=settings.get("binding", 0.0),
        regions=regions if any(regions) else None,
        return_maps=manifest.keep_maps,
    )
    return finite_images(pipe, output.images, seeds), getattr(output, "maps", None)


def _regions_of(task):
    """Where a benchmark wants the images of a prompt; None for anywhere."""
    regions = (task.truth or {}).get("regions")
    return regions and [tuple(region) for region in regions]


def _base_settings(manifest, device):
    settings = {name: manifest.settings[name] for name in IN_IMAGES if name in manifest.settings}
    versions = manifest.conditions["versions"]
    path = manifest.model["path"]
    return GenerationSettings("", model=path, device=str(device), versions=versions, **settings)


def _settings_of(base, folder, manifest, task, image):
    """What is written into the image, so that `kosmos-g generate --from` can make it alone."""
    data = Path(manifest.data)
    places = [str(data / path) for path in task.pictures]
    if data.parent == folder:  # the run's own are found from the image, wherever the run is taken
        home = image_path(folder, task).parent
        places = [Path(os.path.relpath(place, home)).as_posix() for place in places]
    inputs = zip(places, task.pictures, strict=True)
    return replace(
        base,
        prompt=task.prompt,
        images=tuple(InputImage(place, manifest.pictures[path]) for place, path in inputs),
        seed=task.seed,
        regions=tuple(_regions_of(task) or ()),
        height=image.height,
        width=image.width,
        device=manifest.conditions["device"],  # not which one of them
    )


def _check_images(folder, manifest, state, repair):
    """Look at every image that is there; with `repair`, delete those that cannot be read."""
    damaged, foreign = [], []
    for task in manifest.tasks[state.process_index :: state.num_processes]:
        path = image_path(folder, task)
        if not path.exists():
            continue
        try:
            with PIL.Image.open(path, formats=["PNG"]) as image:
                image.verify()  # check sums; it closes the file
            with PIL.Image.open(path, formats=["PNG"]) as image:
                image.load()
            settings = read_settings(path)
        except (OSError, SyntaxError, ValueError) as error:
            damaged.append(f"{path} ({error})")
            if repair:
                path.unlink()
            continue
        expected = {name: manifest.settings[name] for name in IN_IMAGES if name in manifest.settings}
        expected |= {"prompt": task.prompt, "seed": task.seed}
        if any(getattr(settings, name) != value for name, value in expected.items()):
            foreign.append(str(path))
    damaged, foreign = gather(state, damaged), gather(state, foreign)
    if foreign:
        raise ValueError(
            f"{len(foreign)} images were made with other settings: {', '.join(foreign)}. Runs are never mixed: delete these "
            "files, or pass another --output."
        )
    if damaged and not repair:
        names = ", ".join(damaged)
        raise ValueError(f"{len(damaged)} images cannot be read: {names}. Pass --repair to make them again.")
