"""How many samples stage 3 needs: the sprite score after it, of eight runs that begin where the road ends alignment.

    python -m examples.road.road --output runs/road --share 8
    python -m examples.road.curve --road runs/road --output runs/curve

Full tuning of the aligned model with four numbers of samples, and with the largest two adapters on it and full tuning without
alignment. Every run decays its learning rate over its own steps, as one of that budget would. A run that is done is skipped and one
that was stopped continues, so the same command resumes; --only shares the runs among processes. The table has what is done.
"""

import argparse
import json
from pathlib import Path

from kosmos_g_diffusers import cli
from kosmos_g_diffusers.files import write_text
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.training import TrainConfig, run_stage
from kosmos_g_diffusers.training.checkpoints import list_checkpoints
from kosmos_g_diffusers.training.model_folder import merge_into_folder

SAMPLES = (15_000, 30_000, 60_000, 120_000)
KINDS = {
    "full": {"lr": 5e-4},
    "adapters": {"lr": 1e-3, "lora_rank": 16},
    "unaligned": {"lr": 5e-4},
}
RUNS = {
    f"{kind}-{samples}": (kind, samples)
    for kind in KINDS
    for samples in (SAMPLES if kind == "full" else SAMPLES[-2:])
}
COMMON = {
    "batch_size": 48,
    "mixed_precision": "bf16",
    "max_grad_norm": 1.0,
    "max_text_tokens": 200,
    "data_weights": [3.0, 3.0, 1.0],  # of the sources below
    "workers": 1,
    "save_every": 100,
    "keep_checkpoints": 1,
}
# what the sprite bench asks that counts: a sprite on a new background, two, words alone, another colour
METRICS = ("background.all", "pair.both", "text.all", "edit.new colour and old shape")
COUNT = 100  # prompts of each


def build_sources():
    captions = SpriteSource("captions", max(SAMPLES))
    return [SpriteSource("compositions", max(SAMPLES), 0.9), SpriteSource("edits", max(SAMPLES)), captions]


def train_run(name, road, output, **changes):
    """Make a run of RUNS, or continue it; returns a folder that draws."""
    kind, samples = RUNS[name]
    model = road / "fresh" if kind == "unaligned" else list_checkpoints(road / "align")[-1]
    values = {**COMMON, **KINDS[kind], **changes}
    steps = max(1, samples // values["batch_size"]) if "steps" not in values else values["steps"]
    values |= {"steps": steps, "warmup_steps": min(200, steps // 5), "model": str(model)}
    config = TrainConfig.from_dict({**values, "output": str(output / name)}, "instruct")
    checkpoint = run_stage("instruct", config, build_sources(), progress_bar=False)
    merged = output / f"{name}-merged"
    if kind != "adapters":
        return checkpoint
    return merged if merged.is_dir() else merge_into_folder(model, checkpoint, merged)


def score_run(folder, report, count):
    """Draw the sprite bench with a folder; the numbers of METRICS."""
    kinds = [flag for metric in METRICS for flag in ("--kind", metric.partition(".")[0])]
    flags = ["--model", str(folder), "--output", str(report), "--count", str(count), *kinds]
    if cli.main(["evaluate", "sprites", *flags]):
        raise SystemExit(f"The score of {folder} failed; the same command resumes.")
    metrics = json.loads((report / "report.json").read_text(encoding="utf-8"))["metrics"]
    return {metric: metrics[metric]["mean"] for metric in METRICS}


def print_table(scores):
    print(f"| run | samples | {' | '.join(METRICS)} | mean |\n|{'---|' * (len(METRICS) + 3)}")
    for name, found in scores.items():
        kind, samples = RUNS[name]
        mean = sum(found.values()) / len(found)
        print(
            f"| {kind} | {samples:,} | {' | '.join(f'{found[metric]:.0%}' for metric in METRICS)} | {mean:.0%} |"
        )


def main(given=None):
    parser = argparse.ArgumentParser(description="The sprite score by samples of stage 3.")
    parser.add_argument("--road", type=Path, required=True, help="output of examples.road.road")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    parser.add_argument(
        "--tiny", action="store_true", help="two steps and two prompts of each kind, to see that all runs"
    )
    arguments = parser.parse_args(given)
    tiny = {"steps": 2, "batch_size": 2, "workers": 0} if arguments.tiny else {}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        scores = arguments.output / f"{name}.json"
        if not scores.is_file():
            folder = train_run(name, arguments.road, arguments.output, **tiny)
            found = score_run(folder, arguments.output / f"{name}-score", 2 if arguments.tiny else COUNT)
            write_text(scores, json.dumps(found))
    paths = {name: arguments.output / f"{name}.json" for name in RUNS}
    print_table({name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.is_file()})


if __name__ == "__main__":
    main()
