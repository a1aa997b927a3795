"""Run a benchmark: images, scores, a report next to the published numbers.

Everything goes to --output: the images with prompt, seed and settings inside, a file of scores for each scorer,
report.json, report.md, plots and HTML sheets. A command that was stopped is resumed when you repeat it; a folder never
mixes runs of different settings. Under accelerate launch the images are split over its processes.

examples:
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/dreambench
  accelerate launch --multi_gpu -m kosmos_g_diffusers evaluate dreambench --data dreambooth/dataset \\
      --model ./kosmos-g --output runs/dreambench
  kosmos-g evaluate coco --annotations captions_val2014.json --images val2014 --model ./kosmos-g --output runs/coco
  kosmos-g evaluate multi --data pairs --model ./kosmos-g --output runs/pairs
  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus
  kosmos-g evaluate sprites --output runs/sprites
  # images that another model made, by the same scorers
  kosmos-g evaluate dreambench --data dreambooth/dataset --generated patchdpo/output --output runs/patchdpo

kosmos-g evaluate BENCHMARK --help says what a benchmark measures and which flags it has.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..environment import DTYPES, default_device, default_dtype
from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.manifest import FILE_NAME, OWN_PICTURES, Manifest
from ..evaluation.scorers import SCORERS
from ..generation import memory
from ..generation.schedulers import SCHEDULERS
from ..generation.settings import GenerationSettings
from ..provenance import add_flags as add_mark_flags
from ..provenance import read_flags as read_mark_flags
from ..quantization import QUANTIZATIONS, check_library
from ..sprites.pretrained import SPRITES_NOTE, with_small_model

# flags of drawing: beside --generated they would do nothing
DRAWING = (
    *("model", "repair", "steps", "guidance", "scheduler", "dtype", "quantize", "memory", "batch_size"),
    "c2pa_cert",
)
RESUMED = (
    "A command that was stopped is resumed when you repeat it. When it is done, look at report.md and sheets/index.html of "
    "--output."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        title = benchmark.TITLE
        command = benchmarks.add_parser(
            name,
            help=title,
            description=f"{title[0].upper()}{title[1:]}.\n\n{benchmark.DESCRIPTION.strip()}",
            epilog=f"{RESUMED}\n\nexamples:{benchmark.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_arguments(command)
        _add_common(command, benchmark)


def _add_common(parser, benchmark):
    """The flags that benchmarks share, with the defaults of each."""
    add, settings, batch_size = parser.add_argument, benchmark.SETTINGS, benchmark.BATCH_SIZE
    if benchmark.SCORERS is not None:
        default = " and ".join(benchmark.SCORERS) or "none"
        text = f"one of {', '.join(SCORERS)}; WEIGHTS is a folder or Hub id; repeat it (default: {default})"
        add("--scorer", action="append", dest="scorers", metavar="NAME[=WEIGHTS]", help=text)
    add("--model", metavar="MODEL", help="folder or Hub id (default: the small model that ships, of sprites)")
    if benchmark.LAYOUTS:
        layouts = ", ".join(layout.title for layout in benchmark.LAYOUTS)
        text = f"score the images that another model made instead of drawing; named as by {layouts}"
        add("--generated", metavar="FOLDER", help=text)
    else:
        parser.set_defaults(generated=None)
    output = "results: new, or of the same run, which is then resumed"
    add("--output", required=True, metavar="FOLDER", help=output)
    add("--repair", action="store_true", help="make images again that are there and cannot be read")
    add("--seed", type=int, default=0, metavar="N", help="of the run (default: 0)")
    for name, kind in (("steps", int), ("guidance", float)):
        add(f"--{name}", type=kind, metavar="N", help=f"(default: {settings[name]})")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=f"(default: {settings['scheduler']})")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on the CPU, else float16)")
    add("--quantize", choices=QUANTIZATIONS, help="weights of the text encoder (default: none)")
    memory.add_flag(add)
    add("--device", help="cpu, cuda, mps, ... (default: an accelerator if there is one)")
    images = f"images at once (default: {batch_size})"
    add("--batch-size", type=int, metavar="N", help=images)
    add_mark_flags(add)


def run(arguments: argparse.Namespace) -> None:
    from ..evaluation.report import scores_table
    from ..evaluation.run import evaluate

    benchmark = BENCHMARKS[arguments.benchmark]
    device, marker = arguments.device or default_device(), read_mark_flags(arguments)
    settings, offload = {}, "none"
    if arguments.generated is None:
        settings = {"height": None, "width": None, **benchmark.SETTINGS, "dtype": default_dtype(device)}
        given = {
            name: getattr(arguments, name) for name in ("steps", "guidance", "scheduler", "dtype", "seed")
        }
        settings |= {name: value for name, value in given.items() if value is not None}
        # without these runs are named as they always were; the first is a benchmark's own
        if getattr(arguments, "binding", None):
            settings["binding"] = arguments.binding
        settings, offload = _plan(arguments, settings, device, benchmark)
    else:
        _refuse_drawing(arguments)
    manifest = benchmark.plan(arguments)
    names = () if benchmark.SCORERS is None else arguments.scorers or benchmark.SCORERS
    report = evaluate(
        manifest,
        arguments.output,
        _make_scorers(names, device, manifest.data or Path(arguments.output) / OWN_PICTURES),
        model=arguments.model,
        settings=settings,
        device=device,
        batch_size=benchmark.BATCH_SIZE if arguments.batch_size is None else arguments.batch_size,
        repair=arguments.repair,
        marker=marker,
        offload=offload,
    )
    if report is not None:  # else another process has written it
        print(scores_table(report))
        print(f"\n{arguments.output}/report.md")
    if arguments.model is None and arguments.generated is None and arguments.benchmark != "sprites":
        print(SPRITES_NOTE, file=sys.stderr)


def _plan(arguments, settings, device, benchmark):
    """Settings of a run -> these with what --quantize and --memory add, and how the model is offloaded."""
    asked = GenerationSettings(
        "", model=arguments.model, device=device, quantize=arguments.quantize or "none", **settings
    )
    check_library(asked.quantize)
    if (budget := memory.find_budget(arguments.memory, device)) is not None:
        fixed = [name for name in memory.OF_IMAGES if getattr(arguments, name) is not None]
        if (Path(arguments.output) / FILE_NAME).is_file():  # a run that is resumed stays as it was begun
            begun = {"quantize": "none", **Manifest.read(arguments.output).settings}
            left = [name for name in memory.OF_IMAGES if name not in fixed and name in begun]
            asked, fixed = replace(asked, **{name: begun[name] for name in left}), [*fixed, *left]
        batch = benchmark.BATCH_SIZE if arguments.batch_size is None else arguments.batch_size
        plan = memory.plan_memory(with_small_model(asked), budget, fixed=fixed, batch=batch, images=2)
        print(plan, file=sys.stderr)
        asked = plan.applied_to(asked)
    changed = {"dtype": asked.dtype} | ({} if asked.quantize == "none" else {"quantize": asked.quantize})
    return settings | changed, asked.offload


def _refuse_drawing(arguments):
    given = {name: getattr(arguments, name) for name in DRAWING} | {"no_mark": not arguments.mark}
    wrong = [
        f"--{name.replace('_', '-')}"
        for name, value in given.items()
        if value is not None and value is not False
    ]
    if wrong:
        raise ValueError(
            f"{' and '.join(wrong)} came with --generated {arguments.generated}, whose images are only scored. Leave out one of "
            "the two."
        )


def _make_scorers(texts, device, data):
    """A FeatureScorer for each NAME[=WEIGHTS]."""
    from ..evaluation.scoring import FeatureScorer

    scorers = {}
    for text in texts:
        name, _, source = text.partition("=")
        if name not in SCORERS:
            raise ValueError(f"There is no scorer {name!r}. There are {', '.join(SCORERS)}.")
        if name in scorers:
            raise ValueError(f"The scorer {name!r} was given twice.")
        scorers[name] = FeatureScorer(name, source or None, device, data)
    return list(scorers.values())
