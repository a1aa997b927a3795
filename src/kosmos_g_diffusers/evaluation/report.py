"""A finished run as report.json, report.md, plots and sheets. The same run gives the same files, byte for byte."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text, written_atomically
from .images import INSTALL, repeated_inputs
from .manifest import Manifest, Task
from .sheets import CONTROL, file_name, write_sheets

Scores = Mapping[str, Mapping[str, float]]  # id of a task -> metric -> score

RESAMPLES = 10_000  # of the bootstrap
LEVEL = 0.95
REFERENCES = "by number of references"
LEFT_OUT_OF_TABLES = ("_subject_", CONTROL)  # one subject of several: in report.json and the sheets


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Interval of a mean over units, which are resampled: (low, high), or None for fewer than two.

    Args:
        values: one for each unit.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    # some at a time: thirty thousand images would need gigabytes
    draws = (rng.integers(0, len(values), (100, len(values))) for _ in range(RESAMPLES // 100))
    means = np.concatenate([values[draw].mean(1) for draw in draws])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return round(float(low), 6), round(float(high), 6)


def mean_by(tasks: Iterable[Task], scores: Scores, key: Callable[[Task], Any]) -> dict[Any, dict[str, float]]:
    """key(task) -> metric -> mean over its images."""
    groups = {}
    for task in tasks:
        for metric, value in scores[task.id].items():
            groups.setdefault(key(task), {}).setdefault(metric, []).append(value)
    return {
        name: {metric: round(float(np.mean(values)), 6) for metric, values in metrics.items()}
        for name, metrics in groups.items()
    }


def summarise(
    manifest: Manifest,
    scores: Scores,
    scorers: Sequence[dict[str, Any]],
    n_words: int,
    distance: float | None = None,
) -> dict[str, Any]:
    """The report as a dict.

    Args:
        scores: task id -> metric -> score, of all images.
        scorers: identities of what made them.
        n_words: input images that are stored as image words.
        distance: what `manifest.distance` has measured. It belongs to no single image, and stands first.
    """
    by_unit = mean_by(manifest.tasks, scores, lambda task: task.unit)
    metrics, counts = {}, {}
    if distance is not None:
        entry = {"mean": round(distance, 6), "interval": None, "units": len(manifest.tasks)}
        metrics, counts = {manifest.distance.name: entry}, manifest.distance.counts
        scorers = [manifest.distance.identity, *scorers]
    metrics |= _over_units(by_unit)
    inputs = [path for task in manifest.tasks for path in task.pictures]
    repeated = set(repeated_inputs(manifest))
    encoded = n_words + sum(path not in repeated for path in inputs)
    single_units = len(by_unit) == len(manifest.tasks)
    copied = ("benchmark", "options", "model", "settings", "conditions")
    return {
        **{name: getattr(manifest, name) for name in copied},
        "scorers": scorers,
        "counts": {
            "units": len(manifest.units),
            "prompts": len({(task.prompt, task.pictures) for task in manifest.tasks}),
            "images": len(manifest.tasks),
            "pictures": len(set(inputs)),
            **({} if manifest.generated else {"pictures encoded": encoded}),
            **counts,
        },
        "metrics": metrics,
        "published": manifest.published,
        "by unit": {} if single_units else by_unit,
        "by prompt": mean_by(manifest.tasks, scores, lambda task: task.row),
        **({REFERENCES: _by_references(manifest.tasks, scores)} if manifest.by_references else {}),
    }


def _over_units(by_unit):
    """Metric -> its mean over units, with an interval."""
    metrics = {}
    for name in dict.fromkeys(name for unit in by_unit.values() for name in unit):
        values = [unit[name] for unit in by_unit.values() if name in unit]
        mean = round(float(np.mean(values)), 6)
        metrics[name] = {"mean": mean, "interval": bootstrap(values), "units": len(values)}
    return metrics


def _by_references(tasks, scores):
    """Number of input images, as text -> how many prompts and images have it, and their metrics over units."""
    groups = {}
    for task in sorted(tasks, key=lambda task: len(task.pictures)):
        groups.setdefault(str(len(task.pictures)), []).append(task)
    return {
        number: {
            "prompts": len({(task.prompt, task.pictures) for task in group}),
            "images": len(group),
            "metrics": _over_units(mean_by(group, scores, lambda task: task.unit)),
        }
        for number, group in groups.items()
    }


def write_report(
    folder: str | Path,
    manifest: Manifest,
    scores: Scores,
    scorers: Sequence[dict[str, Any]],
    distance: float | None = None,
) -> dict[str, Any]:
    """Write report.json, report.md, plots/ and sheets/; returns the report, which is that of `summarise`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    n_words = len(list((folder / "words").glob("*.safetensors")))
    report = summarise(manifest, scores, scorers, n_words, distance)
    sheets = write_sheets(folder, manifest, scores)
    plots = [path for name in table_metrics(report["metrics"]) if (path := _plot(folder, report, name))]
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    notes = (*(manifest.generated.notes if manifest.generated else ()), *manifest.notes)
    write_text(folder / "report.md", as_markdown(report, plots, sheets, notes))
    return report


def table_metrics(metrics: Iterable[str]) -> list[str]:
    return [name for name in metrics if not any(part in name for part in LEFT_OUT_OF_TABLES)]


def format_score(entry: Mapping[str, Any]) -> str:
    """0.694 (0.670 to 0.715)."""
    interval = entry["interval"]
    return f"{entry['mean']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, *rows]
    lines = [f"| {' | '.join(map(_as_cell, line))} |" for line in lines]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def _as_cell(text):
    """A prompt's `<i>` as code: Markdown would take it for italics. A bar would end the cell."""
    text = text.replace("|", "\\|")
    return f"`{text}`" if "<" in text else text


def scores_table(report: dict[str, Any]) -> str:
    """Every metric with its interval, next to its control and the published numbers."""
    metrics, published = report["metrics"], report["published"]
    controls = {name.replace(CONTROL, "."): metrics[name] for name in metrics if CONTROL in name}
    rows = []
    for metric in table_metrics(metrics):
        row = [metric, format_score(metrics[metric])]
        if controls:
            row.append(format_score(controls[metric]) if metric in controls else "")
        row += [f"{scores[metric]:.3f}" if metric in scores else "" for scores in published.values()]
        rows.append(row)
    control = ["control: input images shuffled"] if controls else []
    return table(["", f"this run ({LEVEL:.0%} interval)", *control, *published], rows)


def as_markdown(
    report: dict[str, Any], plots: Sequence[str], sheets: Sequence[str], notes: Sequence[str]
) -> str:
    options = [f"{name} {value}" for name, value in report["options"].items()]
    versions = report["conditions"]["versions"]
    facts = {
        "benchmark": " ".join([report["benchmark"], *options]),
        "model": _as_words(report["model"]),
        **{name: "the model's own" if given is None else given for name, given in report["settings"].items()},
        **report["conditions"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "scorers": "; ".join(map(_as_words, report["scorers"])),
        "counted": ", ".join(f"{count} {name}" for name, count in report["counts"].items()),
    }
    parts = [
        f"# {report['benchmark']}",
        scores_table(report),
        f"Intervals: bootstrap of the mean over {report['counts']['units']} units, {RESAMPLES:,} resamples.",
        *notes,
        "## What was run",
        table(["", ""], [[name, str(value)] for name, value in facts.items()]),
    ]
    metrics = table_metrics(report["metrics"])
    if REFERENCES in report:
        head = ["input images", "prompts", *metrics]
        rows = [
            [number, str(group["prompts"])]
            + [format_score(group["metrics"][name]) if name in group["metrics"] else "" for name in metrics]
            for number, group in report[REFERENCES].items()
        ]
        parts += [f"## {REFERENCES.capitalize()}", table(head, rows)]
    for title, groups in (("By unit", report["by unit"]), ("By prompt", report["by prompt"])):
        # "kind.metric" is of the rows of one kind
        for kind in dict.fromkeys(metric.rpartition(".")[0] for metric in metrics):
            used = [metric for metric in metrics if metric.rpartition(".")[0] == kind]
            rows = [
                [name, *(f"{group[metric]:.3f}" if metric in group else "" for metric in used)]
                for name, group in groups.items()
                if any(metric in group for metric in used)
            ]
            if len(rows) > 1:
                parts += [f"## {title}" + f": {kind}" * bool(kind), table(["", *used], rows)]
    parts += ["## Plots", *(f"![{Path(path).stem}]({path})" for path in plots)] if plots else []
    parts += ["## Images", " · ".join(f"[{Path(path).stem}]({path})" for path in sheets)]
    return "\n\n".join(parts) + "\n"


def _as_words(identity):
    return " ".join(str(value) for value in identity.values() if value is not None)


def _plot(folder, report, metric):
    """A dot for each unit and prompt, the mean with its interval, the published numbers; path from `folder`."""
    groups = {
        title: {name: group[metric] for name, group in report[title].items() if metric in group}
        for title in ("by unit", "by prompt")
    }
    groups = {title: values for title, values in groups.items() if len(values) > 1}
    if not groups:
        return None
    size = (6.5 * len(groups), 1.2 + 0.2 * max(map(len, groups.values())))
    figure = load_matplotlib()(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, (title, values) in zip(axes, groups.items(), strict=True):
        entry = report["metrics"][metric]
        draw_values(axis, values, entry["interval"])
        axis.axvline(entry["mean"], label=f"mean {entry['mean']:.3f}")
        for (name, scores), style in zip(report["published"].items(), ("--", ":", "-."), strict=False):
            if metric in scores:
                label = f"{name} {scores[metric]:.3f}"
                axis.axvline(scores[metric], linestyle=style, color="black", label=label)
        axis.set(title=title, xlabel=metric)
        axis.legend(fontsize="small")
    return save_plot(figure, folder, metric)


def draw_values(axis: Any, values: Mapping[str, float], interval: tuple[float, float] | None) -> None:
    """A dot for each name of `values`, sorted by value, over the interval of their mean (None if there is none)."""
    if interval:
        axis.axvspan(*interval, alpha=0.2, label=f"{LEVEL:.0%} interval of the mean")
    order = sorted(values, key=values.get)
    # matplotlib reads what is between two dollars as mathematics
    axis.plot([values[name] for name in order], [name.replace("$", r"\$") for name in order], "o")
    axis.margins(y=0.5 / len(order))


def load_matplotlib() -> Any:
    """matplotlib's `Figure`, which needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Plots need the package matplotlib: {INSTALL}") from error
    return Figure


def save_plot(figure: Any, folder: str | Path, metric: str) -> str:
    """Write a PNG without the date and version that would make every file another; its path from `folder`."""
    path = f"plots/{file_name(metric)}.png"
    with written_atomically(folder / path) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return path
