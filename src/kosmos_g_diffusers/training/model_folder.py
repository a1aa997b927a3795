"""The pipeline folder that a run starts from, and those it writes: complete, with what did not change linked, not copied."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import diffusers
from diffusers import DDIMScheduler

from ..conversion.folder import locate
from ..conversion.target import MODEL_FOLDER, TOKENIZER_FOLDER, VARIANT
from ..files import follow_umask, read_json, write_text
from ..pipeline_kosmos_g import KosmosGPipeline
from . import adapters, checkpoints

INDEX, CARD = "model_index.json", "README.md"
# what draws, besides the text encoder and its tokenizer
DECODER = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
DECODER_FOLDER = "decoder"  # of a run: the target's parts, in the place of the model's
NOT_LINKED = (checkpoints.STATE, adapters.FOLDER, CARD)
LINKED_SIZE = 2**20  # bytes; smaller files are copied, for people edit them
CARD_HEADING = "## Trained further"


def locate_model(model):
    """The folder of a Kosmos-G pipeline, which may be a Hub id.

    Raises:
        ValueError: it is neither, or something else that training writes.
    """
    if not model:
        raise ValueError(
            "No model was given. Pass --model with a folder that kosmos-g init or kosmos-g convert wrote, a checkpoint, "
            "or a Hub id."
        )
    folder = locate(model, "model", "what kosmos-g init or kosmos-g convert wrote")
    if (folder / "text_encoder" / "config.json").is_file():
        return folder
    if found := checkpoints.list_checkpoints(folder):
        raise ValueError(
            f"{folder} is the folder of a run. Pass one of its checkpoints, such as {found[-1]}."
        )
    if (folder / adapters.FOLDER).is_dir():
        raise ValueError(
            f"{folder} holds an adapter, not a model. Load it onto the model it was trained on with load_adapter, call "
            "merge_adapter, save the pipeline, and pass that folder."
        )
    raise ValueError(f"{folder} holds no text_encoder/config.json. Pass what kosmos-g init or convert wrote.")


def load_scheduler(folder):
    """The scheduler of a pipeline folder, of the class that model_index.json names."""
    index = _read_index(folder)
    _, name = index.get("scheduler", ("diffusers", DDIMScheduler.__name__))
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")


def save_decoder(target, target_model, target_tokenizer, model_folder, run):
    """Write RUN/decoder: the text encoder that is imitated, and what draws with it, in the layout of a pipeline folder.

    Args:
        target: Stable Diffusion, folder or Hub id. A folder with text encoder and tokenizer alone leaves the model's
            own U-Net, VAE and scheduler.
        target_model, target_tokenizer: its text encoder, as `load_target` reads it.
        model_folder: of the model that is trained.
        run: folder of the run.
    """
    folder = Path(run) / DECODER_FOLDER
    if folder.exists():
        return
    partial = Path(run) / f".checkpoint-{DECODER_FOLDER}.partial"  # cleared away with those of checkpoints
    partial.mkdir()
    target_model.save_pretrained(partial / MODEL_FOLDER, variant=VARIANT)
    target_tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
    index = _read_index(model_folder)
    if not Path(target).is_dir() or (Path(target) / "unet").is_dir():
        pipeline = KosmosGPipeline.from_pretrained(str(target), text_encoder=None, tokenizer=None)
        for name in DECODER:
            part = pipeline.components.get(name)
            index[name] = [None, None]
            if part is not None:
                part.save_pretrained(partial / name)
                index[name] = [_library(part), type(part).__name__]
        index["requires_safety_checker"] = pipeline.config.requires_safety_checker
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    follow_umask(partial)
    partial.rename(folder)


def decoder_folder(model_folder, run):
    """Where U-Net, VAE and scheduler of a run's checkpoints come from."""
    own = Path(run) / DECODER_FOLDER
    return own if (own / "unet").is_dir() else Path(model_folder)


def complete(folder, sources, config):
    """Fill a folder with what training does not write: hard links to the files of a pipeline folder, or copies.

    Args:
        folder: with the parts that were trained.
        sources: folders, the earlier ones before the later ones where both have a part.
        config: TrainConfig, for the model card.
    """
    folder = Path(folder)
    for source in sources:
        for path in sorted(Path(source).iterdir()):
            if path.name in NOT_LINKED or path.name.startswith(".") or (folder / path.name).exists():
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=_link)
            else:
                _link(path, folder / path.name)
    _forget_world(folder / "tokenizer" / "tokenizer_config.json")
    cards = [Path(source) / CARD for source in sources if (Path(source) / CARD).is_file()]
    card = cards[-1].read_text(encoding="utf-8") if cards else "# Kosmos-G for diffusers\n"
    card = card.partition(CARD_HEADING)[0].rstrip()
    settings = {name: value for name, value in asdict(config).items() if value not in ("", ())}
    for name in ("model", "output", "data", "target", "cache", "sample_prompts"):
        settings.pop(name, None)
    text = (
        f"{card}\n\n{CARD_HEADING}\n\nThe text encoder comes from `kosmos-g train {config.stage}`, whatever the table says "
        f"of its origin; with the settings\n\n```json\n{json.dumps(settings, indent=2)}\n```\n"
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _forget_world(path):
    """What a small model says of its training holds no longer: it was trained on other data."""
    if path.is_file():
        settings = read_json(path, "Pass a model whose tokenizer can be read.")
        if settings.pop("world", None) is not None:
            write_text(path, json.dumps(settings, indent=2) + "\n")  # a new file: this one may be a link


def _link(source, target):
    """Link a file, or copy it where that cannot be done, and if it is small."""
    source = os.path.realpath(source)  # the Hub's cache links to its files
    if os.path.getsize(source) >= LINKED_SIZE:
        with suppress(OSError):  # another disk, or one without links
            return os.link(source, target)
    shutil.copyfile(source, target)


def _library(part):
    """As model_index.json names where a class is: a library, or a module of diffusers' pipelines."""
    names = type(part).__module__.split(".")
    return names[2] if names[:2] == ["diffusers", "pipelines"] else names[0]


def _read_index(folder):
    return read_json(Path(folder) / INDEX, "Pass a whole pipeline folder, as kosmos-g init writes.")
