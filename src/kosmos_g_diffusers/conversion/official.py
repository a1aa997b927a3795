"""Converts an official checkpoint into a folder that diffusers loads."""

import copy
import json
import os
import tempfile
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from ..model_card import write_model_card
from ..modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig
from ..pipeline_kosmos_g import KosmosGPipeline
from ..processing_kosmos_g import KosmosGTokenizer
from .checkpoint import is_mapped, read_checkpoint
from .keys import EMBEDDING, TIED, aligner_n_weights, match_keys, shortened

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PIECE = 10**9  # bytes to read of a checkpoint before its memory is given back
SHARD_SIZE = "500MB"  # some releases of safetensors copy a file's weights before they write it

# What is read of a base on the Hub before the checkpoint; weights follow when it turns out that they are needed
BASE_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
    "safety_checker": "config.json",
    "feature_extractor": "preprocessor_config.json",
}
OPTIONAL = ("safety_checker", "feature_extractor")


def convert_checkpoint(checkpoint, output, *, tokenizer, base, config=None, dtype=None):
    """Write an official Kosmos-G checkpoint as a self-contained diffusers folder.

    The folder holds what `KosmosGPipeline.save_pretrained` writes and, for an alignment-stage checkpoint,
    `aligner_n/model.safetensors` with AlignerNet N for training to go on from. It appears whole or not at all.

    Args:
        checkpoint: path of a `.pt` file of the alignment or the final stage, or of a `.safetensors` file with the same
            keys. Nothing in it is executed.
        output: folder to write; must be empty or not exist.
        tokenizer: path of the official `sentencepiece.bpe.model`, or of a folder with a saved KosmosGTokenizer.
        base: Stable Diffusion 1.5 in diffusers' layout, a folder or a Hub id. Gives the scheduler, the safety checker
            and feature extractor if it has them, the U-Net's and VAE's sizes, and their weights when the checkpoint
            holds none. Its text encoder is not read.
        config: KosmosGTextEncoderConfig, by default of the released size. Head counts cannot be read off weights.
        dtype: torch.float16, torch.bfloat16, torch.float32 or one of these names, for all weights. None keeps the
            checkpoint's; what comes from the base then takes that of the checkpoint's text encoder.

    Returns:
        Path of `output`.

    Raises:
        ValueError, TypeError: an argument of another kind; a checkpoint that cannot be read, holds foreign classes, or
            whose keys or shapes are not those of `config` (the message names them).
        RuntimeError: what was written does not read back as it should.
    """
    dtype = _as_dtype(dtype)
    output = _checked_output(output)
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise ValueError(
            f"There is no checkpoint file at {checkpoint}. Pass the path of the official .pt file."
        )
    config = _checked_config(config)
    text_tokenizer = _load_tokenizer(tokenizer, config)
    configs = _base_configs(base)
    scheduler = _scheduler(configs)
    with torch.device("meta"):
        modules = {
            "text_encoder": KosmosGTextEncoder(config),
            "unet": UNet2DConditionModel.from_config(_read_json(configs / "unet" / "config.json")),
            "vae": AutoencoderKL.from_config(_read_json(configs / "vae" / "config.json")),
        }
        expected = {name: module.state_dict() for name, module in modules.items()}
        expected["aligner_n"] = aligner_n_weights(modules["text_encoder"])
        if (configs / "safety_checker" / BASE_CONFIGS["safety_checker"]).is_file():
            settings = StableDiffusionSafetyChecker.config_class.from_pretrained(configs / "safety_checker")
            modules["safety_checker"] = StableDiffusionSafetyChecker(settings)
    width = modules["unet"].config.cross_attention_dim
    if width != config.aligner_hidden_size:
        raise ValueError(
            f"The U-Net of {base} reads conditions of width {width}, config.aligner_hidden_size is "
            f"{config.aligner_hidden_size}. Pass a base of Stable Diffusion 1.5's architecture, or config= with that width."
        )

    weights = read_checkpoint(checkpoint)
    plan = match_keys(weights, expected)
    if TIED in weights and not _same_bytes(weights[TIED], weights[EMBEDDING]):
        raise ValueError(
            f"{TIED} differs from {EMBEDDING}, of which it should be a second name, and would be lost. Was one of them "
            "trained alone? Remove it from the checkpoint to convert the rest."
        )
    given_dtypes = {weights[key].dtype for key in plan["text_encoder"].values()}
    base_dtype = dtype or (given_dtypes.pop() if len(given_dtypes) == 1 else torch.float32)
    del weights
    load = {name: partial(_checkpoint_weights, checkpoint, keys, dtype) for name, keys in plan.items()}
    for name, module in modules.items():
        load.setdefault(name, partial(_base_weights, type(module), base, name, base_dtype))
        _load_when_saved(module, load[name])
    pipeline = KosmosGPipeline(
        **{"safety_checker": None} | modules,
        tokenizer=text_tokenizer,
        scheduler=scheduler,
        feature_extractor=_feature_extractor(configs),
        requires_safety_checker="safety_checker" in modules,
    )
    origins = (f"the checkpoint {checkpoint.name}", f"the base {_public_name(base)}")
    provenance = {
        name: origins[name not in plan] for name, part in pipeline.components.items() if part is not None
    }
    with _appearing_whole(output) as folder:
        if "aligner_n" in plan:
            _save_aligner_n(load["aligner_n"](), folder / "aligner_n")
        pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        write_model_card(pipeline, folder, provenance=provenance | {"tokenizer": Path(tokenizer).name})
    return output


# Arguments -----------------------------------------------------------------------------------------------------


def _as_dtype(dtype):
    given = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if given is not None and given not in DTYPES.values():
        raise ValueError(
            f"dtype is {dtype!r}. Pass one of {', '.join(DTYPES)}, or None to keep the checkpoint's."
        )
    return given


def _checked_output(output):
    output = Path(output)
    if output.is_dir() and not any(output.iterdir()):
        return output
    if output.exists() or output.is_symlink():
        what = "a folder that is not empty" if output.is_dir() else "a file"
        raise ValueError(
            f"The output {output} is {what}. Pass a folder that does not exist yet: nothing is overwritten."
        )
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"The output {output} cannot be made: {above} is a file. Pass another folder.")
    return output


def _checked_config(config):
    if config is None:
        return KosmosGTextEncoderConfig()
    if not isinstance(config, KosmosGTextEncoderConfig):
        raise TypeError(f"config is a {type(config).__name__}. Pass a KosmosGTextEncoderConfig, or None.")
    if config.image_words:
        words = ", ".join(name for name, _ in config.image_words)
        raise ValueError(
            f"config has the image words {words}, which no checkpoint holds. Pass a config without."
        )
    return copy.deepcopy(config)  # saving enters things


def _load_tokenizer(path, config):
    path = Path(path)
    if path.is_dir():
        try:
            tokenizer = KosmosGTokenizer.from_pretrained(path)
            image_size, latent_query_num = tokenizer.image_size, tokenizer.latent_query_num
        except (OSError, ValueError, KeyError) as error:  # KeyError: one of another kind has no such sizes
            raise ValueError(
                f"The folder {path} holds no Kosmos-G tokenizer ({_first_line(error)}). Pass the official "
                "sentencepiece.bpe.model, or a folder that KosmosGTokenizer.save_pretrained wrote."
            ) from error
    else:
        image_size, latent_query_num = config.vision_config.image_size, config.latent_query_num
        tokenizer = KosmosGTokenizer.from_sentencepiece(
            path,
            image_size=image_size,
            latent_query_num=latent_query_num,
            model_max_length=config.text_config.max_position_embeddings,
        )
    pairs = {
        "entries": (len(tokenizer), config.text_config.vocab_size),
        "padding id": (tokenizer.pad_token_id, config.text_config.pad_token_id),
        "image id": (tokenizer.image_token_id, config.image_token_id),
        "end-of-image id": (tokenizer.end_of_image_token_id, config.end_of_image_token_id),
        "image size": (image_size, config.vision_config.image_size),
        "states an image": (latent_query_num, config.latent_query_num),
    }
    wrong = [
        f"{what} {given}, expected {expected}"
        for what, (given, expected) in pairs.items()
        if given != expected
    ]
    if wrong:
        raise ValueError(
            f"The tokenizer {path} does not fit config: {'; '.join(wrong)}. Pass the tokenizer that the checkpoint was "
            "trained with, or config= with these figures."
        )
    return tokenizer


# The base ------------------------------------------------------------------------------------------------------


def _base_configs(base):
    """Folder with the configuration files of the base, its own or a download of them."""
    folder = Path(base)
    if not folder.exists():
        try:
            files = [f"{name}/{file}" for name, file in BASE_CONFIGS.items()]
            folder = Path(snapshot_download(str(base), allow_patterns=files))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The base {base} is no folder, and not on the Hub as far as can be seen ({_first_line(error)}). Pass a "
                "folder with Stable Diffusion 1.5 in diffusers' layout, or its Hub id and a connection."
            ) from error
    missing = [
        f"{name}/{file}"
        for name, file in BASE_CONFIGS.items()
        if name not in OPTIONAL and not (folder / name / file).is_file()
    ]
    if missing:
        raise ValueError(
            f"The base {base} has no {', '.join(missing)}. Pass a folder with Stable Diffusion 1.5 in diffusers' layout (a "
            "single file becomes one by StableDiffusionPipeline.from_single_file(file).save_pretrained(folder))."
        )
    return folder


def _scheduler(configs):
    name = _read_json(configs / "scheduler" / BASE_CONFIGS["scheduler"]).get("_class_name")
    scheduler_class = getattr(diffusers, str(name), None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        raise ValueError(
            f"The base's scheduler is of the class {name!r}, which diffusers {diffusers.__version__} has not."
        )
    return scheduler_class.from_pretrained(configs / "scheduler")


def _feature_extractor(configs):
    if not (configs / "feature_extractor" / BASE_CONFIGS["feature_extractor"]).is_file():
        return None
    return CLIPImageProcessor.from_pretrained(configs / "feature_extractor")


def _base_weights(model_class, base, name, dtype):
    dtypes = {
        "torch_dtype" if issubclass(model_class, ModelMixin) else "dtype": dtype
    }  # diffusers, transformers
    try:
        model, info = model_class.from_pretrained(base, subfolder=name, output_loading_info=True, **dtypes)
        if info["missing_keys"]:  # these would be random
            raise ValueError(
                f"{len(info['missing_keys'])} are missing: {shortened(sorted(info['missing_keys']))}"
            )
        return model.state_dict()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The weights of {name} in the base {base} cannot be used ({_first_line(error)}), and the checkpoint has none. "
            "Pass a complete folder with Stable Diffusion 1.5, or its Hub id and a connection."
        ) from error


def _public_name(base):
    """The base as the folder may name it: a path on somebody's machine is nobody's business."""
    return Path(base).resolve().name if Path(base).exists() else str(base)


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} of the base is not JSON ({error}). Download the base again.") from error


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# Weights -------------------------------------------------------------------------------------------------------


def _checkpoint_weights(checkpoint, keys, dtype):
    """Read {our name: official name} from a checkpoint -> {our name: tensor}."""
    weights, state, read = read_checkpoint(checkpoint), {}, 0
    for ours, key in keys.items():
        tensor = weights.pop(key).detach()
        state[ours] = tensor.to(dtype or tensor.dtype).contiguous()
        read += tensor.nbytes
        if read > PIECE and is_mapped(checkpoint):
            # what was read of a mapping stays in memory with it, and after a cast nothing needs the old one
            weights, read = read_checkpoint(checkpoint), 0
    return state


def _load_when_saved(module, load):
    """Make `save_pretrained` of a module on the meta device load its weights first, check what was written and forget
    them again: a pipeline saves its parts in turn, so that memory holds one of them at a time."""
    save = module.save_pretrained

    @wraps(save)
    def save_pretrained(folder, **kwargs):
        module.load_state_dict(load(), strict=True, assign=True)
        save(folder, **kwargs)
        _check_written(Path(folder), module.state_dict())
        module.to_empty(device="meta")

    module.save_pretrained = save_pretrained


def _save_aligner_n(weights, folder):
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _check_written(folder, weights)


@contextmanager
def _appearing_whole(output):
    """A hidden folder next to `output` that takes its name at the end; an exception or interruption leaves nothing."""
    place = output.resolve()
    above = next(folder for folder in place.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=above) as hidden:
        yield hidden / place.relative_to(above)
        if place.is_dir():
            place.rmdir()  # empty, or this raises; not every system renames onto a folder
        top = place.relative_to(above).parts[0]  # new folders above the output appear with it
        os.replace(Path(hidden) / top, above / top)


def _check_written(folder, weights):
    """Read the weights back, one at a time, and compare them with what was meant."""
    missing = set(weights)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
        for key in keys:
            with safe_open(path, framework="pt") as file:  # opened for each, so that memory holds one
                same = key in missing and _same_bytes(file.get_tensor(key), weights[key])
            if not same:
                raise RuntimeError(
                    f"{key} in {folder.name} was not written as it is. Is the disk full or faulty? Convert again."
                )
            missing.remove(key)
    if missing:
        raise RuntimeError(
            f"{len(missing)} weights of {folder.name} were not written: {shortened(sorted(missing))}."
        )


def _same_bytes(given, expected):
    """Equal in shape, dtype and every bit, so that NaN equals itself."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[given.element_size()]
    return torch.equal(given.contiguous().view(integers), expected.contiguous().view(integers))
