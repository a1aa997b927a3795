"""What a rehearsal says, in lines for a person: data, memory, time, cost, disk, what runs out and what to change."""

import math
import shutil
from contextlib import suppress
from typing import Any

from .counting import GIB, PEAKS, SPARE, UTILISATION, gpu_seconds
from .rehearsing import Rehearsal, describe_changes
from .trial import free_bytes, machine_memory

SHARED_MEMORY = "/dev/shm"
LONGEST = 90  # characters of a prompt that is shown
FEW = 0.1  # share of left-out samples that is worth a warning


def describe(rehearsal: Rehearsal) -> str:
    """Lines about a `Rehearsal`; a `Rehearsal` whose trial ran out of memory has the count and the proposals alone."""
    config, figures = rehearsal.config, rehearsal.figures
    lines = []
    if "error" in figures:
        lines.append(f"The trial ran out of memory: {figures['error']}")
    else:
        processes = f", {figures['processes']} processes" if figures["processes"] > 1 else ""
        lines.append(f"{config.stage} on {figures['device']}{processes}, tried in a temporary folder")
        lines += figures["notes"]
        for source in figures["sources"]:
            lines += _describe_source(source)
        lines += [_describe_memory(figures), *_describe_time(rehearsal), _describe_disk(rehearsal)]
    if rehearsal.cost is not None:
        lines += _describe_count(rehearsal)
    problems = find_problems(rehearsal)
    lines += [f"runs out: {problem}" for problem in problems] or ["nothing runs out"]
    for number, proposal in enumerate(rehearsal.proposals):
        head = "settings that fit, tried" if number == 0 else "or"
        seconds = proposal.figures["step_seconds"]
        lines.append(
            f"{head}: {describe_changes(proposal.changes)} ({_gib(proposal.counted)} counted; here {seconds:.3g} s a step, "
            f"at most {_gib(proposal.figures['peak'])})"
        )
    if rehearsal.is_short and not rehearsal.proposals:
        lines.append(
            "No settings were found that fit. Take a larger GPU, or shard the weights over several with FSDP 2."
        )
    return "\n".join(lines)


def find_problems(rehearsal: Rehearsal) -> list[str]:
    """What would run out, and which setting changes that."""
    config, figures, problems = rehearsal.config, rehearsal.figures, []
    if rehearsal.is_short:
        have = f"{rehearsal.for_memory:.0f} GiB" if rehearsal.for_memory else "what is there"
        problems.append(f"memory: {_gib(rehearsal.counted_bytes)} of {have}. See the settings that fit.")
    if "error" in figures:
        return problems
    total = machine_memory()
    if figures["device"] == "cpu" and figures["peak"] > 0.95 * total:
        problems.append(
            f"main memory: {_gib(figures['peak'])} of {_gib(total)}. Pass a smaller --batch-size."
        )
    need, free = disk_need(rehearsal), free_bytes(config.output or ".")
    if need > free:
        problems.append(
            f"disk: {_gib(need)} of {_gib(free)} free. Pass a smaller --keep-checkpoints, leave --cache out, or another --output."
        )
    queue = 2 * config.workers * figures["batch"]
    with suppress(OSError):  # of systems that have it elsewhere
        room = shutil.disk_usage(SHARED_MEMORY).free
        if queue > room:
            problems.append(
                f"shared memory: {config.workers} workers hold up to {_gib(queue)} of batches, {SHARED_MEMORY} has {_gib(room)}. "
                "Pass fewer --workers, or docker run --shm-size 1g."
            )
    if rehearsal.step_seconds > 1.05 * figures["step_seconds"]:
        problems.append(
            f"data: {config.workers} workers need {rehearsal.step_seconds:.3g} s for a step that is computed in "
            f"{figures['step_seconds']:.3g} s. Pass more --workers, or smaller images."
        )
    for source in figures["sources"]:
        lost = sum(source["left_out"].values())
        if lost > FEW * source["looked_at"]:
            problems.append(
                f"samples of {source['name']}: {lost} of the first {source['looked_at']} are left out. See --max-text-tokens and "
                "--min-side, or the data."
            )
    return problems


def disk_need(rehearsal: Rehearsal) -> float:
    """Bytes of checkpoints, those that are kept and one more; of a target's own parts; and of caches."""
    config, figures = rehearsal.config, rehearsal.figures
    kept = config.keep_checkpoints or math.ceil(config.steps / config.save_every)
    return figures["checkpoint"] * (kept + 1) + figures["decoder"] + cache_need(rehearsal)


def cache_need(rehearsal: Rehearsal) -> float:
    """Bytes of the caches, if all samples that the run reads are kept once."""
    figures, config = rehearsal.figures, rehearsal.config
    if not figures.get("cache_entries"):
        return 0.0
    samples = sum(source["samples"] for source in figures["sources"])
    tried = max(1, (figures["steps"] * rehearsal.samples_a_step))
    read = min(samples, config.steps * rehearsal.samples_a_step)
    return figures["cache_bytes"] * max(1.0, read / tried)


def _describe_source(source: dict[str, Any]) -> list[str]:
    left = source["left_out"]
    causes = f"; left out: {', '.join(f'{count} {cause}' for cause, count in left.items())}" if left else ""
    lines = [
        f"data: {source['name']} ({source['samples']:,} samples); largest of the first {source['looked_at']}: {source['tokens']} "
        f"tokens, {source['images']} images{causes}"
    ]
    for sample in source["shown"]:
        prompt = sample["prompt"] if len(sample["prompt"]) <= LONGEST else f"{sample['prompt'][:LONGEST]}..."
        lines.append(f"  {sample['key']}: {prompt!r} ({sample['tokens']} tokens)")
    return lines


def _describe_memory(figures):
    parts = [f"{name} {_gib(size)}" for name, size in figures["parts"].items() if size]
    return f"memory: {_gib(figures['peak'])} at most: {', '.join(parts)}"


def _describe_time(rehearsal):
    config, figures = rehearsal.config, rehearsal.figures
    seconds, samples = rehearsal.step_seconds, config.steps * rehearsal.samples_a_step
    have = sum(source["samples"] for source in figures["sources"])
    sheet = figures["sheet_seconds"]
    days = figures["processes"] * rehearsal.run_seconds / 86400
    price = (
        ""
        if rehearsal.price is None
        else f", {days * 24 * rehearsal.price:,.2f} at {rehearsal.price:g} an hour"
    )
    kind = "CPU" if figures["device"] == "cpu" else "GPU"
    return [
        f"time: {seconds:.3g} s a step of {rehearsal.samples_a_step:,} samples ({figures['fastest_step']:.3g} to "
        f"{figures['slowest_step']:.3g}), {rehearsal.samples_a_step / seconds:.3g} samples/s; a checkpoint is written in "
        f"{figures['save_seconds']:.3g} s and read in {figures['read_back_seconds']:.3g} s"
        + ("" if sheet is None else f", a sample sheet drawn in {sheet:.3g} s"),
        f"run: {config.steps:,} steps, {samples:,} samples ({samples / have:.3g} times the data), "
        f"{rehearsal.run_seconds / 3600:.3g} hours: {days:.3g} {kind}-days{price}",
    ]


def _describe_disk(rehearsal):
    config, figures = rehearsal.config, rehearsal.figures
    kept = f"{config.keep_checkpoints} are kept" if config.keep_checkpoints else "all are kept"
    text = f"disk: {_gib(figures['checkpoint'])} a checkpoint, of which {kept} and one is being written"
    if figures["decoder"]:
        text += f"; {_gib(figures['decoder'])} of the target"
    if cache_need(rehearsal):
        text += f"; {_gib(cache_need(rehearsal))} of caches"
    return f"{text}: {_gib(disk_need(rehearsal))}"


def _describe_count(rehearsal):
    config, cost = rehearsal.config, rehearsal.cost
    parts = [f"{name} {_gib(size)}" for name, size in cost.parts(config).items() if size]
    of = f" of {rehearsal.for_memory:g} GiB" if rehearsal.for_memory else ""
    lines = [
        f"count for a GPU{of}: {_gib(rehearsal.counted_bytes)} with {SPARE:.0%} left free: {', '.join(parts)}"
    ]
    samples = config.steps * rehearsal.samples_a_step
    times = []
    for gpu, peak in PEAKS.items():
        days = gpu_seconds(samples * rehearsal.operations, peak) / 86400
        price = "" if rehearsal.price is None else f" ({days * 24 * rehearsal.price:,.2f})"
        times.append(f"{days:.2g} days{price} on {gpu}")
    lines.append(
        f"  {rehearsal.operations / 1e12:.3g} TFLOP a sample; if a GPU reaches {UTILISATION:.0%} of "
        f"its peak (not measured): {', '.join(times)}"
    )
    return lines


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= 0.1 * GIB else f"{n_bytes / 2**20:.1f} MiB"
