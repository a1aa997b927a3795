"""Samples a second and memory of the training stages, with and without each cache, compared with a plain loop:

    python benchmarks/train.py

Trains the models of examples/sprites for some steps with the package's loop, each way in a process of its own, in turns.
The plain loop is `train_plainly` below: no cache, no bucketing, no workers, PyTorch's own choice of an attention kernel. The
learning rate is 0, so that the losses of all ways are those of the same weights and can be compared.
`training_estimates.py --caches` looks at the released size.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from parts.arguments import parse
from parts.measure import PeakMemory, gib, now, report, significant
from torch.nn.attention import SDPBackend, sdpa_kernel

from kosmos_g_diffusers import KosmosGProcessor
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.data import AlignCollate, InstructCollate, MixtureDataset, PretrainCollate
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.world import IMAGE_SIZE
from kosmos_g_diffusers.training.cache import FrozenCache
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.loop import train
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

base = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "sprites" / "base.py")))
BATCH_SIZES = {"pretrain": 64, "align": 128, "instruct": 48}  # of examples/sprites
WORKS = {
    "pretrain": ("vision_states",),
    "align": ("clip_embeds",),
    "instruct": ("latent_parameters", "vision_states"),
}
LOSSES = {"pretrain": ("language",), "align": ("mse", "rec"), "instruct": ("denoising",)}
PLAIN, LOOP, FILL, ALL = "plain loop", "package's loop", "caches, filling them", "all caches"
BUCKET_WINDOW = 4
WARM_UP, TAIL = 2, 3  # steps around those that are timed; in the last ones the workers have nothing to do


def build(stage, bucket_window):
    """(stage module, collate, keyword arguments of MixtureDataset) of the sprite configuration, with fresh weights."""
    torch.manual_seed(0)
    tokenizer = base.build_tokenizer()
    encoder, processor = base.build_text_encoder(tokenizer), KosmosGProcessor(tokenizer)
    clip_tokenizer, scheduler = base.build_clip_tokenizer(), base.build_scheduler()
    options = {"batch_size": BATCH_SIZES[stage], "bucket_window": bucket_window}
    if stage == "pretrain":
        # from a model whose tower is trained already; the example starts from nothing and trains all of it
        module, collate = PretrainStage(encoder, train_vision="last"), PretrainCollate(processor)
        return module, collate, {"sources": [SpriteSource("varied pictures", 200_000)], **options}
    diffusion = base.DiffusionStage(clip_tokenizer, scheduler)
    if stage == "align":
        module = AlignStage(encoder, build_fresh(AlignerNetN, encoder.config, 1), diffusion.text_encoder)
        collate = AlignCollate(processor, clip_tokenizer, max_text_tokens=None)
        return module, collate, {"sources": [SpriteSource("captions")], **options}
    module = InstructStage(encoder, diffusion.unet, base.build_vae(), scheduler)
    collate = InstructCollate(processor, IMAGE_SIZE, vae_scale_factor=4, max_text_tokens=None, resize=False)
    return module, collate, base.build_instruct_mixture() | options


def train_plainly(stage, dataset, steps, precision):
    """The loop that one writes first. Returns the losses."""
    weights = [weight for weight in stage.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)
    half = precision == "bf16"
    stage.move_frozen(dtype=torch.bfloat16 if half else torch.float32)
    stage.train()
    losses = []
    for step in range(steps):
        batch = {name: value for name, value in dataset[step].items() if torch.is_tensor(value)}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = sum(stage(batch).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def measure(stage_name, way, steps, workers, folder, precision):
    """Train, timing so many steps; a dict of seconds, samples, tokens, images, memory and losses."""
    stage, collate, data = build(stage_name, 1 if way == PLAIN else BUCKET_WINDOW)
    cache, total = None, WARM_UP + steps + TAIL
    if way not in (PLAIN, LOOP):
        only = None if way in (ALL, FILL) else [way]
        cache = FrozenCache(folder / stage_name, stage, precision, only=only, keep_free=0)
        collate = cache.attach(collate)
    dataset = MixtureDataset(collate=collate, **data)
    seen = []  # at the beginning of each step: seconds of this process and its workers, tokens, images

    def note(_, inputs):
        (batch,) = inputs
        images = batch.get("vision_states.found", batch.get("pixel_values", ()))
        seen.append((now() + worker_seconds(), batch["input_ids"].numel(), len(images)))

    # before the cache's own hook, whose work belongs to the step
    stage.register_forward_pre_hook(note, prepend=True)
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as run:
        if way == PLAIN:
            losses = train_plainly(stage, dataset, total, precision)
        else:
            config = TrainConfig(
                output=run, steps=total, batch_size=data["batch_size"], lr=0.0, workers=workers,
                mixed_precision=precision, max_grad_norm=1.0, log_every=1, save_every=total,
            )  # fmt: skip
            with sdpa_kernel(SDPBackend.MATH):  # as the example; it says why
                train(config, stage, dataset, save_model=lambda *_: None, progress_bar=False)
            lines = (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [sum(json.loads(line)[name] for name in LOSSES[stage_name]) for line in lines]
    if cache is not None:
        cache.flush()
    timed, samples = seen[WARM_UP : WARM_UP + steps], steps * data["batch_size"]
    return {
        "seconds": seen[WARM_UP + steps][0] - timed[0][0],
        "samples": samples,
        "tokens": sum(tokens for _, tokens, _ in timed) / samples,
        "images": sum(images for *_, images in timed) / samples,
        "peak": peak.resident,
        "losses": losses,
        "computed": {} if cache is None else cache.computed,
    }


def worker_seconds():
    """CPU seconds of the processes that this one started; 0 when wall time is counted."""
    if "--cpu-time" not in sys.argv:
        return 0.0
    seconds = 0.0
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def measure_apart(stage, way, arguments, folder):
    """What `measure` finds in a fresh process."""
    command = [sys.executable, __file__, "--run", stage, way, "--folder", str(folder)]
    command += ["--steps", str(arguments.steps), "--workers", str(arguments.workers)]
    command += ["--precision", arguments.precision]
    command += [flag for flag in ("--tiny", "--cpu-time") if flag in sys.argv]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def compare(stage, arguments, folder):
    """(rows of the table, figures) of one stage."""
    single = [work for work in WORKS[stage] if len(WORKS[stage]) > 1]
    ways = [PLAIN, LOOP, *single, ALL]
    found = {way: [] for way in ways}
    filling = measure_apart(stage, FILL, arguments, folder)
    for number in range(arguments.rounds):
        for way in reversed(ways) if number % 2 else ways:
            found[way].append(measure_apart(stage, way, arguments, folder))
    for way in [*single, ALL]:
        assert not any(count for run in found[way] for count in run["computed"].values()), (way, found[way])
    found = {PLAIN: found[PLAIN], LOOP: found[LOOP], FILL: [filling], **found}
    rows = []
    for way, runs in found.items():
        speeds = [run["samples"] / run["seconds"] for run in runs]
        changes = [
            abs(loss / expected - 1)
            for run in runs
            for loss, expected in zip(run["losses"], found[LOOP][0]["losses"], strict=True)
        ]
        rows.append(
            [
                stage, way, significant(statistics.median(speeds)),
                *(_ratio(runs, found[other]) for other in (PLAIN, LOOP)),
                f"{runs[0]['tokens']:.1f}", f"{runs[0]['images']:.2f}",
                gib(max(run["peak"] for run in runs)),
                "" if way == PLAIN else f"{max(changes):.1e}",
            ]
        )  # fmt: skip
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows, found


def _ratio(runs, others):
    """Speed over that of another way, round by round: median (lowest to highest)."""
    speeds, base_speeds = ([run["samples"] / run["seconds"] for run in each] for each in (runs, others))
    ratios = [speed / base_speed for speed, base_speed in zip(speeds, base_speeds, strict=False)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of training with and without caches.")
    parser.add_argument("--stages", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--steps", type=int, default=16, help="that are timed, in each run (default: 16)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way (default: 2)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read data (default: 1)")
    parser.add_argument("--folder", type=Path, help="for the caches (default: a temporary one)")
    parser.add_argument(
        "--precision", choices=("no", "bf16"), default="bf16", help="mixed precision (default: bf16)"
    )
    parser.add_argument("--run", nargs=2, metavar=("STAGE", "WAY"), help=argparse.SUPPRESS)
    arguments = parse(parser)
    torch.set_grad_enabled(True)
    if arguments.tiny:
        arguments.steps, arguments.rounds = 2, 1
        BATCH_SIZES.update(dict.fromkeys(BATCH_SIZES, 2))
    if arguments.run is not None:
        options = (arguments.steps, arguments.workers, arguments.folder, arguments.precision)
        return print(json.dumps(measure(*arguments.run, *options)))

    rows, figures = [], {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for stage in arguments.stages:
            stage_rows, figures[stage] = compare(stage, arguments, folder)
            rows += stage_rows
    columns = [
        "stage", "way", "samples/s", "over the plain loop", "over the package's loop", "tokens a sample",
        "images a sample", "peak memory", "largest relative change of a loss",
    ]  # fmt: skip
    report(
        f"Training of examples/sprites, mixed precision {arguments.precision}",
        columns,
        rows,
        figures,
        arguments.json,
    )


if __name__ == "__main__":
    main()
