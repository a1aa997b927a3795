"""Writes a Kosmos-G folder: the parts of a Stable Diffusion and new ones, one model in memory at a time, each read back."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import CLIPImageProcessor

from .. import pipeline_kosmos_g
from ..environment import DTYPES, as_dtype
from ..files import (
    check_output_folder,
    describe_write_error,
    first_line,
    follow_umask,
    partial_folder,
)
from ..loading import IncompleteWeights, empty_model, load_pretrained, read_object
from ..model_card import write_model_card
from ..modeling_kosmos_g import KosmosGTextEncoder
from ..processing_kosmos_g import KosmosGTokenizer
from ..quiet import brief_bars
from .keys import shortened

# some releases of safetensors copy a file's weights before they write it
SHARD_SIZE = "500MB"

# What is read of a base at first; weights follow when it turns out that they are needed
BASE_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
    "safety_checker": "config.json",
    "feature_extractor": "preprocessor_config.json",
}
OPTIONAL = ("safety_checker", "feature_extractor")


# Arguments -----------------------------------------------------------------------------------------------------


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype that `dtype`, one of them or a name, says; None for None."""
    given = as_dtype(dtype) if dtype in DTYPES else dtype
    if given not in (None, *map(as_dtype, DTYPES)):
        raise ValueError(f"dtype is {dtype!r}. Pass one of float16, bfloat16, float32 or None.")
    return given


def check_output(output: str | Path) -> Path:
    """Path of a folder to write. Raises ValueError unless it is empty or can be made."""
    output = Path(output)
    if output.is_dir() and not any(output.iterdir()):
        return output
    if output.exists() or output.is_symlink():
        what = "a folder that is not empty" if output.is_dir() else "a file"
        raise ValueError(f"The output {output} is {what}. Pass a folder that does not exist yet.")
    return check_output_folder(output)


def locate(source: str | Path, kind: str, content: str, files: Iterable[str] | None = None) -> Path:
    """Folder with the files of `source`, its own or a download of them.

    Args:
        source: folder or Hub id.
        kind, content: what an error calls the source, and what it should be.
        files: names of those to download, for a Hub id; all if None.
    """
    folder = Path(source)
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=files and list(files)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {kind} {source} is not a folder, and not on the Hub as far as can be seen ({first_line(error)}). Pass "
            f"a folder with {content}, or its Hub id and a connection."
        ) from error


def public_name(source: str | Path) -> str:
    """A folder or Hub id as the output may name it: paths of this machine are private."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


# The base ------------------------------------------------------------------------------------------------------


class Base:
    """A Stable Diffusion in diffusers' layout: configurations are read at once, weights when they are asked for.

    Args:
        source: folder or Hub id.

    Attributes:
        parts: name -> model on the meta device, scheduler or feature extractor; None for one that the base lacks.
        name: what the output may call the base.

    Raises:
        ValueError: the base cannot be found, lacks a part, or has a part that cannot be read.
    """

    source: str | Path
    name: str
    parts: dict[str, Any]

    def __init__(self, source: str | Path):
        self.source, self.name = source, public_name(source)
        files = [f"{name}/{file}" for name, file in BASE_CONFIGS.items()]
        folder = locate(source, "base", "Stable Diffusion 1.5 in diffusers' layout", files)
        paths = {name: folder / name / file for name, file in BASE_CONFIGS.items()}
        missing = [name for name, path in paths.items() if not path.is_file()]
        required = [f"{name}/{BASE_CONFIGS[name]}" for name in missing if name not in OPTIONAL]
        if required:
            raise ValueError(
                f"The base {source} has no {', '.join(required)}. Pass a folder with Stable Diffusion 1.5 in diffusers' "
                "layout (a single file becomes one by StableDiffusionPipeline.from_single_file(file).save_pretrained(folder))."
            )
        self.parts = dict.fromkeys(OPTIONAL)
        self.parts["scheduler"] = _scheduler(paths["scheduler"])
        if "feature_extractor" not in missing:
            self.parts["feature_extractor"] = _feature_extractor(paths["feature_extractor"])
        models = {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "safety_checker": StableDiffusionSafetyChecker,
        }
        for name, model_class in models.items():
            if name not in missing:
                self.parts[name] = empty_model(model_class, folder / name)

    def weights(self, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """name -> tensor of the model `name`. Raises ValueError if the base does not have all of them."""
        try:
            model = load_pretrained(type(self.parts[name]), self.source, subfolder=name, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            if isinstance(error, IncompleteWeights):
                reason = f"{len(error.names)} are missing: {shortened(error.names)}"
            raise ValueError(
                f"The weights of {name} in the base {self.source} cannot be used ({reason}), and the checkpoint has none. "
                "Pass a complete folder with Stable Diffusion 1.5, or its Hub id and a connection."
            ) from error
        return model.state_dict()

    def build_pipeline(
        self, text_encoder: KosmosGTextEncoder, tokenizer: KosmosGTokenizer
    ) -> pipeline_kosmos_g.KosmosGPipeline:
        """KosmosGPipeline of the base's parts and these two."""
        return pipeline_kosmos_g.KosmosGPipeline(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            requires_safety_checker=self.parts["safety_checker"] is not None,
            **self.parts,
        )


def _scheduler(path):
    config = read_object(path, "Download the base again.")
    name = config.get("_class_name")
    scheduler_class = getattr(diffusers, str(name), None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        raise ValueError(
            f"The base's scheduler is of the class {name!r}, which diffusers {diffusers.__version__} does not have."
        )
    try:
        return scheduler_class.from_config(config)
    except Exception as error:  # whatever its settings make it raise
        raise ValueError(
            f"{path} does not describe a {name} ({first_line(error)[:200]}). Download the base again."
        ) from error


def _feature_extractor(path):
    read_object(path, "Download the base again.")
    try:
        return CLIPImageProcessor.from_pretrained(path.parent)
    except Exception as error:  # whatever its settings make it raise
        raise ValueError(
            f"{path} cannot be used ({first_line(error)[:200]}). Download the base again."
        ) from error


# Writing -------------------------------------------------------------------------------------------------------


@contextmanager
def appearing_atomically(output: Path) -> Iterator[Path]:
    """A hidden folder next to `output` that takes its name at the end; an exception or interruption leaves nothing."""
    place = output.resolve()
    above = next(folder for folder in place.parents if folder.is_dir())
    with partial_folder(above / place.relative_to(above).parts[0]) as hidden:
        yield hidden / place.relative_to(above)
        if place.is_dir():
            # empty, or this raises; not every system renames onto a folder
            place.rmdir()
        top = place.relative_to(above).parts[0]  # new folders above the output appear with it
        os.replace(hidden / top, above / top)


def write_pipeline(
    folder: Path,
    pipeline: pipeline_kosmos_g.KosmosGPipeline,
    weights: Mapping[str, Callable[[], dict[str, torch.Tensor]]],
    provenance: Mapping[str, str],
) -> None:
    """Write what `KosmosGPipeline.save_pretrained` writes, with one model in memory at a time.

    Args:
        folder: to write.
        pipeline: its models are on the meta device, and stay there.
        weights: name of a model -> function without arguments that reads its weights, {name: tensor}.
        provenance: of the model card, see `write_model_card`.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            write_model(part, folder / name, weights[name](), max_shard_size=SHARD_SIZE)
        elif part is not None:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
    pipeline.save_code(folder)
    write_model_card(pipeline, folder, provenance=provenance)


def write_model(
    model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None, **options: Any
) -> None:
    """Save a model and compare what was written with what was meant.

    Args:
        weights: {name: tensor} for a model on the meta device, to which it returns; None for one that has its own.
        options: of the model's `save_pretrained`.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
        RuntimeError: what was written does not read back as it should.
    """
    if weights is not None:
        model.load_state_dict(weights, strict=True, assign=True)
    try:
        with brief_bars():
            model.save_pretrained(folder, **options)
    except (OSError, SafetensorError) as error:
        reason = describe_write_error(error, folder.parent)
        raise OSError(f"{folder.name} cannot be written to {folder.parent} ({reason}).") from error
    follow_umask(folder)
    check_written(folder, model.state_dict())
    if weights is not None:
        model.to_empty(device="meta")


def check_written(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Read the weights back, one at a time, and compare them with what was meant."""
    left = set(weights)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
        for key in keys:
            with safe_open(path, framework="pt") as file:  # opened for each, so that memory holds one
                same = key in left and same_bytes(file.get_tensor(key), weights[key])
            if not same:
                raise RuntimeError(
                    f"{key} in {folder.name} was not written as it is. Is the disk full or faulty? Convert again."
                )
            left.remove(key)
    if left:
        names = shortened(sorted(left))
        raise RuntimeError(f"{len(left)} weights of {folder.name} were not written: {names}.")


def same_bytes(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit, so that NaN equals itself."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[given.element_size()]
    return torch.equal(given.contiguous().view(integers), expected.contiguous().view(integers))
