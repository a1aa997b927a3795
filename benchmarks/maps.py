"""How much longer a call takes with maps, binding and regions, next to the same call without; and both on the released size:

    python benchmarks/maps.py
    python benchmarks/maps.py --full-size

Two images in the prompt, 12 steps, guidance 5, float32. `--full-size` builds random weights of the released size (bfloat16; about
8 GB), draws two steps of 128 pixels, checks shapes and sums, and prints seconds and peak memory: nothing is said of quality.
"""

import argparse

import torch
from parts.arguments import parse
from parts.measure import PeakMemory, gib, now, ratio, report, spread, time_in_turns
from parts.models import build_full_size, build_tiny

from kosmos_g_diffusers import SPRITES, KosmosGPipeline
from kosmos_g_diffusers.generation.schedulers import make_scheduler
from kosmos_g_diffusers.sprites import HEART, STAR

PROMPT = "<i> and <i>"
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
CALLS = {
    "plain": {},
    "return_maps": {"return_maps": True},
    "binding": {"binding": 1.0},
    "regions": {"regions": HALVES},
    "binding and regions": {"binding": 1.0, "regions": HALVES},
}


def compare(pipe, rounds):
    def draw(asked):
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 12, "guidance_scale": 5.0, "generator": generator}
        return pipe(PROMPT, images=[STAR, HEART], **settings, **asked)

    seconds = time_in_turns({name: lambda asked=asked: draw(asked) for name, asked in CALLS.items()}, rounds)
    rows = []
    for name, values in seconds.items():
        middle, low, high = ratio(values, seconds["plain"])
        rows.append([name, spread(values), f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    return rows, seconds


def try_full_size(pipe, side):
    rows, figures = [], {}
    for name in ("plain", "binding and regions"):
        asked = CALLS[name]
        asked = {**asked, "return_maps": True} if asked else asked
        start = now()
        with PeakMemory() as peak:
            settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": side, "width": side}
            generator = torch.Generator().manual_seed(0)
            output = pipe(
                PROMPT, images=[STAR, HEART], output_type="latent", generator=generator, **settings, **asked
            )
        shape = "-"
        if asked:
            (maps,) = output.maps
            assert maps.isfinite().all() and torch.allclose(
                maps.sum(0), torch.ones(maps.shape[1:]), atol=1e-4
            )
            shape = " x ".join(map(str, maps.shape))
        figures[name] = {"seconds": now() - start, "peak": peak.anonymous}
        rows.append([name, f"{figures[name]['seconds']:.1f}", gib(peak.anonymous), shape])
    return rows, figures


def main():
    parser = argparse.ArgumentParser(description="Seconds of a call with maps, binding and regions.")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each kind (default: 20)")
    parser.add_argument("--full-size", action="store_true", help="random weights of the released size")
    arguments = parse(parser)
    if arguments.full_size:
        pipe = build_tiny(torch.float32) if arguments.tiny else build_full_size(torch.bfloat16, ["and"])
        pipe.set_progress_bar_config(disable=True)
        rows, figures = try_full_size(pipe, 32 if arguments.tiny else 128)
        report(
            "Random weights of the released size",
            ["call", "seconds", "peak memory", "maps"],
            rows,
            figures,
            arguments.json,
        )
        return
    pipe = KosmosGPipeline.from_pretrained(SPRITES)
    pipe.scheduler = make_scheduler("dpm", pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.warns_outside_world = False
    rows, seconds = compare(pipe, 1 if arguments.tiny else arguments.rounds)
    report("Maps, binding, regions", ["call", "seconds", "of a plain call"], rows, seconds, arguments.json)


if __name__ == "__main__":
    main()
