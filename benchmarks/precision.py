"""Error of the condition in half precision, full-size model with random weights, on the CPU:

    python benchmarks/precision.py

Next to it the error of the same function, weights and dtype run plainly by transformers' own Kosmos-2 model with its
eager attention (softmax and GELU in the dtype itself).
"""

import argparse

import torch
from parts.arguments import parse
from parts.measure import report
from parts.models import DTYPES, PHOTOS, build_text_encoder, build_tiny, build_tokenizer
from PIL import Image
from transformers import Kosmos2Config, Kosmos2Model

from kosmos_g_diffusers import KosmosGProcessor

TEXTS = ("", "a dog in the snow", "<i> in the jungle", "<i> in the style of <i>")


def build(dtype, tiny):
    """(encoder, processor) in `dtype`. The weights are drawn in float32, so they are the same but for rounding."""
    if tiny:
        pipe = build_tiny(dtype)
        return pipe.text_encoder, KosmosGProcessor(pipe.tokenizer)
    words = {word for text in TEXTS for word in text.split()}
    return build_text_encoder(torch.float32).to(dtype), KosmosGProcessor(build_tokenizer(words))


def run_plainly(encoder, inputs):
    """Condition of one prompt by transformers' Kosmos2Model around the encoder's own modules, eager attention."""
    config = encoder.config
    with torch.device("meta"):
        model = Kosmos2Model(
            Kosmos2Config(
                text_config={**config.text_config.to_dict(), "layers": 0},
                vision_config={**config.vision_config.to_dict(), "num_hidden_layers": 0},
                latent_query_num=config.latent_query_num,
            )
        )
    model.text_model.model = encoder.language_model.model
    model.vision_model.model = encoder.vision_model.model
    model.image_to_text_projection = encoder.image_to_text_projection
    configs = {id(c): c for m in encoder.modules() if (c := getattr(m, "config", None)) is not None}
    implementations = {key: c._attn_implementation for key, c in configs.items()}
    try:
        for c in configs.values():
            c._attn_implementation = "eager"
        if "pixel_values" in inputs:
            image_embeds = model.eval().get_image_features(inputs["pixel_values"]).pooler_output
            image_inputs = {
                "image_embeds": image_embeds.flatten(0, 1),
                "image_embeds_position_mask": inputs["image_token_mask"],
            }
        else:
            image_inputs = {}
        states = model.text_model(inputs["input_ids"], **image_inputs).last_hidden_state
        return encoder.aligner.final_layer_norm(encoder.aligner(states)[-1])
    finally:
        for key, c in configs.items():
            c._attn_implementation = implementations[key]


def conditions(dtype, tiny):
    """Conditions of TEXTS in float32, as the encoder computes them and as the plain run does."""
    encoder, processor = build(dtype, tiny)
    photos = [Image.open(path) for path in PHOTOS]
    ours, plain = [], []
    for text in TEXTS:
        inputs = processor(text, photos[: text.count("<i>")])
        ours.append(encoder(**inputs).last_hidden_state.float())
        plain.append(run_plainly(encoder, inputs).float())
    return torch.cat(ours), torch.cat(plain)


def main():
    parser = argparse.ArgumentParser(description="Error of the condition in half precision against float32.")
    arguments = parse(parser)

    reference, plain_reference = conditions(torch.float32, arguments.tiny)
    results = {"float32, plain": plain_reference}
    for name in ("float16", "bfloat16"):
        results[name], results[f"{name}, plain"] = conditions(DTYPES[name], arguments.tiny)
    rows, figures = [], {"rms_of_condition": reference.square().mean().sqrt().item()}
    for name, condition in results.items():
        if not condition.isfinite().all():
            raise SystemExit(f"{name}: the condition is not finite.")
        error = condition - reference
        figures[name] = {"rms": error.square().mean().sqrt().item(), "maximum": error.abs().max().item()}
        plain = figures.get(name.removesuffix(", plain"))
        rows.append([name, f"{figures[name]['rms']:.2e}", f"{figures[name]['maximum']:.2e}"])
    for row, name in zip(rows, results, strict=True):
        plain = figures.get(f"{name}, plain")
        row += [f"{figures[name][kind] / plain[kind]:.2f}" if plain else "" for kind in ("rms", "maximum")]
    title = (
        f"Error of the condition against the encoder in float32, {len(reference)} prompts with "
        f"{sum(text.count('<i>') for text in TEXTS)} photos; RMS of the condition {figures['rms_of_condition']:.2f}"
    )
    columns = ["run", "RMS error", "largest error", "RMS / plain RMS", "largest / plain largest"]
    report(title, columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
