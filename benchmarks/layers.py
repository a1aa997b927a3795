"""One layer of each kind at the released size, in turns, for figures of the whole encoder on a busy or small machine:

    python benchmarks/layers.py --cpu-time
    python benchmarks/layers.py --cpu-time --dtype bfloat16

Random weights; one prompt of two photos (137 tokens), a negative prompt of 5, the null condition of 1. The encoder is counted from its
layers: 24 of the vision tower and of the language model, 12 of each half of the AlignerNet, the embeddings and projections once. "Plain"
is transformers' own modules with eager attention. The peak is that of a product of 2048 x 2048, timed in the same turns.
"""

import argparse
import statistics
from contextlib import contextmanager

import torch
from parts.arguments import parse
from parts.measure import multiply_square, report, significant, time_in_turns
from parts.models import DTYPES, build_at_random
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTextEncoderConfig, VisionCache

PHOTO, PROMPT, SUBJECT, NEGATIVE, NULL = 257, 137, 75, 5, 1  # states of a photo; tokens


@contextmanager
def eager(encoder):
    configs = {id(one): one for module in encoder.modules() if (one := getattr(module, "config", None))}
    kept = {key: one._attn_implementation for key, one in configs.items()}
    for one in configs.values():
        one._attn_implementation = "eager"
    yield
    for key, one in configs.items():
        one._attn_implementation = kept[key]


def parts_of(encoder, dtype):
    """name -> (times in the encoder, function)."""
    vision, text, aligner = encoder.vision_model.model, encoder.language_model.model, encoder.aligner
    width, text_width, aligner_width = (
        part.weight.shape[0] for part in (vision.pre_layrnorm, text.layer_norm, aligner.final_layer_norm)
    )

    def states(count, length, size):
        return torch.randn(count, length, size).to(dtype)

    pixels = torch.randn(2, 3, 224, 224).to(dtype)
    photos = {count: states(count, PHOTO, width) for count in (1, 2)}
    projection, queries = encoder.image_to_text_projection, states(1, 77, aligner_width)
    parts = {
        f"vision layer, {count} photos": (24, lambda x=x: vision.encoder.layers[0](x, None))
        for count, x in photos.items()
    }
    parts["pixels"] = 1, lambda: vision.embeddings(pixels)
    parts["projection"] = 1, lambda: projection(photos[2])
    parts["projection, plain"] = 1, lambda: Kosmos2ImageToTextProjection.forward(projection, photos[2])
    for length in (PROMPT, SUBJECT, NEGATIVE, NULL):
        tokens, narrow = states(1, length, text_width), states(1, length, aligner_width)
        parts[f"language layer, {length}"] = 24, lambda x=tokens: text.layers[0](x, None)
        parts[f"aligner layer, {length}"] = 12, lambda x=narrow: aligner.encoder_layers[0](x, None)
        parts[f"query layer, {length}"] = 12, lambda x=narrow: aligner.query_layers[0](queries, None, x)
    return parts


def main():
    parser = argparse.ArgumentParser(description="Layers of the encoder, one of each kind.")
    parser.add_argument("--rounds", type=int, default=5, help="of all layers (default: 5)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)"
    )
    arguments = parse(parser)
    dtype = DTYPES[arguments.dtype]
    config = KosmosGTextEncoderConfig(
        text_config={"layers": 1, "vocab_size": 100},
        vision_config={"num_hidden_layers": 1},
        aligner_layers=1,
        aligner_max_positions=2048,
    )
    encoder = build_at_random(lambda: KosmosGTextEncoder(config), dtype)
    parts = parts_of(encoder, dtype)
    flops = {}
    for name, (_, function) in parts.items():
        with FlopCounterMode(display=False) as counter:
            function()
        flops[name] = counter.get_total_flops()
    functions = {name: function for name, (_, function) in parts.items()}

    def plainly(function):
        with eager(encoder):
            function()

    for name in [name for name in parts if name.endswith((f", {PROMPT}", f", {NEGATIVE}", "2 photos"))]:
        functions[f"{name}, plain"] = lambda function=functions[name]: plainly(function)
    pixels = torch.randn(1, 3, 224, 224).to(dtype)
    cache = VisionCache(2**26)
    cache.encode(encoder, pixels)
    functions["a known photo, 1 layer"] = lambda: cache.encode(encoder, pixels)
    peaks, multiply = [], multiply_square(dtype, 2048, seconds=0.2)
    functions["peak"] = lambda: peaks.append(multiply())
    measured = time_in_turns(functions, arguments.rounds)
    seconds = {name: statistics.median(values) for name, values in measured.items()}
    peak = statistics.median(peaks)

    def whole(names, of=seconds, end=""):
        return sum(parts[name][0] * of.get(f"{name}{end}", of[name]) for name in names)

    def prompt(length):
        return [f"{kind} layer, {length}" for kind in ("language", "aligner", "query")]

    stages = {
        "vision": ["vision layer, 2 photos", "pixels", "projection"],
        "language model": [f"language layer, {PROMPT}"],
        "aligner": prompt(PROMPT)[1:],
    }
    stages["whole encoder"] = sum(stages.values(), [])
    rows = []
    for name, names in stages.items():
        share = whole(names, flops) / whole(names) / peak
        ratio = whole(names) / whole(names, end=", plain")
        rows.append([name, significant(whole(names)), f"{share:.0%}", f"{ratio:.2f}"])
    names = [*stages["whole encoder"], *prompt(NEGATIVE)]
    rows.append(
        [
            "with a negative prompt",
            significant(whole(names)),
            "",
            f"{whole(names) / whole(names, end=', plain'):.2f}",
        ]
    )
    photo = 24 * seconds["vision layer, 1 photos"] + (seconds["pixels"] + seconds["projection"]) / 2
    text, null = whole(prompt(SUBJECT)), whole(prompt(NULL))
    layer, read = (
        sum(weight.numel() for part in these for weight in part.parameters())
        for these in (
            encoder.vision_model.model.encoder.layers,
            (encoder.vision_model, encoder.image_to_text_projection),
        )
    )
    known = seconds["a known photo, 1 layer"] * (read + 23 * layer) / read
    ratio = (photo + null + 25 * (text + known)) / (25 * (photo + text + null))
    rows.append(["25 prompts on one photo, VisionCache and the null condition kept", "", "", f"{ratio:.2f}"])
    title = f"{arguments.dtype}, counted from one layer of each kind; peak {peak / 1e9:.0f} GFLOP/s."
    figures = {"peak": peaks, "seconds": measured, "flops": flops}
    columns = ["stage", "seconds", "of the peak", "time / without"]
    report(title, columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
