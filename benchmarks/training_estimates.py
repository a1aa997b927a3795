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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTextEncoderConfig
from kosmos_g_diffusers.training import AlignerNetN, AlignStage, InstructStage, PretrainStage, TrainConfig
from kosmos_g_diffusers.training.adapters import add_adapter

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
GPUS = {"paper": 256, "one_node": 8, "one_gpu": 1}  # by the first words of a recipe's name
PEAKS = {"A100": 312e12, "H100": 989e12}  # operations a second in bfloat16, dense, by NVIDIA's data sheets
BANDWIDTHS = {256: 25e9, 8: 200e9}  # bytes a second of each GPU to the others: 200 Gbit/s network; NVLink
TOKENS = {"pretrain": 100, "align": 32, "instruct": 128}  # of a padded sample, roughly, images included
IMAGES = {"pretrain": 1.0, "align": 0.0, "instruct": 1.2}  # of a sample
GIB = 2**30


@dataclass
class Cost:
    """Of a stage on one GPU, in bytes and operations."""

    trained: int  # weights that train
    weights: int  # bytes of all weights
    fixed: float  # bytes that autograd keeps whatever the batch: half-precision copies of weights
    kept: float  # bytes that it keeps for each sample
    operations: float  # of each sample, forwards and backwards
    frozen: dict  # of these, what a cache can bring, by the names of FrozenCache

    def memory(self, batch_size):
        """Bytes: weights, gradients and AdamW's two moments in float32, and what autograd keeps."""
        return self.weights + 12 * self.trained + self.fixed + batch_size * self.kept


@cache
def count(stage_name, lora_rank=0, checkpointing=False):
    """Cost of a stage with Stable Diffusion 1.5."""
    with FakeTensorMode():
        stage = build_stage(stage_name, lora_rank).train()
        if checkpointing:
            stage.gradient_checkpointing_enable()
        small, large = (bytes_kept(stage_name, stage, batch_size) for batch_size in (10, 20))
        with sdpa_kernel(SDPBackend.MATH):  # the operations of others go uncounted
            with FlopCounterMode(display=False) as counter:
                backward(stage_name, stage, 10)
            frozen = {}
            for name, work in frozen_work(stage_name, stage, 10).items():
                with FlopCounterMode(display=False) as frozen_counter, torch.no_grad():
                    work()
                frozen[name] = frozen_counter.get_total_flops() / 10
    kept = (large - small) / 10
    held = sum(parameter.numel() for model in stage.frozen_models for parameter in model.parameters())
    return Cost(
        trained=sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad),
        weights=2 * held + sum(parameter.nbytes for parameter in stage.parameters()),
        fixed=small - 10 * kept,
        kept=kept,
        operations=counter.get_total_flops() / 10,
        frozen=frozen,
    )


def build_stage(name, lora_rank):
    encoder = KosmosGTextEncoder(KosmosGTextEncoderConfig(aligner_max_positions=2050))
    if name == "pretrain":
        return PretrainStage(encoder)
    if name == "align":
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        return AlignStage(encoder, AlignerNetN(encoder.config), CLIPTextModel(CLIPTextConfig(**sizes)))
    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    stage = InstructStage(encoder, unet, vae, DDPMScheduler(), "none" if lora_rank else "last")
    if lora_rank:
        with mock.patch.object(torch.nn.Module, "to", lambda self, *args, **kwargs: self):  # fake ones cannot
            add_adapter(encoder, lora_rank, torch.bfloat16)
    return stage


def bytes_kept(name, stage, batch_size):
    """Bytes that autograd keeps, weights not counted."""
    models = (stage, *stage.frozen_models)
    weights = {parameter.untyped_storage()._cdata for model in models for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backward(name, stage, batch_size, run_backward=False)
    return sum(storage.nbytes() for storage in kept.values())


def frozen_work(name, stage, batch_size):
    """What gives the same in every step: a dict of functions without arguments, by the names of FrozenCache."""
    works, images = {}, round(IMAGES[name] * batch_size)
    if images:
        size = stage.text_encoder.config.vision_config.image_size
        works["vision_states"] = lambda: stage.vision_states(torch.zeros(images, 3, size, size))
    if name == "align":
        length = stage.target.config.max_position_embeddings
        works["clip_embeds"] = lambda: stage.clip_embeds(torch.zeros(batch_size, length, dtype=torch.int64))
    if name == "instruct":
        side = 8 * stage.unet.config.sample_size
        works["latent_parameters"] = lambda: stage.latent_parameters(torch.zeros(batch_size, 3, side, side))
    return works


def backward(name, stage, batch_size, run_backward=True, found=None):
    """A step as `stage.forward` makes it, without what looks at values: there are none.

    Args:
        found: results of `frozen_work` that need not be computed.
    """
    encoder, config = stage.text_encoder, stage.text_encoder.config
    tokens, images = TOKENS[name], round(IMAGES[name] * batch_size)
    ids = torch.zeros(batch_size, tokens, dtype=torch.int64)
    mask = torch.zeros(batch_size, tokens, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = found or {key: work() for key, work in frozen_work(name, stage, batch_size).items()}
        image_embeds = stage.image_embeds(frozen) if images else None
        with torch.no_grad() if name == "align" else nullcontext():
            states = encoder.get_language_hidden_states(ids, image_embeds, mask)
        if name == "pretrain":
            words = batch_size * tokens - images * config.latent_query_num
            logits = states.flatten(0, 1)[:words] @ encoder.get_input_embeddings().weight.T
            loss = torch.nn.functional.cross_entropy(logits.float(), ids.flatten()[:words])
        else:
            condition = encoder.aligner(states, ~mask)[-1]
        if name == "align":
            again = stage.aligner_n(condition, tokens)
            loss = (condition - frozen["clip_embeds"]).square().mean() + again.square().mean()
        elif name == "instruct":
            unet = stage.unet
            latents = frozen["latent_parameters"][:, : unet.config.in_channels]
            loss = unet(latents, torch.zeros(batch_size, dtype=torch.int64), condition).sample.square().mean()
    if run_backward:
        loss.backward()


def build_at_random(stage_name, lora_rank):
    """A stage in memory: random weights, frozen ones in bfloat16."""
    with torch.device("meta"):
        stage = build_stage(stage_name, lora_rank).train()
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
    backward(stage_name, stage, batch_size)  # makes the gradients
    before, start = product_rate(), time.process_time()
    backward(stage_name, stage, batch_size)
    return time.process_time() - start, (before, product_rate())


def measure_caches(stage_name, batch_size, lora_rank=0, rounds=3):
    """(CPU seconds of a pass, of one that finds its frozen work), medians of passes in turns."""
    stage = build_at_random(stage_name, lora_rank)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = {name: work() for name, work in frozen_work(stage_name, stage, batch_size).items()}
    seconds = {False: [], True: []}
    for number in range(rounds + 1):
        for finds in (False, True):
            start = time.process_time()
            backward(stage_name, stage, batch_size, found=found if finds else None)
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
    row += [f"{cost.operations / 1e12:.2f}", f"{cost.memory(settings.batch_size) / GIB:.0f}"]
    exchange = 2 * 4 * cost.trained / BANDWIDTHS[gpus] if gpus in BANDWIDTHS else 0.0
    for peak in PEAKS.values():
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
    heads += [f"{gpu} {what}" for gpu in PEAKS for what in ("s", "days")]
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
