"""The pipeline folder that a run starts from, and those it writes: complete, with what did not change linked, not copied.

And the folder that an adapter becomes part of.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import DDIMScheduler
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from .. import modeling_kosmos_g, pipeline_kosmos_g, processing_kosmos_g
from ..conversion.folder import (
    SHARD_SIZE,
    appearing_atomically,
    check_output,
    locate,
    public_name,
    write_model,
)
from ..conversion.target import MODEL_FOLDER, TOKENIZER_FOLDER, VARIANT
from ..environment import DTYPES, as_dtype
from ..files import follow_umask, read_json, write_text
from ..loading import IncompleteWeights, load_pretrained
from ..model_card import MARKER
from ..modeling_kosmos_g import KosmosGTextEncoder
from ..pipeline_kosmos_g import KosmosGPipeline
from ..quiet import brief_bars
from . import adapters, checkpoints
from .config import TrainConfig

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from .config import TrainConfig

INDEX, CARD = "model_index.json", "README.md"
# what draws, besides the text encoder and its tokenizer
DECODER = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
DECODER_FOLDER = "decoder"  # of a run: the target's parts, in the place of the model's
NOT_LINKED = (checkpoints.STATE, adapters.FOLDER, CARD)
LINKED_SIZE = 2**20  # bytes; smaller files are copied, for people edit them
CARD_HEADING, MERGED_HEADING = "## Trained further", "## Adapter"
NO_CARD = "# Kosmos-G for diffusers"


def locate_model(model: str | Path) -> Path:
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
            f"{folder} holds an adapter, not a model. Make a folder of it and of the model it was trained on, and pass that: "
            f"kosmos-g train merge --adapter {folder} --model MODEL --output FOLDER"
        )
    raise ValueError(f"{folder} holds no text_encoder/config.json. Pass what kosmos-g init or convert wrote.")


def load_scheduler(folder: Path) -> "SchedulerMixin":
    """The scheduler of a pipeline folder, of the class that model_index.json names."""
    index = _read_index(folder)
    _, name = index.get("scheduler", ("diffusers", DDIMScheduler.__name__))
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")


@brief_bars()
def save_decoder(
    target: str | Path,
    target_model: CLIPTextModel,
    target_tokenizer: PreTrainedTokenizerBase,
    model_folder: Path,
    run: str | Path,
) -> None:
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


def decoder_folder(model_folder: str | Path, run: str | Path) -> Path:
    """Where U-Net, VAE and scheduler of a run's checkpoints come from."""
    own = Path(run) / DECODER_FOLDER
    return own if (own / "unet").is_dir() else Path(model_folder)


def complete(folder: Path, sources: Sequence[Path], config: "TrainConfig") -> None:
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
    card = cards[-1].read_text(encoding="utf-8") if cards else NO_CARD
    card = card.partition(CARD_HEADING)[0].rstrip()
    settings = _shared_settings(config)
    origin = (
        f"The text encoder comes from `kosmos-g train {config.stage}`, whatever the table says of its origin"
    )
    text = f"{card}\n\n{CARD_HEADING}\n\n{origin}; with the settings\n\n{_as_block(settings)}"
    (folder / CARD).write_text(text, encoding="utf-8")


def merge_into_folder(model: str | Path, adapter: str | Path, output: str | Path) -> Path:
    """Write a pipeline folder with an adapter merged into its text encoder; everything else is copied.

    The sum is computed in float32 and kept in the dtype of the model's files.

    Args:
        model: folder or Hub id of the pipeline that the adapter was trained on.
        adapter: its folder, or a checkpoint of `kosmos-g train instruct --lora-rank`.
        output: folder to write; it appears atomically.

    Returns:
        The path of `output`.

    Raises:
        ValueError: there is no such model or adapter, they do not fit, or the output is there already.
        ImportError: peft is not installed.
    """
    output, adapter = check_output(output), adapters.find_adapter(adapter)
    folder = locate_model(model)
    try:
        encoder = load_pretrained(KosmosGTextEncoder, folder, subfolder="text_encoder")
    except IncompleteWeights as error:
        raise ValueError(f"The text_encoder of {folder} cannot be read: {error}. Get it again.") from error
    adapters.load_adapter(encoder, adapter)
    rank = encoder.peft_config[adapters.NAME].r
    adapters.merge_adapter(encoder)
    kept = read_json(folder / "text_encoder" / "config.json").get("dtype")
    encoder.to(as_dtype(kept) if kept in DTYPES else torch.float32)
    with appearing_atomically(output) as place:
        write_model(encoder, place / "text_encoder", max_shard_size=SHARD_SIZE)
        for path in sorted(folder.iterdir()):
            if path.name in NOT_LINKED or path.name.startswith(".") or (place / path.name).exists():
                continue
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, place / path.name)
        for module in (modeling_kosmos_g, processing_kosmos_g, pipeline_kosmos_g):
            for path in place.rglob(Path(module.__file__).name):  # all of one version
                shutil.copyfile(module.__file__, path)
        _forget_world(place / "tokenizer" / "tokenizer_config.json")
        (place / CARD).write_text(_merged_card(folder, model, adapter, rank), encoding="utf-8")
    return output


def _merged_card(folder, model, adapter, rank):
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else f"{NO_CARD}\n"
    # it says what saving the folder again could not tell
    card = card.replace(MARKER, "").rstrip()
    text = (
        f"An adapter (LoRA of rank {rank}) is merged into the text encoder, whatever the table says of its origin; the rest is "
        f"that of {public_name(model)}."
    )
    # where it is of a run: RUN/checkpoint-.../adapter
    with suppress(OSError, ValueError, TypeError):
        config = TrainConfig.load(adapter.parent.parent / checkpoints.SETTINGS)
        text += f" It comes from `kosmos-g train {config.stage}` with the settings\n\n{_as_block(_shared_settings(config))}"
    return f"{card}\n\n{MERGED_HEADING}\n\n{text.rstrip()}\n"


def _shared_settings(config):
    """Of a TrainConfig, what differs from nothing and names no place on a machine."""
    settings = {name: value for name, value in asdict(config).items() if value not in ("", ())}
    for name in ("model", "output", "data", "target", "cache", "sample_prompts"):
        settings.pop(name, None)
    return settings


def _as_block(settings):
    return f"```json\n{json.dumps(settings, indent=2)}\n```\n"


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
