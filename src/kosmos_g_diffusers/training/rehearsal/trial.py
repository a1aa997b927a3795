"""A few steps of a run at its real sizes, in a temporary folder, with a clock and a look at the memory.

Its own process makes them (`python -m kosmos_g_diffusers.training.rehearsal.trial SETTINGS RESULT`): so the peak is that of
this run alone, and where memory runs out nothing else ends.
"""

import gc
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...data import BadSample, Source
from ...data.mixture import MixtureDataset, stream_seed
from ...environment import default_device
from ..checkpoints import list_checkpoints, trained_parameters
from ..config import TrainConfig
from ..loop import train
from ..optimizers import MOMENT_BYTES
from ..run import Run, build_run, check_warmup, process_state

TIMED = 6  # steps whose median is the time of a step
LOOKED_AT = 64  # samples of each source, among which the one that needs most memory is looked for
SHOWN = 3


def run_trial(
    name: str, config: TrainConfig, sources: Sequence[Source] | None = None, timed: int = TIMED
) -> dict[str, Any]:
    """Make a few steps; arguments and errors as `build_run`. Nothing is written into `config.output`.

    Returns:
        dict of figures, in seconds and bytes: see the keys below.
    """
    baseline = peak_memory()
    with _shared_folder(_place_for(config.output)) as folder:
        largest_steps = (len(config.data) if sources is None else len(sources)) + len(config.words)
        # the first step and those of the largest batches are not timed; the last has no next one that ends it
        steps = 1 + largest_steps + timed + 1
        quick = config.replace(
            steps=steps,
            save_every=steps,
            sample_every=steps if config.sample_every else 0,
            output=str(folder / "run"),
            cache=str(folder / "cache") if config.cache else "",
            keep_checkpoints=1,
            log_every=1,
            tracker="",
            lr_schedule="constant",
            warmup_steps=1,
            data_moved=False,
            take_over=False,
        )
        run = build_run(name, quick, sources)
        looked_at = [look_at(run.dataset, number) for number in range(len(run.dataset.sources))]
        rehearsed = RehearsedDataset(run.dataset, [each["batch"] for each in looked_at], quick.accumulation)
        run.dataset = rehearsed
        starts, stepped = [], []
        run.stage.register_forward_pre_hook(
            lambda *_: starts.append((time.perf_counter(), time.process_time()))
        )
        hook = register_optimizer_step_post_hook(lambda *_: stepped.append(time.perf_counter()))
        draw, run.draw_samples = run.draw_samples, None
        checkpoint = run.train(progress_bar=False)
        end, peak = time.perf_counter(), peak_memory()
        hook.remove()
        begun = starts[:: quick.accumulation]
        seconds, cpu_seconds = (
            [after[clock] - before[clock] for before, after in pairwise(begun)][-timed:] for clock in (0, 1)
        )
        result = {
            "device": str(run.state.device),
            "processes": run.state.num_processes,
            "steps": steps,
            "step_seconds": statistics.median(seconds),
            "step_cpu_seconds": statistics.median(cpu_seconds),  # of this process, without its workers
            "fastest_step": min(seconds),
            "slowest_step": max(seconds),
            "read_seconds": statistics.median(each["read_seconds"] for each in looked_at) * config.batch_size,
            "peak": peak,
            "parts": _parts(run, config, baseline, peak),
            "checkpoint": _own_bytes(checkpoint),
            "save_seconds": end - stepped[-1],
            "decoder": _own_bytes(Path(quick.output) / "decoder"),
            "batch": max(_batch_bytes(each["batch"]) for each in looked_at),
            "sources": [{key: each[key] for key in each if key != "batch"} for each in looked_at],
            "notes": [*check_warmup(config), *run.notes],
        }
        if config.cache:
            entries = sum(len(store) for store in run.cache.stores.values()) if run.cache else 0
            result["cache_entries"] = entries
            result["cache_bytes"] = _own_bytes(folder / "cache")
        result["sheet_seconds"] = _draw(draw, run, folder) if draw is not None else None
        result["read_back_seconds"] = _read_back(run)
        result["left"] = [path.name for path in list_checkpoints(quick.output)]
    return result


def look_at(dataset: MixtureDataset, number: int) -> dict[str, Any]:
    """Read the first samples of a source as the run will, and make the batch that needs most memory of them.

    Returns:
        dict of `name`, `samples`; `shown`, a few of them as text; `left_out`, cause -> number; `tokens` and `images` of the
        largest sample; `read_seconds` of one; `batch`, of copies of the largest.
    """
    source, collate, order = dataset.sources[number], dataset.collates[number], dataset.orders[number]
    rows, shown, left_out, texts = [], [], Counter(), []
    begun = time.perf_counter()
    for position in range(min(LOOKED_AT, len(source))):
        rng = random.Random(stream_seed(dataset.seed, "sample", number, position, 0))
        generator = torch.Generator().manual_seed(stream_seed(dataset.seed, "training", number, position))
        try:
            sample = source.read(order[position], rng)
            rows.append(collate.prepare(sample, generator))
        except BadSample as problem:
            left_out[problem.cause] += 1
            continue
        texts.append(len(rows[-1]["ids"]))
        if len(shown) < SHOWN:
            words = "".join(part if isinstance(part, str) else "<i>" for part in sample.prompt)
            shown.append({"key": sample.key, "prompt": words, "tokens": texts[-1]})
    seconds = (time.perf_counter() - begun) / max(1, len(rows) + left_out.total())
    if not rows:
        causes = ", ".join(f"{count} {cause}" for cause, count in left_out.items())
        raise ValueError(
            f"None of the first {left_out.total()} samples of {source.name} can be used: {causes}. See docs/data.md."
        )
    largest = max(rows, key=lambda row: (len(row["ids"]), len(row["pixels"])))
    batch = collate([largest] * dataset.batch_size)
    if "drop_condition" in batch:
        batch["drop_condition"] = torch.zeros_like(
            batch["drop_condition"]
        )  # without their prompts they need less
    batch |= {"source": source.name, "keys": ["the largest sample"] * dataset.batch_size}
    batch |= {"skipped": {}, "skipped_messages": []}
    return {
        "name": source.name,
        "samples": len(source),
        "shown": shown,
        "left_out": dict(left_out),
        "looked_at": len(rows) + left_out.total(),
        "tokens": len(largest["ids"]),
        "images": len(largest["pixels"]),
        "mean_tokens": statistics.fmean(texts),
        "mean_images": statistics.fmean(len(row["pixels"]) for row in rows),
        "read_seconds": seconds,
        "batch": batch,
    }


class RehearsedDataset(torch.utils.data.Dataset):
    """A mixture in whose second and following steps there are other batches.

    Args:
        dataset: MixtureDataset.
        largest: batches, one for each step.
        accumulation: passes of a step.
    """

    largest_steps: int

    def __init__(self, dataset: MixtureDataset, largest: Sequence[dict[str, Any]], accumulation: int):
        self.dataset, self.largest, self.accumulation = dataset, largest, accumulation
        self.largest_steps, self.sources = len(largest), dataset.sources

    def describe_sources(self) -> list[dict[str, Any]]:
        return self.dataset.describe_sources()

    def __getitem__(self, number: int) -> dict[str, Any]:
        step, first = divmod(number, self.accumulation)
        if 1 <= step <= self.largest_steps and first == 0:
            return dict(self.largest[step - 1])
        return self.dataset[number]


def peak_memory() -> int:
    """Bytes: the most that this process has had of the accelerator, or of main memory where there is none."""
    if default_device() == "cuda":
        return torch.cuda.max_memory_reserved()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _parts(run: Run, config, baseline, peak) -> dict[str, float]:
    """Bytes of the peak, by what they are; activations are what is left."""
    stage = run.stage
    trained = sum(parameter.numel() for parameter in trained_parameters(stage))
    models = (stage, *stage.frozen_models)
    parts = {
        "program": baseline if default_device() == "cpu" else 0,
        "weights": sum(parameter.nbytes for model in models for parameter in model.parameters()),
        "gradients": 4 * trained,
        "moments": MOMENT_BYTES[config.optimizer] * trained,
        "average": 4 * trained if config.ema_decay else 0,
    }
    return parts | {"activations and the rest": max(0, peak - sum(parts.values()))}


def _draw(draw, run, folder):
    """Seconds of a sample sheet."""
    start = time.perf_counter()
    run.stage.eval()
    draw(run.stage, folder / "sheet.png")
    run.stage.train()
    return time.perf_counter() - start


def _read_back(run):
    """Seconds to resume from the checkpoint that was written; the weights must come back."""
    parameter = trained_parameters(run.stage)[0]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1)
    gc.collect()
    start = time.perf_counter()
    save = run.stage.save_pretrained
    train(run.config, run.stage, run.dataset, save_model=save, progress_bar=False)
    assert torch.equal(parameter.detach(), before), "the checkpoint gives other weights than were saved"
    return time.perf_counter() - start


@contextmanager
def _shared_folder(place):
    """A temporary folder that all processes of a run know, removed when all are done with it."""
    state = process_state()
    path = [tempfile.mkdtemp(prefix=".rehearsal-", dir=place) if state.is_main_process else None]
    broadcast_object_list(path)
    try:
        yield Path(path[0])
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(path[0], ignore_errors=True)


def _place_for(output):
    """The folder that a run's folder lies in, so that the same disk is tried; the system's temporary one if it is not there."""
    place = Path(output).absolute().parent if output else None
    return place if place is not None and place.is_dir() and os.access(place, os.W_OK) else None


def _own_bytes(folder):
    """Bytes of the files below a folder that no other folder shares."""
    stats = (path.stat() for path in Path(folder).rglob("*") if path.is_file())
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def _batch_bytes(batch):
    return sum(value.nbytes for value in batch.values() if torch.is_tensor(value))


def free_bytes(path: str | Path) -> int:
    """Of the disk on which a path is or will be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def machine_memory() -> int:
    """Bytes of main memory that this process may have: the machine's, or its container's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def main(settings: str, result: str) -> int:
    """Make the trial of a JSON file of settings; the figures, or an `error`, become another."""
    try:
        config = TrainConfig.load(settings)
        figures: Mapping[str, Any] = run_trial(config.stage, config)
    except (torch.OutOfMemoryError, MemoryError) as error:
        figures = {"error": str(error).partition("\n")[0], "memory": True}
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        figures = {
            "error": str(error),
            "memory": "can't allocate memory" in str(error),
        }  # as torch says it of a CPU
    Path(result).write_text(json.dumps({"settings": asdict(config), **figures}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
