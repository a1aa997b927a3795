"""Makes a Kosmos-G to be trained: Kosmos-2's language model, a fresh AlignerNet and a Stable Diffusion."""

import base64
import copy
from functools import partial
from pathlib import Path

import torch
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

from ..files import first_line
from ..loading import IncompleteWeights, load_pretrained, read_object
from ..modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig
from ..processing_kosmos_g import EXTRA_SPECIAL_TOKENS, KosmosGTokenizer
from .folder import Base, appearing_atomically, check_dtype, check_output, locate, public_name
from .fresh import NEW_ALIGNER, aligner_sizes, base_target, fresh_aligner_weights, write_to_train
from .keys import shortened

# What is read of an MLLM on the Hub before its weights
MLLM_FILES = ("config.json", "tokenizer.json", "sentencepiece.bpe.model")
SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>")


def initialize(
    mllm: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    aligner_layers: int = 12,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
) -> Path:
    """Write a Kosmos-G pipeline folder from which `kosmos-g train align` and `train instruct` start.

    Its language model, resampler, vision tower and vocabulary are Kosmos-2's without the grounding tokens (whose ids are
    the last ones); AlignerNet M and N are new, with the width, heads and states of the base's text encoder; U-Net, VAE
    and scheduler are the base's. Next to what a pipeline reads, the folder holds `aligner_n/` and the text encoder
    to imitate with its tokenizer. It appears atomically.

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
        ValueError: `mllm` is not a Kosmos-2 or its vocabulary has another layout; the base lacks a part, or its parts do
            not belong together; the output exists; what cannot be read is named.
    """
    dtype = check_dtype(dtype) or torch.float32
    output = check_output(output)
    if not isinstance(aligner_layers, int) or aligner_layers < 1:
        raise ValueError(f"aligner_layers is {aligner_layers!r}. Pass a number of layers, 1 or more.")
    files = locate(mllm, "MLLM", "Kosmos-2 as transformers saves it", MLLM_FILES)
    kosmos = _kosmos_config(files, mllm)
    base = Base(base)
    target = base_target(base)
    tokenizer = _tokenizer(files, kosmos, mllm)
    config = _encoder_config(kosmos, target, tokenizer, aligner_layers)
    with torch.device("meta"):
        text_encoder = KosmosGTextEncoder(config)
    pipeline = base.build_pipeline(text_encoder, tokenizer)
    weights = {name: partial(base.weights, name, dtype) for name in base.parts}
    weights["text_encoder"] = partial(_encoder_weights, mllm, config, dtype, seed)
    origin = f"the language model {public_name(mllm)}"
    provenance = dict.fromkeys(base.parts, f"the base {base.name}")
    provenance |= {"text_encoder": f"{origin} and {NEW_ALIGNER}", "tokenizer": origin}
    with appearing_atomically(output) as folder:
        write_to_train(folder, pipeline, weights, provenance, base.source, dtype, seed)
    return output


def _kosmos_config(files, mllm):
    if not (files / "config.json").is_file():
        raise ValueError(f"The MLLM {mllm} has no config.json. Pass a folder that transformers has saved.")
    values = read_object(files / "config.json", "Download the MLLM again.")
    if values.get("model_type") != Kosmos2Config.model_type:
        raise ValueError(
            f"The MLLM {mllm} has the model_type {values.get('model_type')!r}, expected {Kosmos2Config.model_type!r}. "
            "Pass Kosmos-2, such as microsoft/kosmos-2-patch14-224."
        )
    try:
        return Kosmos2Config.from_dict(values)
    except Exception as error:  # whatever its settings make it raise
        raise ValueError(
            f"The config.json of the MLLM {mllm} describes no Kosmos-2 ({first_line(error)[:200]})."
        ) from error


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
        aligner_layers=aligner_layers,
        image_token_id=tokenizer.image_token_id,
        end_of_image_token_id=tokenizer.end_of_image_token_id,
        **aligner_sizes(target, text_config.max_position_embeddings),
    )


# The vocabulary --------------------------------------------------------------------------------------------------


def _tokenizer(files, kosmos, mllm):
    sizes = {
        "image_size": kosmos.vision_config.image_size,
        "latent_query_num": kosmos.latent_query_num,
        "model_max_length": kosmos.text_config.max_position_embeddings,
    }
    if (files / "tokenizer.json").is_file():
        values = read_object(files / "tokenizer.json", "Download the MLLM again.")
        try:
            charsmap, pieces = _charsmap(values.get("normalizer")), _pieces(values, mllm)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The tokenizer.json of {mllm} is not laid out as transformers writes it ({type(error).__name__}: "
                f"{first_line(error)}). Download the MLLM again."
            ) from error
        return KosmosGTokenizer.from_vocabulary(pieces, charsmap=charsmap, **sizes)
    if (files / "sentencepiece.bpe.model").is_file():
        return KosmosGTokenizer.from_sentencepiece(files / "sentencepiece.bpe.model", **sizes)
    raise ValueError(
        f"The MLLM {mllm} has neither tokenizer.json nor sentencepiece.bpe.model. Pass a folder with its tokenizer: "
        "Kosmos2Processor.save_pretrained writes it."
    )


def _pieces(values, mllm):
    """(piece, score) of the text in the order of the ids, after checks that the ids are those of Kosmos-G.

    Kosmos-2's are `<s> <pad> </s> <unk>`, the text, `<mask>`, the other five names around text and images, and behind
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
    wrong = [f"{name} at {given[name]}" for name, at in expected.items() if given.get(name, at) != at]
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
        kosmos = load_pretrained(Kosmos2ForConditionalGeneration, mllm, dtype=dtype, whole=False)
    except IncompleteWeights as error:
        names = error.names
        raise ValueError(f"The MLLM {mllm} lacks {len(names)} weights: {shortened(names)}.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The weights of the MLLM {mllm} cannot be read ({first_line(error)}). Download it again."
        ) from error
    weights = {
        name.replace("text_model.", "language_model.", 1): tensor
        for name, tensor in kosmos.state_dict().items()
        if name != "text_model.lm_head.weight"  # the embedding once more
    }
    name = "language_model.model.embed_tokens.weight"
    weights[name] = weights[name][: config.text_config.vocab_size].clone()
    return weights | fresh_aligner_weights(config, dtype, seed)
