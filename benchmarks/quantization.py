"""Error of the condition when the weights of the text encoder are rounded to 8 and 4 bits, on the CPU:

    python benchmarks/quantization.py                     # the released size: hours on two busy cores, 9 GiB
    python benchmarks/quantization.py --scale 4           # all widths a quarter, all layers: minutes

Weights are rounded by the libraries that `--quantize` uses (and some that it does not), put back as float32 and computed
with in float32, so that the error is theirs alone; bfloat16 and float16 stand next to them. The weights are random, drawn
as --statistics says:

plain     N(0, 0.02), as benchmarks/precision.py has them (at --scale N wider by the root of N, so that products stay as large)
heavy     as trained weights are spread: normal numbers times log-normal ones (kurtosis as Student's t of 10 degrees), rows and
          columns whose sizes differ by a log-normal factor of 0.25, norms of 0.2; each matrix has the RMS of `plain`
outliers  the same with one column of 200 four times as large and one norm of 400 six times, as trained transformers have

No such draw has what training gives: states that lie where the weights act, so that noise in all directions counts little.
--model DIR measures a trained model in their place (the small one that ships: --model sprites).
"""

import argparse
import copy
import math
import random
import zlib

import torch
from accelerate import init_empty_weights
from parts.arguments import parse
from parts.measure import report
from parts.models import PHOTOS, build_tokenizer
from PIL import Image
from torch import nn

from kosmos_g_diffusers import (
    SPRITES,
    KosmosGPipeline,
    KosmosGProcessor,
    KosmosGTextEncoder,
    KosmosGTextEncoderConfig,
)
from kosmos_g_diffusers.quantization import GROUP, is_kept
from kosmos_g_diffusers.sprites import HEART, STAR, world

TEXTS = ("", "a dog in the snow", "<i> in the jungle", "<i> in the style of <i>")
SPRITE_TEXTS = (
    "",
    "a large red striped star on a white background",
    "<i> on a mint background",
    "<i> and <i>",
)
WORDS = "a dog in the snow jungle style of cat house red car on".split()
CAPTIONS = 200  # that activation-aware scales are computed from


class Weights:
    """Random weights by their names, the same whenever they are asked for: no second copy is kept."""

    def __init__(self, statistics, scale):
        self.statistics, self.std = statistics, 0.02 * math.sqrt(scale)

    def __call__(self, name, shape, module):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

        def normal(*sides):
            return torch.empty(sides).normal_(generator=generator)

        def lognormal(deviation, *sides):
            return normal(*sides).mul_(deviation).exp_()

        plain, outliers = self.statistics == "plain", self.statistics == "outliers"
        if isinstance(module, nn.LayerNorm):
            if plain or name.endswith("bias") or "aligner.final" in name:
                return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
            gains = lognormal(0.2, *shape)
            if outliers:
                gains[torch.randperm(shape[0], generator=generator)[: -(-shape[0] // 400)]] *= 6
            return gains
        if name.endswith("bias"):
            return torch.zeros(shape) if plain else normal(*shape) * self.std
        if "quer" in name.rpartition(".")[2]:
            return normal(*shape)
        weights = normal(*shape) * self.std
        if plain or len(shape) != 2:
            return weights
        weights *= lognormal(0.35, *shape) * lognormal(0.25, shape[0], 1)
        columns = lognormal(0.25, 1, shape[1])
        if outliers:
            columns[0, torch.randperm(shape[1], generator=generator)[: -(-shape[1] // 200)]] *= 4
        weights *= columns
        return weights * (self.std / weights.square().mean().sqrt())


def build(statistics, scale):
    """(encoder in float32, its weights by name, processor)."""
    config = KosmosGTextEncoderConfig(
        text_config={"embed_dim": 2048 // scale, "ffn_dim": 8192 // scale, "attention_heads": 32 // scale},
        vision_config={
            "hidden_size": 1024 // scale,
            "intermediate_size": 4096 // scale,
            "num_attention_heads": 16 // scale,
        },
        aligner_hidden_size=768 // scale,
        aligner_ffn_dim=3072 // scale,
        aligner_attention_heads=12 // scale,
    )
    weights = Weights(statistics, scale)
    with init_empty_weights(include_buffers=False):
        encoder = KosmosGTextEncoder(config).eval()
    for prefix, module in encoder.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            made = weights(f"{prefix}.{name}", empty.shape, module)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
    words = {*WORDS, *(word for text in TEXTS for word in text.split())}
    return encoder, weights, KosmosGProcessor(build_tokenizer(words))


def by_torchao(group):
    from torchao.quantization import Int8Tensor, PerGroup, PerRow

    granularity = PerRow() if group is None else PerGroup(group)
    return lambda weight: Int8Tensor.from_hp(weight, granularity).dequantize()


def by_bitsandbytes(weight):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return (
        dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4")).reshape(weight.shape).float()
    )


def by_levels(group):
    """16 even levels between the extremes of a group, as torchao's and hqq's int4 have them."""

    def rounded(weight):
        groups = weight.reshape(-1, group)
        low, high = groups.aminmax(dim=1, keepdim=True)
        step = ((high - low) / 15).clamp(min=1e-12)
        zero = (-low / step).round()
        return (((groups / step + zero).round().clamp(0, 15) - zero) * step).reshape(weight.shape)

    return rounded


def aware(rounding, squares):
    """Columns are scaled by a power of what they are multiplied with, the best of five by the error of the product."""

    def rounded(weight):
        best, least = None, math.inf
        for power in (0, 0.25, 0.5, 0.75, 1):
            scale = squares.sqrt().clamp(min=1e-4) ** power
            scale = scale / scale.mean()
            found = rounding(weight * scale) / scale
            error = ((found - weight).square() * squares).sum()
            if error < least:
                best, least = found, error
        return best

    return rounded


def draw_captions(of_sprites):
    """Captions of a few words, of the words that the model knows."""
    rng = random.Random(0)
    if not of_sprites:
        return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(CAPTIONS)]
    kinds = [
        list(kind) for kind in (world.SIZES, world.COLOURS, world.PATTERNS, world.SHAPES, world.BACKGROUNDS)
    ]
    return [
        "a {} {} {} {} on a {} background".format(*(rng.choice(kind) for kind in kinds))
        for _ in range(CAPTIONS)
    ]


def squares_of_inputs(encoder, linears, processor, photos, captions):
    """Mean square of each input of each linear layer, over captions and two images; name -> (inputs,)."""
    sums, counts = {}, {}

    def note(name):
        def hook(module, inputs):
            states = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + states.square().sum(0)
            counts[name] = counts.get(name, 0) + len(states)

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    for first in range(0, CAPTIONS, 25):
        encoder(**processor(captions[first : first + 25]))
    for photo in photos:
        encoder(**processor("<i>", [photo]))
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in sums}


def main():
    parser = argparse.ArgumentParser(description="Error of the condition with weights in 8 and 4 bits.")
    parser.add_argument("--statistics", choices=("plain", "heavy", "outliers"), default="heavy")
    parser.add_argument("--scale", type=int, choices=(1, 2, 4), default=1, help="widths are divided by it")
    parser.add_argument(
        "--model", help="a trained model in the place of random weights; sprites: the small one"
    )
    parser.add_argument(
        "--only", action="append", metavar="WORDS", help="runs whose name has them; repeat it"
    )
    arguments = parse(parser)
    if arguments.model or arguments.tiny:
        pipe = KosmosGPipeline.from_pretrained(
            SPRITES if arguments.tiny or arguments.model == "sprites" else arguments.model,
            dtype=torch.float32,
        )
        encoder, processor, texts = pipe.text_encoder, pipe.get_processor(), SPRITE_TEXTS
        photos = [Image.open(path) for path in (STAR, HEART)]
        saved = {name: weight.clone() for name, weight in encoder.state_dict().items()}
        weights = lambda name, shape, module: saved[name]  # noqa: E731
        drawn = arguments.model or "sprites"
    else:
        encoder, weights, processor = build(arguments.statistics, arguments.scale)
        photos, texts = [Image.open(path) for path in PHOTOS], TEXTS
        drawn = f"random weights ({arguments.statistics}), widths / {arguments.scale}"
    linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    inputs = [processor(text, photos[: text.count("<i>")]) for text in texts]

    def conditions(encoder):
        return torch.cat([encoder(**one).last_hidden_state.float() for one in inputs])

    captions = draw_captions(texts is SPRITE_TEXTS)
    reference = conditions(encoder)
    int8 = by_torchao(GROUP)
    kept = {quantize: {name for name in linears if is_kept(name, quantize)} for quantize in ("int8", "int4")}
    nothing, squares = set(), {}

    def aware_of(rounding):
        def of_layer(name):
            if not squares:
                squares.update(squares_of_inputs(encoder, linears, processor, photos, captions))
            return aware(rounding, squares[name]) if name in squares else rounding

        return of_layer

    # name -> (layer's name -> function that rounds its weights, layers that stay)
    runs = {
        "int8, a scale for each row": (lambda name: by_torchao(None), nothing),
        "int8, groups of 128": (lambda name: by_torchao(128), nothing),
        "int8, groups of 64": (lambda name: by_torchao(64), nothing),
        f"--quantize int8: groups of {GROUP}": (lambda name: int8, kept["int8"]),
        "NF4, all layers": (lambda name: by_bitsandbytes, nothing),
        "NF4, but int8 where --quantize int4 keeps": (
            lambda name: int8 if name in kept["int4"] else by_bitsandbytes,
            nothing,
        ),
        "--quantize int4: NF4, some kept": (lambda name: by_bitsandbytes, kept["int4"]),
        "NF4, activation-aware": (aware_of(by_bitsandbytes), nothing),
        "16 even levels, groups of 128": (lambda name: by_levels(128), nothing),
        "16 even levels, groups of 64": (lambda name: by_levels(64), nothing),
        "16 even levels, groups of 64, activation-aware": (aware_of(by_levels(64)), nothing),
    }
    if arguments.only:
        runs = {name: run for name, run in runs.items() if any(words in name for words in arguments.only)}
    rows, figures = [], {"rms_of_condition": reference.square().mean().sqrt().item()}

    def tell(name, condition, of_weights=""):
        error = (condition - reference).square().mean().sqrt().item()
        figures[name] = {"rms": error, "of_weights": of_weights}
        rows.append([name, f"{error:.4f}", of_weights and f"{of_weights:.4f}"])
        print(*rows[-1], sep=" | ", flush=True)

    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if not arguments.only or any(words in name for words in arguments.only):
            tell(name, conditions(copy.deepcopy(encoder).to(dtype)))
    for run, (rounding_of, stays) in runs.items():
        errors = []
        fits = {name: module for name, module in linears.items() if name not in stays}
        if any(
            f"groups of {group}" in run and module.in_features % group
            for group in (64, 128)
            for module in fits.values()
        ):
            continue
        roundings = {name: rounding_of(name) for name in fits}  # before anything is rounded
        for name, module in fits.items():
            weight = module.weight
            rounded = roundings[name](weight)
            errors.append(((rounded - weight).norm() / weight.norm()).item())
            module.weight = nn.Parameter(rounded, requires_grad=False)
        tell(run, conditions(encoder), sum(errors) / len(errors))
        for name, module in fits.items():
            again = weights(f"{name}.weight", module.weight.shape, module)
            module.weight = nn.Parameter(again, requires_grad=False)
    title = f"RMS error of the condition against float32, {drawn}; RMS of the condition {figures['rms_of_condition']:.2f}"
    report(title, ["weights", "RMS error", "relative error of the weights"], rows, figures, arguments.json)


if __name__ == "__main__":
    main()
