"""A training step over its matrix products alone, and over a plain loop, at the released width with few layers:

    python benchmarks/training_steps.py --threads 1

Trains each stage on random batches with the package's loop. Between two of its steps the products of one step (matrix products,
convolutions and the products of attention, forward and backward) are computed again on random numbers of the same shapes, so that both
are timed in turns; then the same with a plain loop. What the rest of a step is, is listed by operation.
"""

import argparse
import gc
import statistics
import tempfile
from collections import Counter

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from parts.arguments import parse
from parts.measure import now, ratio, report, significant
from parts.models import SCHEDULER, UNET, VAE, build_at_random
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

from kosmos_g_diffusers import KosmosGTextEncoder, KosmosGTextEncoderConfig
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.loop import train
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

LAYERS = 2  # of the vision tower, the language model and each half of the AlignerNet
FEW = {"layers_per_block": 1, "block_out_channels": (320, 640)}
FEW_UNET = UNET | FEW | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
FEW_VAE = VAE | FEW | {
    "block_out_channels": (64, 64, 64, 64),
}  # fmt: skip
LENGTH, IMAGE_SIDE, LATENT_SIDE = 96, 224, 32
TINY = {"vocab_size": 300, "embed_dim": 64, "ffn_dim": 128, "attention_heads": 4}
TINY_WIDTH = 32  # of conditions
TINY_UNET = {"block_out_channels": (32, 64), "cross_attention_dim": TINY_WIDTH, "attention_head_dim": 2}
PRODUCTS = {
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten.convolution",
    "aten.convolution_backward",
}
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"
WARM_UP = 1


def build_encoder(tiny):
    text, vision = {"layers": LAYERS}, {"num_hidden_layers": LAYERS}
    sizes = {"aligner_layers": LAYERS}
    if tiny:
        text |= TINY
        vision |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        sizes |= {"image_token_id": 297, "end_of_image_token_id": 298, "aligner_max_positions": 256}
        sizes |= {"aligner_hidden_size": TINY_WIDTH, "aligner_ffn_dim": 64, "aligner_attention_heads": 2}
    config = KosmosGTextEncoderConfig(text_config=text, vision_config=vision, **sizes)
    return build_at_random(lambda: KosmosGTextEncoder(config), torch.float32)


def build(stage, samples, tiny):
    """(stage module, batch of random numbers of one image and LENGTH tokens a sample)."""
    encoder = build_encoder(tiny)
    config = encoder.config
    length, queries = config.latent_query_num + LENGTH, config.latent_query_num
    ids = torch.randint(5, config.image_token_id, (samples, length))
    slots = torch.zeros(samples, length, dtype=torch.bool)
    slots[:, 2 : 2 + queries] = True
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(slots), "image_token_mask": slots}
    batch["pixel_values"] = torch.randn(samples, 3, IMAGE_SIDE, IMAGE_SIDE)
    if stage == "pretrain":
        return PretrainStage(encoder), {**batch, "labels": ids.roll(-1, 1).masked_fill(slots, -100)}
    if stage == "align":
        for name in ("image_token_mask", "pixel_values"):  # captions alone, as in the paper
            del batch[name]
        width, heads = (TINY_WIDTH, 2) if tiny else (768, 12)
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS,
                             num_attention_heads=heads))  # fmt: skip
        batch["clip_input_ids"] = torch.randint(0, 49000, (samples, 77))
        return AlignStage(encoder, build_fresh(AlignerNetN, config, 1), clip), batch
    unet_config = FEW_UNET | (TINY_UNET if tiny else {})
    unet = build_at_random(lambda: UNet2DConditionModel(**unet_config), torch.float32)
    vae = build_at_random(lambda: AutoencoderKL(**FEW_VAE), torch.float32)
    side = 8 if tiny else LATENT_SIDE
    shape = (samples, 4, side, side)
    batch |= {
        "latent_parameters": torch.randn(samples, 8, side, side),
        "latent_noise": torch.randn(shape), "noise": torch.randn(shape),
        "timesteps": torch.randint(1000, (samples,)), "drop_condition": torch.zeros(samples, dtype=torch.bool),
    }  # fmt: skip
    return InstructStage(encoder, unet, vae, DDPMScheduler(**SCHEDULER)), batch


class Recorder(TorchDispatchMode):
    """Counts the products that are computed, by operation and by the shapes, strides and dtypes of what goes in."""

    def __init__(self):
        super().__init__()
        self.products = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function).rpartition(".")[0]
        if name in PRODUCTS:
            self.products[function, tuple(map(_describe, arguments))] += 1
        elif name == ATTENTION:
            self._add_attention(*arguments[:3], backward=False)
        elif name == f"{ATTENTION}_backward":
            self._add_attention(*arguments[1:4], backward=True)
        return function(*arguments, **keywords or {})

    def _add_attention(self, query, key, value, backward):
        """Its products: scores and their values; backward the scores again, and two gradients of each product."""
        heads, (long, wide), other = query.shape[0] * query.shape[1], query.shape[2:], key.shape[2]
        into, out = ((heads, long, wide), (heads, wide, other)), ((heads, long, other), (heads, other, wide))
        across = ((heads, other, long), (heads, long, wide))
        shapes = [into, into, out, across, across] if backward else [into, out]
        for left, right in shapes:
            pair = [("tensor", shape, _strides(shape), query.dtype) for shape in (left, right)]
            self.products[torch.ops.aten.bmm.default, tuple(pair)] += 1


def _strides(shape):
    return torch.empty(shape, device="meta").stride()


def _describe(value):
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.stride(), value.dtype)
    return ("value", tuple(value) if isinstance(value, list) else value)


def _make(described):
    kind, value, *rest = described
    if kind == "value":
        return list(value) if isinstance(value, tuple) else value
    strides, dtype = rest
    size = 1 + sum((side - 1) * stride for side, stride in zip(value, strides, strict=True))
    return torch.randn(size).to(dtype).as_strided(value, strides)


def make_replay(products):
    """A function that computes counted products, each as often as it was."""
    calls = [(function, [*map(_make, given)], count) for (function, given), count in products.items()]

    def replay():
        with torch.no_grad():
            for function, arguments, count in calls:
                for _ in range(count):
                    function(*arguments)

    return replay


class PlainLoop:
    """The loop that one writes first, one step a call."""

    def __init__(self, stage, batch):
        self.stage, self.batch = stage, batch
        self.weights = [weight for weight in stage.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.0)

    def __call__(self):
        run_pass(self.stage, self.batch)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_pass(stage, batch):
    """Forward and backward, without what accelerate or a hook adds to the stage."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = type(stage).forward(stage, batch)
    sum(losses.values()).backward()


class Repeated(torch.utils.data.Dataset):
    """One batch, without end."""

    def __init__(self, batch):
        self.batch = batch

    def __getitem__(self, number):
        return {**self.batch, "keys": ["random"], "skipped": {}, "skipped_messages": []}


def measure(stage, batch, rounds):
    """Seconds of steps of the package's loop, of a plain loop, and of their products in turns with each; and what the rest is.

    The loops come one after the other: their moments together would be most of the memory.
    """
    stage.move_frozen(dtype=torch.bfloat16).train()
    with Recorder() as recorder:
        run_pass(stage, batch)
    stage.zero_grad()
    replay = make_replay(recorder.products)
    replay()
    loop, products = [], []
    profiler, started = profile(activities=[ProfilerActivity.CPU]), []

    def between_steps(*_):
        if len(products) == WARM_UP + rounds:
            profiler.stop()
            return
        if started:
            loop.append(now() - started.pop())
            products.append(_time(replay))
            if len(products) == WARM_UP + rounds:
                profiler.start()  # of the last step, which is not timed
        started.append(now())

    stage.register_forward_pre_hook(between_steps)
    with tempfile.TemporaryDirectory() as run:
        config = TrainConfig(output=run, steps=WARM_UP + rounds + 2, batch_size=len(batch["input_ids"]), lr=0.0, workers=0,
                             mixed_precision="bf16", max_grad_norm=1.0, save_every=10**6)  # fmt: skip
        train(config, stage, Repeated(batch), save_model=lambda *_: None, progress_bar=False)
    gc.collect()
    plain = PlainLoop(stage, batch)
    pairs = [(_time(plain), _time(replay)) for _ in range(WARM_UP + rounds)][WARM_UP:]
    seconds = {"package's loop": loop[WARM_UP:], "products": products[WARM_UP:]}
    seconds |= {"plain loop": [one for one, _ in pairs], "products beside it": [other for _, other in pairs]}
    return seconds, rest_of(profiler)


def _time(function):
    gc.collect()
    start = now()
    function()
    return now() - start


def rest_of(profiler):
    """Shares of the time of a step by operation, without products."""
    events = [(event.key, event.self_cpu_time_total) for event in profiler.key_averages()]
    total = sum(time for _, time in events)
    products = {name.replace("aten.", "aten::") for name in PRODUCTS} | {"aten::mkldnn_convolution"}
    products |= {ATTENTION.replace("aten.", "aten::"), f"{ATTENTION.replace('aten.', 'aten::')}_backward"}
    rest = sorted(((time / total, name) for name, time in events if name not in products), reverse=True)
    return rest[:12]


def main():
    parser = argparse.ArgumentParser(description="Training steps over their matrix products.")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("pretrain", "align", "instruct"),
        default=["pretrain", "align", "instruct"],
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed (default: 5)")
    parser.add_argument("--samples", type=int, default=8, help="of a batch (default: 8)")
    arguments = parse(parser)
    torch.set_grad_enabled(True)
    samples, rounds = (1, 1) if arguments.tiny else (arguments.samples, arguments.rounds)
    rows, figures = [], {}
    for name in arguments.stages:
        torch.manual_seed(0)
        seconds, rest = measure(*build(name, samples, arguments.tiny), rounds)
        loop, products, plain, beside = seconds.values()
        over, plain_over = ratio(loop, products), ratio(plain, beside)
        figures[name] = {
            "seconds": seconds,
            "over products": over,
            "plain over products": plain_over,
            "rest": rest,
        }
        texts = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in (over, plain_over)]
        medians = [significant(statistics.median(one)) for one in (loop, products)]
        rows.append([name, *medians, *texts, f"{over[0] / plain_over[0]:.2f}"])
        print(f"{name}: " + ", ".join(f"{kind} {share:.1%}" for share, kind in rest))
    columns = [
        "stage",
        "step, s",
        "products, s",
        "step over its products",
        "plain loop's",
        "step over the plain loop's",
    ]
    report(
        f"A step of {samples} samples, bf16 autocast, {LAYERS} layers", columns, rows, figures, arguments.json
    )


if __name__ == "__main__":
    main()
