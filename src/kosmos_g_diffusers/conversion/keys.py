"""Which weight of an official checkpoint becomes which of ours. Conversion is data: where a key goes is declared in
`KEY_MAP`, what is left behind and why in `IGNORED`, and a checkpoint must match the two exactly."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Part of the folder -> {official name: our name}. `{i}` is a layer's number; a name that ends in a dot is a prefix.
KEY_MAP = {
    "text_encoder": {
        "gpt_model.decoder.embed_tokens.": "language_model.model.embed_tokens.",
        "gpt_model.decoder.layers.": "language_model.model.layers.",
        "gpt_model.decoder.layer_norm.": "language_model.model.layer_norm.",
        "img_model.visual.class_embedding": "vision_model.model.embeddings.class_embedding",
        "img_model.visual.positional_embedding": "vision_model.model.embeddings.position_embedding.weight",
        "img_model.visual.conv1.": "vision_model.model.embeddings.patch_embedding.",
        "img_model.visual.ln_pre.": "vision_model.model.pre_layrnorm.",
        "img_model.visual.transformer.resblocks.{i}.ts_attn.": "vision_model.model.encoder.layers.{i}.self_attn.",
        "img_model.visual.transformer.resblocks.{i}.ln_1.": "vision_model.model.encoder.layers.{i}.layer_norm1.",
        "img_model.visual.transformer.resblocks.{i}.ln_2.": "vision_model.model.encoder.layers.{i}.layer_norm2.",
        "img_model.visual.transformer.resblocks.{i}.mlp.c_fc.": "vision_model.model.encoder.layers.{i}.mlp.fc1.",
        "img_model.visual.transformer.resblocks.{i}.mlp.c_proj.": "vision_model.model.encoder.layers.{i}.mlp.fc2.",
        "img_model.visual.ln_post.": "vision_model.model.post_layernorm.",
        "img_connector.": "image_to_text_projection.",
        "aligner.encoder_proj.embed_tokens.": "aligner.input_projection.",
        "aligner.encoder_proj.embed_positions.": "aligner.position_embedding.",
        "aligner.encoder_proj.layers.": "aligner.encoder_layers.",
        "aligner.encoder_proj.layer_norm.": "aligner.encoder_layer_norm.",
        "aligner.encoder_query": "aligner.query_embeds",
        "aligner.encoder.layers.": "aligner.query_layers.",
        "aligner.encoder.layer_norm.": "aligner.final_layer_norm.",
    },
    # AlignerNet N, of the alignment stage alone: no pipeline reads it, training continues from it
    "aligner_n": {
        "aligner.decoder_query": "query_embeds",
        "aligner.decoder.layers.": "query_layers.",
        "aligner.decoder.layer_norm.": "query_layer_norm.",
        "aligner.decoder_proj.embed_positions.": "position_embedding.",
        "aligner.decoder_proj.layers.": "output_layers.",
        "aligner.decoder_proj.layer_norm.": "output_layer_norm.",
        "aligner.decoder_proj.output_projection.": "output_projection.",
    },
    # of the final stage alone; an alignment-stage checkpoint leaves both to the base
    "unet": {"diffusion_unet.unet.": ""},
    "vae": {"vae.vae.": ""},
}

# What no checkpoint of stage 1 holds: AlignerNets, U-Net and VAE. Its own names are taken to be those of the later stages
# without these; no real file of stage 1 was seen.
LATER_STAGES = ("aligner.", "diffusion_unet.", "vae.")
EMBEDDING, TIED = "gpt_model.decoder.embed_tokens.weight", "gpt_model.decoder.output_projection.weight"
# Official names that are left behind, and why nothing is lost
IGNORED = {
    TIED: "the embedding under a second name, which is checked; only the unused logits come from it",
    "gpt_model.decoder.embed_positions._float_tensor": "an empty marker of fairseq's; sinusoidal positions have no weights",
    "gpt_model.decoder.self_attn_sope.scale": "xPos, which the official decoder creates but never applies",
    "img_model.visual.transformer.resblocks.{i}.attn.": "attention that the official tower replaced by ts_attn, never called",
    "aligner.clip_encoder.": "the frozen text encoder of Stable Diffusion 1.5, target of the alignment loss: the base's own",
}


def match_keys(
    weights: "Mapping[str, torch.Tensor]", expected: "Mapping[str, Mapping[str, torch.Tensor]]"
) -> dict[str, dict[str, str]]:
    """Match every key of a checkpoint with exactly one weight of ours.

    Args:
        weights: official name -> tensor (of any device: only shape and dtype are looked at).
        expected: part of the folder -> {our name: tensor of the shape it needs}, for all parts of `KEY_MAP`.

    Returns:
        part -> {our name: official name}, without the parts that the checkpoint does not hold.

    Raises:
        ValueError: keys that are not known, are missing, or have another shape; each named with what to do.
    """
    plan, official = {}, {}
    for part, names in KEY_MAP.items():
        prefixes = tuple(name.split("{i}")[0] for name in names)
        if part == "text_encoder" or any(key.startswith(prefixes) for key in weights):
            plan[part] = {ours: official_name(ours, names) for ours in expected[part]}
            official.update({key: expected[part][ours] for ours, key in plan[part].items()})
    ignored = re.compile("|".join(map(_pattern, IGNORED)))
    both = [(key, weights[key], tensor) for key, tensor in official.items() if key in weights]
    problems = {
        "not known": [key for key in weights if key not in official and not ignored.match(key)],
        "missing": [key for key in official if key not in weights],
        "of another shape": [
            f"{key} {list(given.shape)}, expected {list(tensor.shape)}"
            for key, given, tensor in both
            if given.shape != tensor.shape
        ],
        "not floating-point": [
            f"{key} {given.dtype}" for key, given, _ in both if not given.is_floating_point()
        ],
    }
    problems = [f"{len(keys)} {what}: {shortened(keys)}" for what, keys in problems.items() if keys]
    if problems:
        raise ValueError(
            f"The {len(weights)} keys of the checkpoint are not those of a Kosmos-G model of these sizes. "
            f"{'. '.join(problems)}. Pass config= with the sizes it was trained with (a KosmosGTextEncoderConfig; the "
            "default is the released model), base= with the U-Net and VAE it was trained with, or another checkpoint."
        )
    return plan


def _pattern(name):
    """A name of the tables as a regular expression."""
    return re.escape(name).replace(r"\{i\}", r"(\d+)") + ("" if name.endswith(".") or not name else "$")


def official_name(ours: str, names: Mapping[str, str]) -> str:
    """What an official checkpoint calls our weight `ours`, by one part's names in `KEY_MAP`."""
    matches = [(official, re.match(_pattern(name), ours)) for official, name in names.items()]
    matches = [(official, match) for official, match in matches if match]
    assert len(matches) == 1, f"{ours} is matched by {len(matches)} entries of KEY_MAP"
    official, match = matches[0]
    return official.replace("{i}", "".join(match.groups())) + ours[match.end() :]


def shortened(keys: Sequence[str], longest: int = 8) -> str:
    more = f" and {len(keys) - longest} more" if len(keys) > longest else ""
    return ", ".join(keys[:longest]) + more
