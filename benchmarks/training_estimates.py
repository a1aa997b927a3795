"""What the recipes of training cost at full size: operations and memory are counted, time follows from an assumption.

    python benchmarks/training_estimates.py [--utilisation 0.3]
    python benchmarks/training_estimates.py --measure
    python benchmarks/training_estimates.py --caches [--measure]

Each stage runs forwards and backwards on fake tensors: shapes are computed and numbers are not, so that it takes neither
a GPU nor memory. Counted are the operations of matrix products, convolutions and attention (a multiplication with its
addition is 2), and the bytes that autograd keeps for the backward pass. The time of a step is the longer of
operations / (peak of the GPU x utilisation) and gradients / bandwidth, which overlap; utilisation and bandwidths are
assumptions, not measurements: the loop writes the true samples per second into log.jsonl.

--measure runs full-size passes of random weights on one CPU core instead, and divides the counted operations by their CPU
time and by what the core makes of a bare matrix product. --caches says what is left of a step whose frozen work is found in
a cache; with --measure as well, in CPU time. The sizes are those of what kosmos-g init writes.
"""

import argparse
import statistics
import time
from functools import cache
from pathlib import Path

import torch
from transformers import CLIPTextConfig

from kosmos_g_diffusers import KosmosGTextEncoderConfig
from kosmos_g_diffusers.training import TrainConfig
from kosmos_g_diffusers.training.rehearsal import counting
from kosmos_g_diffusers.training.rehearsal.counting import GIB, PEAKS, Shape, Sizes, frozen_work, run_pass

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
GPUS = {"paper": 256, "one_node": 8, "one_gpu": 1}  # by the first words of a recipe's name
SERVERS = ("A100", "H100")
BANDWIDTHS = {256: 25e9, 8: 200e9}  # bytes a second of each GPU to the others: 200 Gbit/s network; NVLink
# of a padded sample, roughly, images included
SHAPES = {"pretrain": Shape(100, 1.0), "align": Shape(32, 0.0), "instruct": Shape(128, 1.2)}
UNET = {"cross_attention_dim": 768, "sample_size": 64}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@cache
def count(stage_name, lora_rank=0, checkpointing=False):
    """Cost of a stage with Stable Diffusion 1.5."""
    settings = _settings(stage_name, lora_rank, checkpointing)
    return counting.count(settings, _sizes(), SHAPES[stage_name])


def _settings(stage_name, lora_rank=0, checkpointing=False):
    values = {"lora_rank": lora_rank, "gradient_checkpointing": checkpointing, "mixed_precision": "bf16"}
    return TrainConfig.from_dict(values, stage_name)


def _sizes():
    encoder = KosmosGTextEncoderConfig(aligner_max_positions=2050)
    target = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    return Sizes(encoder, target, UNET, VAE, {"_class_name": "DDPMScheduler"})


def build_at_random(stage_name, lora_rank):
    """A stage in memory: random weights, frozen ones in bfloat16."""
    with torch.device("meta"):
        stage = counting.build_stage(_settings(stage_name, lora_rank), _sizes()).train()
    for model in (stage, *stage.frozen_models):
        if model is not stage:
            model.to(torch.bfloat16)
        for module in model.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, torch.nn.Linear) and frozen:
                module.to(torch.bfloat16)  # where autocast would round it at every use
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return stage


def measure(stage_name, batch_size, lora_rank=0):
    """(CPU seconds of a forward and backward pass on one thread, operations a second of products before and after it)."""
    stage = build_at_random(stage_name, lora_rank)
    run_pass(stage_name, stage, batch_size, SHAPES[stage_name])  # makes the gradients
    before, start = product_rate(), time.process_time()
    run_pass(stage_name, stage, batch_size, SHAPES[stage_name])
    return time.process_time() - start, (before, product_rate())


def measure_caches(stage_name, batch_size, lora_rank=0, rounds=3):
    """(CPU seconds of a pass, of one that finds its frozen work), medians of passes in turns."""
    stage, shape = build_at_random(stage_name, lora_rank), SHAPES[stage_name]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = {name: work() for name, work in frozen_work(stage_name, stage, batch_size, shape).items()}
    seconds = {False: [], True: []}
    for number in range(rounds + 1):
        for finds in (False, True):
            start = time.process_time()
            run_pass(stage_name, stage, batch_size, shape, found=found if finds else None)
            if number:  # the first makes the gradients
                seconds[finds].append(time.process_time() - start)
    return tuple(statistics.median(each) for each in seconds.values())


def product_rate(size=4096, repeats=5):
    """Operations a second of a bfloat16 matrix product, median."""
    one, other = torch.randn(2, size, size).bfloat16()
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        one @ other
        seconds.append(time.process_time() - start)
    return 2 * size**3 / sorted(seconds[1:])[repeats // 2]


def print_measured():
    torch.set_num_threads(1)
    heads = ["pass", "samples", "TFLOP", "CPU s", "GFLOP/s", "GFLOP/s of products", "utilisation"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, batch_size, lora_rank in (("align", 16, 0), ("instruct", 1, 16)):
        operations = batch_size * count(name, lora_rank).operations
        seconds, rates = measure(name, batch_size, lora_rank)
        rate, bare = operations / seconds, sum(rates) / 2
        row = [name + (" with adapters" if lora_rank else ""), batch_size, f"{operations / 1e12:.2f}"]
        row += [f"{seconds:.1f}", f"{rate / 1e9:.0f}", " and ".join(f"{rate / 1e9:.0f}" for rate in rates)]
        print(f"| {' | '.join(map(str, row))} | {rate / bare:.0%} |", flush=True)


def print_caches(measured):
    torch.set_num_threads(1)
    heads = ["stage", "TFLOP a sample", "found", "TFLOP left", "ratio"]
    heads += ["samples", "CPU s", "CPU s with caches", "ratio"] if measured else []
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, batch_size, lora_rank in (
        ("pretrain", 2, 0),
        ("align", 16, 0),
        ("instruct", 1, 0),
        ("instruct", 1, 16),
    ):
        cost = count(name, lora_rank)
        left = cost.operations - sum(cost.frozen.values())
        row = [name + (" with adapters" if lora_rank else ""), f"{cost.operations / 1e12:.2f}"]
        row += [", ".join(f"{work} {operations / 1e12:.3f}" for work, operations in cost.frozen.items())]
        row += [f"{left / 1e12:.2f}", f"{cost.operations / left:.2f}"]
        # the others need more memory than small machines have
        if measured and (name == "align" or lora_rank):
            seconds, shorter = measure_caches(name, batch_size, lora_rank)
            row += [str(batch_size), f"{seconds:.1f}", f"{shorter:.1f}", f"{seconds / shorter:.2f}"]
        print(f"| {' | '.join(row + [''] * (len(heads) - len(row)))} |", flush=True)


def estimate(path, utilisation):
    """A row of the table: recipe, GPUs, samples a step, operations a sample, memory, and for each GPU seconds and days."""
    settings = TrainConfig.from_toml(path, path.stem.rpartition("_")[2])
    gpus = GPUS[path.stem.rpartition("_")[0]]
    cost = count(settings.stage, settings.lora_rank, settings.gradient_checkpointing)
    samples = gpus * settings.batch_size * settings.accumulation
    row = [path.stem, gpus, f"{gpus} x {settings.batch_size} x {settings.accumulation} = {samples:,}"]
    row += [f"{cost.operations / 1e12:.2f}", f"{cost.memory(settings) / GIB:.0f}"]
    exchange = 2 * 4 * cost.trained / BANDWIDTHS[gpus] if gpus in BANDWIDTHS else 0.0
    for peak in map(PEAKS.get, SERVERS):
        seconds = samples * cost.operations / gpus / (peak * utilisation)
        longer = max(seconds, exchange)
        row += [f"{seconds:.2f}", f"{longer * settings.steps / 86400:.1f}"]
    row.insert(5, f"{exchange:.2f}")
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of the peak (default: 0.3)")
    parser.add_argument("--measure", action="store_true", help="time passes on this machine's CPU")
    parser.add_argument(
        "--caches", action="store_true", help="what is left of a step whose frozen work is found"
    )
    arguments = parser.parse_args()
    if arguments.caches:
        return print_caches(arguments.measure)
    if arguments.measure:
        return print_measured()
    utilisation = arguments.utilisation
    heads = ["recipe", "GPUs", "samples a step", "TFLOP a sample", "GiB a GPU", "s exchange"]
    heads += [f"{gpu} {what}" for gpu in SERVERS for what in ("s", "days")]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    recipes = sorted(
        RECIPES.glob("*.toml"), key=lambda path: (-GPUS[path.stem.rpartition("_")[0]], path.stem)
    )
    for path in recipes:
        print(f"| {' | '.join(map(str, estimate(path, utilisation)))} |", flush=True)
    print()
    for stage, lora_rank, checkpointing in (
        ("pretrain", 0, False),
        ("align", 0, False),
        ("instruct", 0, False),
        ("instruct", 16, True),
    ):
        cost = count(stage, lora_rank, checkpointing)
        print(
            f"{stage}{' with adapters and checkpointing' if lora_rank else ''}: {cost.trained:,} weights train, "
            f"{cost.weights / GIB:.1f} GiB of weights, {12 * cost.trained / GIB:.1f} of gradients and moments, "
            f"{cost.fixed / GIB:.1f} of half-precision copies, {cost.kept / GIB:.3f} kept for each sample"
        )


if __name__ == "__main__":
    main()
