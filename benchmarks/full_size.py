"""Build the released size with random weights and draw one image from two photos and text, on the CPU:

    python benchmarks/full_size.py

Prints the seconds of each stage, the share of the machine's matrix-product peak that the encoder reaches, and memory.
"""

import argparse
import statistics
import time

import torch
from parts.arguments import parse
from parts.measure import PeakMemory, StageClock, gib, multiply_square, now, report, significant
from parts.models import (
    DTYPES,
    PHOTOS,
    assemble,
    build_text_encoder,
    build_tiny,
    build_unet,
    build_vae,
    encoder_stages,
)
from PIL import Image

from kosmos_g_diffusers import KosmosGProcessor

PROMPT = "<i> in the style of <i>"


def build(dtype, tiny):
    """(pipeline, seconds of each part)."""
    start = now()
    if tiny:
        return build_tiny(dtype), {"build everything": now() - start}
    parts, seconds = {}, {}
    for name, build_part in (("text encoder", build_text_encoder), ("U-Net", build_unet), ("VAE", build_vae)):
        start = now()
        parts[name] = build_part(dtype)
        seconds[f"build {name}"] = now() - start
    return assemble(*parts.values(), words=PROMPT.split()), seconds


def measure_encoder(pipe, photos, n_prompts, rounds, multiply):
    """Encode `n_prompts` prompts of two photos each, `rounds` times, with the matrix product timed in between."""
    inputs = KosmosGProcessor(pipe.tokenizer)([PROMPT] * n_prompts, [photos] * n_prompts)
    encoder, stages = pipe.text_encoder, encoder_stages(pipe.text_encoder)
    with StageClock(stages, count_flops=True) as counted:  # the first pass also warms up
        condition = encoder(**inputs).last_hidden_state
    assert condition.isfinite().all()
    peak, whole, cores = [multiply()], [], []
    with StageClock(stages) as clock:
        for _ in range(rounds):
            start, wall, cpu = now(), time.perf_counter(), time.process_time()
            encoder(**inputs)
            whole.append(now() - start)
            cores.append((time.process_time() - cpu) / (time.perf_counter() - wall))
            peak.append(multiply())
    seconds = {**{name: clock.seconds[name] for name in stages}, "whole encoder": whole}
    flops = {**counted.flops, "whole encoder": sum(counted.flops.values())}
    # each round against the products right before and after it: the machine's speed changes
    shares = {
        name: [
            2 * flops[name] / one / (before + after)
            for one, before, after in zip(seconds[name], peak[:-1], peak[1:], strict=True)
        ]
        for name in seconds
    }
    return {
        "tokens": inputs["input_ids"].shape[1],
        "seconds": seconds,
        "flops": flops,
        "peak": peak,
        "share_of_peak": shares,
        "cores": statistics.median(cores),
    }


def draw(pipe, photos, steps):
    """Seconds of each stage of one image with guidance, photos and text to image."""
    stages = {
        **encoder_stages(pipe.text_encoder),
        "U-Net": (pipe.unet, pipe.unet),
        "VAE": (pipe.vae.post_quant_conv, pipe.vae.decoder),
    }
    pipe.set_progress_bar_config(disable=True)

    def generate(n_steps):
        return pipe(
            PROMPT,
            images=photos,
            num_inference_steps=n_steps,
            guidance_scale=6.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    with StageClock(stages, count_flops=True) as counted:
        generate(1)
    with StageClock(stages) as clock:
        start = now()
        image = generate(steps)
        total = now() - start
    assert image.isfinite().all()
    return tuple(image.shape[-2:]), dict(clock.seconds), dict(counted.flops), total


def main():
    parser = argparse.ArgumentParser(
        description="Time and memory of the full-size model with random weights."
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of the image (default: 4)")
    parser.add_argument("--batch", type=int, default=8, help="prompts of the encoder's batch (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="encodings of each batch (default: 5)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)"
    )
    parser.add_argument("--size", type=int, default=4096, help="of the square matrix product (default: 4096)")
    arguments = parse(parser)
    dtype, size = DTYPES[arguments.dtype], 256 if arguments.tiny else arguments.size

    with PeakMemory() as peak_memory:
        pipe, build_seconds = build(dtype, arguments.tiny)
        parts = (pipe.text_encoder, pipe.unet, pipe.vae)
        weights = sum(weight.nbytes for part in parts for weight in part.parameters())
        photos = [Image.open(path) for path in PHOTOS]
        multiply = multiply_square(dtype, size, seconds=0.01 if arguments.tiny else 2.0)
        batches = {
            n: measure_encoder(pipe, photos, n, arguments.rounds, multiply) for n in (arguments.batch, 1)
        }
        resolution, draw_seconds, draw_flops, total = draw(pipe, photos, arguments.steps)

    peaks = [speed for batch in batches.values() for speed in batch["peak"]]
    peak = statistics.median(peaks)
    rows = [[name, significant(seconds), "", "", ""] for name, seconds in build_seconds.items()]

    def add_row(name, seconds, flops, share=None):
        speed = flops / seconds
        share = speed / peak if share is None else share
        rows.append(
            [name, significant(seconds), significant(flops / 1e12), significant(speed / 1e9), f"{share:.0%}"]
        )

    for n, batch in batches.items():
        prompts = f"{n} prompts" if n > 1 else "1 prompt"
        for stage, seconds in batch["seconds"].items():
            name = f"{prompts} of 2 photos, {batch['tokens']} tokens: {stage}"
            share = statistics.median(batch["share_of_peak"][stage])
            add_row(name, statistics.median(seconds), batch["flops"][stage], share)
    drawing = "image " + " x ".join(map(str, reversed(resolution)))
    names = {"U-Net": "U-Net, a step with guidance", "VAE": "VAE decoder"}
    for stage, seconds in draw_seconds.items():
        name = names.get(stage, f"{stage}, prompt and negative")
        seconds = statistics.median(seconds) if stage == "U-Net" else sum(seconds)
        add_row(f"{drawing}: {name}", seconds, draw_flops[stage])
    rows.append([f"{drawing}: all, {len(draw_seconds['U-Net'])} steps", significant(total), "", "", ""])
    cores = " and ".join(f"{batch['cores']:.2f}" for batch in batches.values())
    title = (
        f"{arguments.dtype}, weights {gib(weights)}, peak memory {gib(peak_memory.resident)} resident, "
        f"{gib(peak_memory.anonymous)} anonymous. Matrix product of {size} x {size}: {peak / 1e9:.0f} GFLOP/s "
        f"({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}). Cores held while encoding: {cores}."
    )
    figures = {
        "dtype": arguments.dtype,
        "weights_bytes": weights,
        "peak_resident_bytes": peak_memory.resident,
        "peak_anonymous_bytes": peak_memory.anonymous,
        "build_seconds": build_seconds,
        "encoder": batches,
        "image_seconds": {**draw_seconds, "all": total},
        "image_flops": draw_flops,
    }
    report(title, ["stage", "seconds", "TFLOP", "GFLOP/s", "of the peak"], rows, figures, arguments.json)


if __name__ == "__main__":
    main()
