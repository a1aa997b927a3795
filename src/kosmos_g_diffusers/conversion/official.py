"""Converts an official checkpoint into a folder that diffusers loads."""

import copy
from functools import partial
from pathlib import Path

import torch

from ..files import first_line
from ..modeling_aligner_n import AlignerNetN
from ..modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig
from ..processing_kosmos_g import KosmosGTokenizer
from .checkpoint import is_mapped, read_checkpoint
from .folder import (
    Base,
    appearing_atomically,
    check_dtype,
    check_output,
    same_bytes,
    write_model,
    write_pipeline,
)
from .fresh import NEW_ALIGNER, aligner_sizes, base_target, fresh_aligner_weights, write_to_train
from .keys import EMBEDDING, LATER_STAGES, TIED, match_keys

PIECE = 10**9  # bytes to read of a checkpoint before its memory is freed


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path,
    base: str | Path,
    config: KosmosGTextEncoderConfig | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
) -> Path:
    """Write an official Kosmos-G checkpoint as a self-contained diffusers folder.

    The folder holds what `KosmosGPipeline.save_pretrained` writes and, for an alignment-stage checkpoint,
    `aligner_n/aligner_n.safetensors` with AlignerNet N, which training continues from. A checkpoint of stage 1, which holds
    language model, resampler and vision tower alone, becomes what `initialize` writes: a folder with a new AlignerNet for
    `kosmos-g train align`. It appears atomically.

    Args:
        checkpoint: path of a `.pt` file of any stage, or of a `.safetensors` file with the same keys. Nothing in it is
            executed.
        output: folder to write; must be empty or not exist.
        tokenizer: path of the official `sentencepiece.bpe.model`, or of a folder with a saved KosmosGTokenizer.
        base: Stable Diffusion 1.5 in diffusers' layout, a folder or a Hub id. Gives the scheduler, the safety checker
            and feature extractor if it has them, the U-Net's and VAE's sizes, and their weights when the checkpoint
            holds none. Its text encoder is read for stage 1 alone, where the AlignerNet gets its sizes.
        config: KosmosGTextEncoderConfig, by default of the released size. Head counts cannot be read off weights.
        dtype: torch.float16, torch.bfloat16, torch.float32 or one of these names, for all weights. None keeps the
            checkpoint's; what comes from the base then takes that of the checkpoint's text encoder.
        seed: of the new AlignerNet of stage 1.

    Returns:
        Path of `output`.

    Raises:
        ValueError, TypeError: an argument of another kind; a checkpoint that cannot be read, holds foreign classes, or
            whose keys or shapes are not those of `config` (the message names them).
        RuntimeError: what was written does not read back as it should.
    """
    dtype = check_dtype(dtype)
    output = check_output(output)
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise ValueError(f"There is no checkpoint file at {checkpoint}. Pass the path of the official .pt.")
    config = _checked_config(config)
    text_tokenizer = _load_tokenizer(tokenizer, config)
    base = Base(base)
    width = base.parts["unet"].config.cross_attention_dim
    if width != config.aligner_hidden_size:
        raise ValueError(
            f"The U-Net of {base.source} reads conditions of width {width}, config.aligner_hidden_size is "
            f"{config.aligner_hidden_size}. Pass a base of Stable Diffusion 1.5's architecture, or config= with that width."
        )
    found = read_checkpoint(checkpoint)
    is_first_stage = not any(key.startswith(LATER_STAGES) for key in found)
    if is_first_stage:
        sizes = aligner_sizes(base_target(base), config.text_config.max_position_embeddings)
        for name, value in sizes.items():
            setattr(config, name, value)
    with torch.device("meta"):
        text_encoder, aligner_n = KosmosGTextEncoder(config), AlignerNetN(config)
    pipeline = base.build_pipeline(text_encoder, text_tokenizer)
    models = {"text_encoder": text_encoder, "aligner_n": aligner_n}
    models |= {"unet": pipeline.unet, "vae": pipeline.vae}
    expected = {name: model.state_dict() for name, model in models.items()}
    if is_first_stage:
        text = expected["text_encoder"]
        expected["text_encoder"] = {name: text[name] for name in text if not name.startswith("aligner.")}
    plan = match_keys(found, expected)
    if TIED in found and not same_bytes(found[TIED], found[EMBEDDING]):
        raise ValueError(
            f"{TIED} differs from {EMBEDDING}, of which it should be a second name, and would be lost. Was one of them "
            "trained alone? Remove it from the checkpoint to convert the rest."
        )
    given_dtypes = {found[key].dtype for key in plan["text_encoder"].values()}
    base_dtype = dtype or (given_dtypes.pop() if len(given_dtypes) == 1 else torch.float32)
    del found
    weights = {name: partial(base.weights, name, base_dtype) for name in base.parts}
    weights |= {name: partial(_read_weights, checkpoint, keys, dtype) for name, keys in plan.items()}
    provenance = dict.fromkeys(base.parts, f"the base {base.name}")
    provenance |= dict.fromkeys(plan, f"the checkpoint {checkpoint.name}")
    provenance["tokenizer"] = Path(tokenizer).name
    if is_first_stage:
        read = weights["text_encoder"]
        weights["text_encoder"] = lambda: read() | fresh_aligner_weights(config, base_dtype, seed)
        provenance["text_encoder"] = f"the checkpoint {checkpoint.name} of stage 1 and {NEW_ALIGNER}"
        with appearing_atomically(output) as folder:
            write_to_train(folder, pipeline, weights, provenance, base.source, base_dtype, seed)
        return output
    with appearing_atomically(output) as folder:
        if "aligner_n" in plan:
            write_model(aligner_n, folder / "aligner_n", weights["aligner_n"]())
        write_pipeline(folder, pipeline, weights, provenance)
    return output


def _checked_config(config):
    if config is None:
        return KosmosGTextEncoderConfig()
    if not isinstance(config, KosmosGTextEncoderConfig):
        raise TypeError(f"config is a {type(config).__name__}. Pass a KosmosGTextEncoderConfig, or None.")
    if config.image_words:
        words = ", ".join(name for name, _ in config.image_words)
        raise ValueError(f"config has the image words {words}, which no checkpoint holds. Pass one without.")
    return copy.deepcopy(config)  # saving changes it


def _load_tokenizer(path, config):
    path = Path(path)
    if path.is_dir():
        try:
            tokenizer = KosmosGTokenizer.from_pretrained(path)
            image_size, latent_query_num = tokenizer.image_size, tokenizer.latent_query_num
        except Exception as error:  # damaged JSON makes a tokenizer raise nearly anything
            raise ValueError(
                f"The folder {path} holds no Kosmos-G tokenizer ({first_line(error)}). Pass the official "
                "sentencepiece.bpe.model, or a folder that KosmosGTokenizer.save_pretrained wrote."
            ) from error
    else:
        image_size, latent_query_num = config.vision_config.image_size, config.latent_query_num
        sizes = {"image_size": image_size, "latent_query_num": latent_query_num}
        sizes["model_max_length"] = config.text_config.max_position_embeddings
        tokenizer = KosmosGTokenizer.from_sentencepiece(path, **sizes)
    pairs = {
        "entries": (len(tokenizer), config.text_config.vocab_size),
        "padding id": (tokenizer.pad_token_id, config.text_config.pad_token_id),
        "image id": (tokenizer.image_token_id, config.image_token_id),
        "end-of-image id": (tokenizer.end_of_image_token_id, config.end_of_image_token_id),
        "image size": (image_size, config.vision_config.image_size),
        "states an image": (latent_query_num, config.latent_query_num),
    }
    wrong = [f"{what} {pair[0]}, expected {pair[1]}" for what, pair in pairs.items() if pair[0] != pair[1]]
    if wrong:
        raise ValueError(
            f"The tokenizer {path} does not fit config: {'; '.join(wrong)}. Pass the tokenizer that the checkpoint was "
            "trained with, or config= with these figures."
        )
    return tokenizer


def _read_weights(checkpoint, keys, dtype):
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
