"""Run what the documents quote of the small model, and write it into them: `make figures`.

    python docs/figures.py --list        what is run, and which documents quote it
    python docs/figures.py               all of it, an hour or two on one core
    python docs/figures.py captions      one of them

A figure stands in a document between <!-- figure RUN.NAME FORMAT --> and <!-- /figure -->; the format is Python's for a number
(".2f", ".0%"), and without one a share comes with its interval. What was run is kept under --output: a run that is complete
there is read again.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(
    r"(<!-- figure (?P<run>[\w-]+)\.(?P<name>\S+?)(?: (?P<format>[^>]+?))? -->)(?P<text>.*?)(<!-- /figure -->)",
    re.S,
)
DOCUMENTS = ("README.md", "docs/**/*.md", "src/kosmos_g_diffusers/sprites/model/README.md")
DONE = "figures-done"


@dataclass(frozen=True)
class Run:
    """A command that measures, and what is read from its folder: names -> a number, a (mean, interval) or a text."""

    command: str
    read: Callable[[Path], dict[str, Any]]
    images: dict[str, str] = field(default_factory=dict)  # document's image -> file of the folder


def read_evaluation(folder):
    """Every metric of an `evaluate` run, "table" and "run", the two tables of its report, and the rows of its kinds."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found = {
        name.replace(" ", "-"): (entry["mean"], entry["interval"])
        for name, entry in report["metrics"].items()
    }
    tables = read_tables(folder)
    found |= {"table": tables[0], "run": tables[1]}
    rows = report["by prompt"]
    for name, scores in rows.items():
        found |= {
            f"{name.replace(' ', '-')}.{metric.rpartition('.')[2].replace(' ', '-')}": value
            for metric, value in scores.items()
        }
    for kind in ("own-drawings", "typed-words"):
        found[f"{kind}.rows"] = table_of_kind(kind, rows, report["metrics"])
    return found


def table_of_kind(kind, rows, metrics):
    """A row for each sort of a kind, with what it is, and all of them together."""
    from kosmos_g_diffusers.sprites import drawings, typed_words

    sorts = {"own-drawings": drawings.KINDS, "typed-words": typed_words.KINDS}[kind]
    names = {
        "own-drawings": ("shape", "colour", "shape and colour"),
        "typed-words": ("shape", "colour", "background", "all named"),
    }[kind]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for sort, text in sorts.items():
        scores = rows.get(f"{kind}: {sort}")
        if scores is None:
            return ""
        what = f"{sort}: {text}" if kind == "own-drawings" else f"{sort}: `{text}`"
        cells = (f"{scores[f'{kind}.{name}']:.2f}" if f"{kind}.{name}" in scores else "" for name in names)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    cells = (
        say((entry["mean"], entry["interval"]), ".2f interval")
        for entry in (metrics[f"{kind}.{name}"] for name in names)
    )
    return "\n".join([*lines, f"| **all** | {' | '.join(cells)} |"])


def read_tables(folder):
    """The tables of a report.md, in their order."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    return [block.strip() for block in text.split("\n\n") if block.strip().startswith("|")]


def read_cells(folder):
    """The table of a script's report, and each cell as "row.column"."""
    (text,) = read_tables(folder)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    cells = {
        f"{row[0]}.{column}".replace(" ", "-"): float(value)
        for row in rows
        for column, value in zip(head[1:], row[1:], strict=True)
        if value
    }
    return {"table": text, **cells}


PYTHON = shlex.quote(sys.executable)
EVALUATE = f"{PYTHON} -m kosmos_g_diffusers evaluate sprites"
SEVERAL = "--kind background --kind pair --kind three --kind four"
RUNS = {
    "bench": Run(f"{EVALUATE} --output {{out}}", read_evaluation),
    "others": Run(f"{EVALUATE} --kind own-drawings --kind typed-words --output {{out}}", read_evaluation),
    "drawings": Run(f"{EVALUATE} --kind own-drawings --count 600 --output {{out}}", read_evaluation),
    "maps": Run(f"{EVALUATE} {SEVERAL} --maps --output {{out}}", read_evaluation),
    "bound": Run(f"{EVALUATE} {SEVERAL} --binding 1 --output {{out}}", read_evaluation),
    "placed": Run(f"{EVALUATE} --kind placed --output {{out}}", read_evaluation),
    "limits": Run(f"{PYTHON} examples/sprites/read_limits.py --output {{out}}", read_cells),
    "captions": Run(f"{PYTHON} examples/sprites/read_captions.py --output {{out}}", read_cells),
    "controlnet": Run(
        f"{PYTHON} examples/sprites/read_controlnet.py --output {{out}}",
        read_cells,
        {"docs/sprites/controlnet.png": "sheet.png"},
    ),
    "demo": Run(
        f"{PYTHON} examples/demo.py --output {{out}}",
        lambda folder: {},
        {"docs/sprites/demo.png": "demo.png"},
    ),
    "show": Run(
        f"{PYTHON} examples/sprites/show_run.py {{others}} --kind own-drawings --output {{out}}/own-drawings.png",
        lambda folder: {},
        {"docs/sprites/own-drawings.png": "own-drawings.png"},
    ),
}


def say(value, spec):
    """A figure as it stands in a document."""
    if isinstance(value, str):
        return f"\n\n{value}\n\n"
    mean, interval = value if isinstance(value, tuple) else (value, None)
    spec, _, with_interval = (spec or ".3f interval").partition(" ")
    if with_interval and interval:
        return f"{mean:{spec}} ({interval[0]:{spec}} to {interval[1]:{spec}})"
    return f"{mean:{spec}}"


def documents():
    return sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)})


def quoted():
    """Run -> documents and images that hold something of it."""
    found = {name: list(run.images) for name, run in RUNS.items()}
    for path in documents():
        for mark in MARK.finditer(path.read_text(encoding="utf-8")):
            place = path.relative_to(ROOT).as_posix()
            if place not in found[mark["run"]]:
                found[mark["run"]].append(place)
    return found


def measure(name, output):
    """Run a command unless it was; returns what its folder says."""
    run, folder = RUNS[name], output / name
    if not (folder / DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        places = {"out": shlex.quote(str(folder)), "others": shlex.quote(str(output / "others"))}
        subprocess.run(shlex.split(run.command.format(**places)), cwd=ROOT, check=True)
        (folder / DONE).touch()
    return run.read(folder)


def write(name, figures, output):
    """Put the figures of a run into the documents; returns those that changed."""
    changed = []

    def fill(mark):
        if mark["run"] != name:
            return mark[0]
        if mark["name"] not in figures:
            sys.exit(f"{name} has no figure {mark['name']!r}. It has {', '.join(figures)}.")
        return mark[1] + say(figures[mark["name"]], mark["format"]) + mark[6]

    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = MARK.sub(fill, before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    for image, file in RUNS[name].images.items():
        shutil.copyfile(output / name / file, ROOT / image)
        changed.append(ROOT / image)
    return changed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{', '.join(RUNS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--output", type=Path, default=Path("out/figures"), help="(default: out/figures)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.runs if name not in RUNS]:
        parser.error(f"{unknown[0]!r} is not a run. Expected {', '.join(RUNS)}.")
    for name in arguments.runs or RUNS:
        command = RUNS[name].command.replace(PYTHON, "python")
        print(f"{name}: {command.format(out=arguments.output / name, others=arguments.output / 'others')}")
        if arguments.list:
            print("".join(f"    {place}\n" for place in quoted()[name]), end="")
            continue
        for path in write(name, measure(name, arguments.output.absolute()), arguments.output.absolute()):
            print(f"    wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
