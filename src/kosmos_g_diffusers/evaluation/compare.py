"""Two runs of the same benchmark, image by image: paired differences with intervals, and their images side by side."""

import json
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..files import check_output_folder, write_text
from .images import check_complete
from .manifest import OWN_PICTURES, Manifest
from .report import (
    LEVEL,
    RESAMPLES,
    bootstrap,
    draw_values,
    load_matplotlib,
    mean_by,
    save_plot,
    table,
    table_metrics,
)
from .scoring import read_scores
from .sheets import LONGEST, file_name, group_by_prompt, group_tasks, image_figures, input_figures, write_page

FILE_NAME = "compare.json"
FACTS = ("model", "options", "settings")  # of a run, shown next to the other's


def compare(folder_a: str | Path, folder_b: str | Path, output: str | Path) -> dict[str, Any]:
    """Write compare.json, compare.md, a plot and sheets; returns the comparison as a dict.

    Differences are B minus A, over the same prompts and input images: first the mean of each unit, then the mean over units,
    whose interval is a bootstrap over the units' differences. The runs may have different numbers of images of each prompt.

    Raises:
        ValueError: a run is unfinished, or the two are not of the same images.
        FileExistsError: `output` holds something that is not a comparison.
        ImportError: matplotlib is not installed.
    """
    output = check_output_folder(output)
    free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not free and not (output / FILE_NAME).is_file():
        raise FileExistsError(f"{output} is there and holds no comparison. Pass another --output.")
    runs = [(Path(folder), *_read(folder)) for folder in (folder_a, folder_b)]
    (_, first, scores_a), (_, second, scores_b) = runs
    _check_comparable(first, second)
    counts = [len(run.tasks) / len(set(map(_prompt_of, run.tasks))) for run in (first, second)]
    metrics = _metrics_of(scores_a), _metrics_of(scores_b)
    common = [name for name in metrics[0] if name in metrics[1]]
    if not common:
        raise ValueError(f"The runs have no metric in common: {'; '.join(map(', '.join, metrics))}.")
    units_a, units_b = (mean_by(run.tasks, scores, lambda task: task.unit) for _, run, scores in runs)
    rows = {}
    for name in common:
        pairs = {unit: (means[name], units_b[unit][name]) for unit, means in units_a.items() if name in means}
        differences = {unit: round(b - a, 6) for unit, (a, b) in pairs.items()}
        values = list(differences.values())
        rows[name] = {
            "a": _mean([a for a, _ in pairs.values()]),
            "b": _mean([b for _, b in pairs.values()]),
            "difference": _mean(values),
            "interval": bootstrap(values),
            "units where b is higher": sum(value > 0 for value in values),
            "units": len(values),
            "by unit": differences if len(first.units) < len(first.tasks) else {},
        }
    facts_a, facts_b = ({name: getattr(run, name) for name in FACTS} for _, run, _ in runs)
    result = {
        "benchmark": first.benchmark,
        "a": facts_a,
        "b": facts_b,
        "images of each prompt": counts,
        "metrics": rows,
        "only in a": [name for name in metrics[0] if name not in common],
        "only in b": [name for name in metrics[1] if name not in common],
    }
    sheets = _write_sheets(output, runs)
    plots = [path for name in table_metrics(rows) if (path := _plot(output, name, rows[name]))]
    write_text(output / FILE_NAME, json.dumps(result, indent=1) + "\n")
    write_text(output / "compare.md", as_markdown(result, plots, sheets))
    return result


def as_markdown(result: dict[str, Any], plots: Sequence[Path | str] = (), sheets: Sequence[str] = ()) -> str:
    facts = []
    for part in FACTS:
        for name in {**result["a"][part], **result["b"][part]}:
            a, b = result["a"][part].get(name), result["b"][part].get(name)
            facts.append([name, str(a), str(b)] if a != b else [name, str(a), "the same"])
    how = f"Intervals ({LEVEL:.0%}): bootstrap of the mean difference over units, {RESAMPLES:,} resamples."
    lines = [f"# {result['benchmark']}: B against A", comparison_table(result), how]
    counts = result["images of each prompt"]
    if counts[0] != counts[1]:
        lines.append("Of each prompt, A has {:g} images and B {:g}: means are of all.".format(*counts))
    for side in ("a", "b"):
        if result[f"only in {side}"]:
            lines.append(f"Only {side.upper()} has {', '.join(result[f'only in {side}'])}.")
    lines += ["## What was run", table(["", "A", "B"], facts)]
    lines += ["## Plots", *(f"![{Path(path).stem}]({path})" for path in plots)] if plots else []
    lines += ["## Images", " · ".join(f"[{Path(path).stem}]({path})" for path in sheets)] if sheets else []
    return "\n\n".join(lines) + "\n"


def comparison_table(result: dict[str, Any]) -> str:
    rows = []
    for name in table_metrics(result["metrics"]):
        entry = result["metrics"][name]
        difference = f"{entry['difference']:+.3f}"
        if entry["interval"]:
            difference += " ({:+.3f} to {:+.3f})".format(*entry["interval"])
        wins = f"{entry['units where b is higher']} of {entry['units']}"
        rows.append([name, f"{entry['a']:.3f}", f"{entry['b']:.3f}", difference, wins])
    return table(["", "A", "B", "B - A", "units where B is higher"], rows)


def _mean(values):
    return round(sum(values) / len(values), 6)


def _metrics_of(scores):
    return list(dict.fromkeys(name for one in scores.values() for name in one))


def _read(folder):
    """(manifest, scores) of a finished run."""
    manifest = Manifest.read(folder)
    check_complete(folder, manifest)
    scores, _ = read_scores(folder, manifest)
    if not any(scores.values()):
        raise ValueError(f"{str(folder)!r} has no complete scores. Repeat its command: it continues the run.")
    return manifest, scores


def _check_comparable(first, second):
    if first.benchmark != second.benchmark:
        raise ValueError(f"The runs are of two benchmarks, {first.benchmark!r} and {second.benchmark!r}.")
    compared = attrgetter("prompt", "text", "pictures", "references", "truth")
    tasks_a, tasks_b = ({task.id: compared(task) for task in run.tasks} for run in (first, second))
    different = [name for name in tasks_a | tasks_b if tasks_a.get(name) != tasks_b.get(name)]
    in_both = [name for name in different if name in tasks_a and name in tasks_b]
    if different and (in_both or not _are_of_same_prompts(first, second)):
        raise ValueError(
            f"{len(different)} images of the runs have other prompts, input images or references, such as {different[0]}. Only runs "
            "of the same options can be compared."
        )
    changed = [path for path, digest in first.pictures.items() if second.pictures.get(path) != digest]
    if changed:
        raise ValueError(f"{len(changed)} input images differ between the runs: {', '.join(changed)}.")


def _prompt_of(task):
    return task.unit, task.prompt, task.text, task.pictures, task.references


def _are_of_same_prompts(first, second):
    """Whether two runs differ in the number of images of each prompt alone: then their means over a unit weigh prompts alike."""
    counts = [Counter(map(_prompt_of, run.tasks)) for run in (first, second)]
    return counts[0].keys() == counts[1].keys() and all(len(set(count.values())) == 1 for count in counts)


def _write_sheets(output, runs):
    folder_a, first, _ = runs[0]
    data = folder_a / OWN_PICTURES if first.data == OWN_PICTURES else Path(first.data)
    of_prompt = [{}, {}]
    for groups, (_, run, _) in zip(of_prompt, runs, strict=True):
        for task in run.tasks:
            groups.setdefault(_prompt_of(task), []).append(task)
    paths = []
    for name, tasks in group_tasks(first).items():
        notes = [f"{title}: {folder}" for title, (folder, *_) in zip("AB", runs, strict=True)]
        if len(tasks) > LONGEST:
            notes.append(f"The first {LONGEST} of {len(tasks)} images.")
        parts, shown = [], None
        for group in group_by_prompt(tasks[:LONGEST]):
            inputs = group[0].pictures
            if inputs != shown and all((data / path).is_file() for path in inputs):
                # once for prompts that follow each other
                parts.append({"inputs": input_figures(data, inputs)})
            shown = inputs
            prompts = dict.fromkeys(map(_prompt_of, group))
            figures = [
                image_figures(
                    output / "sheets", folder, [task for key in prompts for task in groups[key]], scores
                )
                for (folder, _, scores), groups in zip(runs, of_prompt, strict=True)
            ]
            rows = list(zip("AB", figures, strict=True))
            parts.append({"prompt": group[0].prompt, "rows": rows})
        paths.append(f"sheets/{file_name(name)}.html")
        write_page(output / paths[-1], title=name, notes=notes, parts=parts)
    return paths


def _plot(output, metric, row):
    """The difference of each unit; path from `output`."""
    if len(row["by unit"]) < 2:
        return None
    plot = load_matplotlib()(figsize=(7, 1.2 + 0.2 * len(row["by unit"])), layout="constrained")
    axis = plot.subplots()
    axis.axvline(0, color="black", linewidth=0.8)
    draw_values(axis, row["by unit"], row["interval"])
    axis.axvline(row["difference"], label=f"mean {row['difference']:+.3f}")
    axis.set(title="B - A", xlabel=metric)
    axis.legend(fontsize="small")
    return save_plot(plot, output, metric)
