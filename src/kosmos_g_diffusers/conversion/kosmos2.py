"""Makes a Kosmos-G to be trained: Kosmos-2's language model, a fresh AlignerNet and a Stable Diffusion."""

import base64
import copy
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import snapshot_download
from tokenizers import normalizers
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

from ..model_card import write_model_card
from ..modeling_aligner_n import AlignerNetN
from ..modeling_kosmos_g import AlignerNet, KosmosGTextEncoder, KosmosGTextEncoderConfig
from ..pipeline_kosmos_g import KosmosGPipeline
from ..processing_kosmos_g import EXTRA_SPECIAL_TOKENS, KosmosGTokenizer
from .initial_weights import build_fresh
from .keys import shortened
from .official import (
    BASE_CONFIGS,
    SHARD_SIZE,
    _appearing_whole,
    _as_dtype,
    _base_configs,
    _base_weights,
    _check_written,
    _checked_output,
    _feature_extractor,
    _first_line,
    _load_when_saved,
    _public_name,
    _read_json,
    _save_aligner_n,
    _scheduler,
)
from .target import MODEL_FOLDER, TOKENIZER_FOLDER, load_target, target_config

# What is read of an MLLM on the Hub before its weights
MLLM_FILES = ("config.json", "tokenizer.json", "sentencepiece.bpe.model")
SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>")


def initialize(mllm, base, output, *, aligner_layers=12, dtype=None, seed=0):
    """Write a Kosmos-G pipeline folder for `kosmos-g train align` and `train instruct` to go on from.

    Its language model, resampler, vision tower and vocabulary are Kosmos-2's without the grounding tokens (whose ids are
    the last ones); AlignerNet M and N are new, with the width, heads and states of the base's text encoder; U-Net, VAE
    and scheduler are the base's. Beside what a pipeline reads the folder holds `aligner_n/` and the text encoder to
    imitate with its tokenizer. It appears whole or not at all.

    Args:
        mllm: Kosmos-2, such as "microsoft/kosmos-2-patch14-224": a folder or a Hub id.
        base: Stable Diffusion 1.x or 2.x in diffusers' layout, a folder or a Hub id.
        output: folder to write; must be empty or not exist.
        aligner_layers: layers of each half of AlignerNet M and of N.
        dtype: torch.float32 (None as well), torch.float16, torch.bfloat16 or a name of these, for all weights. Training
            keeps float32 and loses what another dtype has cut off.
        seed: of the AlignerNets' weights.

    Returns:
        Path of `output`.

    Raises:
        ValueError: `mllm` is no Kosmos-2 or its vocabulary has another layout; the base lacks a part, or its parts do
            not belong together; the output exists; what cannot be read is named.
    """
    dtype = _as_dtype(dtype) or torch.float32
    output = _checked_output(output)
    if not isinstance(aligner_layers, int) or aligner_layers < 1:
        raise ValueError(f"aligner_layers is {aligner_layers!r}. Pass a number of layers, 1 or more.")
    files = _mllm_files(mllm)
    kosmos = _kosmos_config(files, mllm)
    configs = _base_configs(base)
    target = target_config(base)
    tokenizer = _tokenizer(files, kosmos, mllm)
    config = _encoder_config(kosmos, target, tokenizer, aligner_layers)
    with torch.device("meta"):
        modules = {
            "text_encoder": KosmosGTextEncoder(config),
            "unet": UNet2DConditionModel.from_config(_read_json(configs / "unet" / "config.json")),
            "vae": AutoencoderKL.from_config(_read_json(configs / "vae" / "config.json")),
        }
        if (configs / "safety_checker" / BASE_CONFIGS["safety_checker"]).is_file():
            settings = StableDiffusionSafetyChecker.config_class.from_pretrained(configs / "safety_checker")
            modules["safety_checker"] = StableDiffusionSafetyChecker(settings)
    width = modules["unet"].config.cross_attention_dim
    if width != target.hidden_size:
        raise ValueError(
            f"The U-Net of {base} reads conditions of width {width}, its text encoder gives {target.hidden_size}. Pass a "
            "base whose parts belong together, of Stable Diffusion 1.x or 2.x."
        )
    load = {"text_encoder": partial(_encoder_weights, mllm, config, dtype, seed)}
    for name, module in modules.items():
        load.setdefault(name, partial(_base_weights, type(module), base, name, dtype))
        _load_when_saved(module, load[name])
    pipeline = KosmosGPipeline(
        **{"safety_checker": None} | modules,
        tokenizer=tokenizer,
        scheduler=_scheduler(configs),
        feature_extractor=_feature_extractor(configs),
        requires_safety_checker="safety_checker" in modules,
    )
    origin, new = f"the language model {_public_name(mllm)}", "a new AlignerNet, which has not been trained"
    provenance = {
        name: f"the base {_public_name(base)}"
        for name, part in pipeline.components.items()
        if part is not None
    } | {"text_encoder": f"{origin} and {new}", "tokenizer": origin}
    clip, clip_tokenizer = load_target(base, dtype)
    with _appearing_whole(output) as folder:
        pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        aligner_n = build_fresh(AlignerNetN, config, seed + 1).to(dtype)
        _save_aligner_n(aligner_n.state_dict(), folder / "aligner_n")
        clip.save_pretrained(folder / MODEL_FOLDER, max_shard_size=SHARD_SIZE)
        _check_written(folder / MODEL_FOLDER, clip.state_dict())
        clip_tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        write_model_card(pipeline, folder, provenance=provenance)
    return output


def _mllm_files(mllm):
    """Folder with the MLLM's configuration and vocabulary, its own or a download of them."""
    folder = Path(mllm)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(str(mllm), allow_patterns=list(MLLM_FILES)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The MLLM {mllm} is no folder, and not on the Hub as far as can be seen ({_first_line(error)}). Pass a "
                "folder with Kosmos-2 as transformers saves it, or its Hub id and a connection."
            ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"The MLLM {mllm} has no config.json. Pass a folder that transformers has saved.")
    return folder


def _kosmos_config(files, mllm):
    values = _read_json(files / "config.json")
    if values.get("model_type") != Kosmos2Config.model_type:
        raise ValueError(
            f"The MLLM {mllm} has the model_type {values.get('model_type')!r}, expected {Kosmos2Config.model_type!r}. "
            "Pass Kosmos-2, such as microsoft/kosmos-2-patch14-224."
        )
    return Kosmos2Config.from_dict(values)


def _encoder_config(kosmos, target, tokenizer, aligner_layers):
    text_config = copy.deepcopy(kosmos.text_config)
    if text_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"The MLLM has {text_config.vocab_size} token embeddings, its tokenizer {len(tokenizer)} text and image tokens. "
            "Pass a folder whose parts belong together."
        )
    text_config.vocab_size = len(tokenizer)
    return KosmosGTextEncoderConfig(
        text_config=text_config,
        vision_config=copy.deepcopy(kosmos.vision_config),
        latent_query_num=kosmos.latent_query_num,
        aligner_hidden_size=target.hidden_size,
        aligner_layers=aligner_layers,
        aligner_attention_heads=target.num_attention_heads,
        aligner_ffn_dim=target.intermediate_size,
        # the official 32,768 rows would be 16 times what the language model can fill
        aligner_max_positions=2 + text_config.max_position_embeddings,
        num_queries=target.max_position_embeddings,
        image_token_id=tokenizer.image_token_id,
        end_of_image_token_id=tokenizer.end_of_image_token_id,
    )


# The vocabulary --------------------------------------------------------------------------------------------------


def _tokenizer(files, kosmos, mllm):
    sizes = {
        "image_size": kosmos.vision_config.image_size,
        "latent_query_num": kosmos.latent_query_num,
        "model_max_length": kosmos.text_config.max_position_embeddings,
    }
    if (files / "tokenizer.json").is_file():
        values = _read_json(files / "tokenizer.json")
        pieces = _pieces(values, mllm)
        charsmap = _charsmap(values.get("normalizer"))
        if charsmap is None:
            return KosmosGTokenizer.from_vocabulary(pieces, **sizes)
        return KosmosGTokenizer._build(pieces, [normalizers.Precompiled(charsmap)], *sizes.values())
    if (files / "sentencepiece.bpe.model").is_file():
        return KosmosGTokenizer.from_sentencepiece(files / "sentencepiece.bpe.model", **sizes)
    raise ValueError(
        f"The MLLM {mllm} has neither tokenizer.json nor sentencepiece.bpe.model. Pass a folder with its tokenizer: "
        "Kosmos2Processor.save_pretrained writes it."
    )


def _pieces(values, mllm):
    """(piece, score) of the text in the order of the ids, after checks that the ids are those of Kosmos-G.

    Kosmos-2's are `<s> <pad> </s> <unk>`, the text, `<mask>`, the other five names around text and pictures, and behind
    them the grounding tokens (transformers' processing_kosmos2.py), which are left out.
    """
    model = values["model"]
    vocabulary = model.get("vocab") if model.get("type") == "Unigram" else ()
    names = [piece for piece, _ in vocabulary]
    first, rest = names[: len(SPECIAL_NAMES)], names[len(SPECIAL_NAMES) :]
    length = names.index("<mask>") if "<mask>" in rest else len(names)
    expected = {name: length + index for index, name in enumerate(EXTRA_SPECIAL_TOKENS)}
    given = {token["content"]: token["id"] for token in values.get("added_tokens", ())}
    # the processor adds what a tokenizer does not have, at these ids
    wrong = [
        f"{name} at {given[name]}" for name in expected if given.get(name, expected[name]) != expected[name]
    ]
    if tuple(first) != SPECIAL_NAMES or wrong or len(names) > length + 1:
        raise ValueError(
            f"The tokenizer of {mllm} is not laid out as Kosmos-2's: a {model.get('type')} model of {len(names)} pieces "
            f"that begins with {' '.join(first)}{''.join(f', {name}' for name in wrong)}. Expected unigram pieces behind "
            f"{' '.join(SPECIAL_NAMES)}, then {', '.join(EXTRA_SPECIAL_TOKENS)}. Pass Kosmos-2 with its own tokenizer."
        )
    return [(piece, score) for piece, score in vocabulary[len(SPECIAL_NAMES) : length]]


def _charsmap(normalizer):
    """The SentencePiece normalisation table inside a normalizer of tokenizer.json, or None."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Precompiled":
        return base64.b64decode(normalizer["precompiled_charsmap"])
    found = map(_charsmap, normalizer.get("normalizers", ()))
    return next((charsmap for charsmap in found if charsmap), None)


# The weights -----------------------------------------------------------------------------------------------------


def _encoder_weights(mllm, config, dtype, seed):
    """name -> tensor of the text encoder: Kosmos-2's, with the embedding cut, and AlignerNet M's."""
    try:
        kosmos, info = Kosmos2ForConditionalGeneration.from_pretrained(
            mllm, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The weights of the MLLM {mllm} cannot be read ({_first_line(error)}). Download it again."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random
        raise ValueError(f"The MLLM {mllm} lacks {len(missing)} weights: {shortened(missing)}.")
    weights = {
        name.replace("text_model.", "language_model.", 1): tensor
        for name, tensor in kosmos.state_dict().items()
        if name != "text_model.lm_head.weight"  # the embedding once more
    }
    name = "language_model.model.embed_tokens.weight"
    weights[name] = weights[name][: config.text_config.vocab_size].clone()
    aligner = build_fresh(AlignerNet, config, seed).to(dtype)
    return weights | {f"aligner.{name}": tensor for name, tensor in aligner.state_dict().items()}
