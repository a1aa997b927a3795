"""Run a benchmark: images, scores, a report beside the published numbers.

Everything goes to --output: the images with prompt, seed and settings inside, a file of scores for each scorer,
report.json, report.md, plots and HTML sheets. Repeat a command that was stopped and it goes on where it was; a folder
never mixes runs of different settings. Under accelerate launch the images are split over its processes.

examples:
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/dreambench
  accelerate launch --multi_gpu -m kosmos_g_diffusers evaluate dreambench --data dreambooth/dataset \\
      --model ./kosmos-g --output runs/dreambench
  kosmos-g evaluate multi --data pairs --model ./kosmos-g --output runs/pairs
  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus
  kosmos-g evaluate sprites --model ./kosmos-g-sprites --output runs/sprites
"""

import sys

from ..evaluation import dreambench, dreambench_plus, multi, sprite_bench
from ..evaluation.report import scores_table
from ..evaluation.run import Plan, evaluate
from ..evaluation.scorers import SCORERS
from ..evaluation.scoring import FeatureJudge
from ..generation import default_device
from ..schedulers import SCHEDULERS
from ..settings import DTYPES
from ..tiny import RANDOM_MODEL_NOTE

DEFAULT_SCORERS = ("dino", "clip")  # of the paper


def add_arguments(parser):
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, add in BENCHMARKS.items():
        title, batch_size, settings, add_own, plan = add
        command = benchmarks.add_parser(name, help=title, description=title)
        add_own(command)
        _add_common(command, settings, batch_size)
        command.set_defaults(plan=plan, base_settings=settings)


def run(arguments):
    arguments.device = arguments.device or default_device()
    plan, judges = arguments.plan(arguments)
    settings = {"height": None, "width": None, **arguments.base_settings}
    settings |= {
        name: getattr(arguments, name) for name in ("steps", "guidance", "scheduler", "dtype", "seed")
    }
    settings["dtype"] = settings["dtype"] or ("float32" if arguments.device == "cpu" else "float16")
    report = evaluate(
        plan,
        arguments.output,
        judges,
        model=arguments.model,
        settings=settings,
        device=arguments.device,
        batch_size=arguments.batch_size,
        repair=arguments.repair,
    )
    if report is None:  # another process writes it
        return
    if getattr(arguments, "judge", None):
        dreambench_plus.export(arguments.output, arguments.data, arguments.judge, arguments.judge_prompts)
    print(scores_table(report))
    print(f"\n{arguments.output}/report.md")
    if arguments.model is None:
        print(RANDOM_MODEL_NOTE, file=sys.stderr)


def _add_common(parser, settings, batch_size):
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder or Hub id (default: a small random model, for trying out)")
    add(
        "--output",
        required=True,
        metavar="FOLDER",
        help="results: new, or of the same run, which then goes on",
    )
    add("--repair", action="store_true", help="make images again that are there and cannot be read")
    add("--seed", type=int, default=0, metavar="N", help="of the run (default: 0)")
    for name, kind in (("steps", int), ("guidance", float)):
        add(f"--{name}", type=kind, default=settings[name], metavar="N", help=f"(default: {settings[name]})")
    default = settings["scheduler"] or "the model's"
    add(
        "--scheduler",
        choices=SCHEDULERS,
        default=settings["scheduler"],
        metavar="NAME",
        help=f"(default: {default})",
    )
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on the CPU, else float16)")
    add("--device", help="cpu, cuda, mps, ... (default: an accelerator if there is one)")
    add(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="N",
        help=f"images at once (default: {batch_size})",
    )


def _add_scorers(parser):
    parser.add_argument(
        "--scorer",
        action="append",
        dest="scorers",
        metavar="NAME[=WEIGHTS]",
        help=f"one of {', '.join(SCORERS)}; WEIGHTS is a folder or Hub id; repeat it "
        f"(default: {' and '.join(DEFAULT_SCORERS)})",
    )


def _judges(arguments):
    judges = {}
    for text in arguments.scorers or DEFAULT_SCORERS:
        name, _, source = text.partition("=")
        if name not in SCORERS:
            raise ValueError(f"There is no scorer {name!r}. There are {', '.join(SCORERS)}.")
        if name in judges:
            raise ValueError(f"The scorer {name!r} was given twice.")
        judges[name] = FeatureJudge(name, source or None, arguments.device, arguments.data)
    return list(judges.values())


def _add_images(parser, default):
    parser.add_argument(
        "--images-per-prompt", type=int, default=default, metavar="N", help=f"(default: {default})"
    )


# Benchmarks ----------------------------------------------------------------------------------------------------------


def _add_dreambench(parser):
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="the folder dataset of github.com/google/dreambooth")
    add(
        "--protocol",
        choices=dreambench.PROTOCOLS,
        default="paper",
        help="score against the one picture the model was given (paper, the default) or all of the subject (standard)",
    )
    add("--subjects", type=lambda text: text.split(","), metavar="A,B", help="some of them (default: all 30)")
    add("--prompts", type=_numbers, metavar="N,N", help="some of them, from 0 to 24 (default: all 25)")
    _add_images(parser, dreambench.IMAGES_PER_PROMPT)
    _add_scorers(parser)


def _numbers(text):
    return [int(number) for number in text.split(",")]


def _plan_dreambench(arguments):
    tasks = dreambench.build_tasks(
        arguments.data,
        arguments.protocol,
        arguments.subjects,
        arguments.prompts,
        arguments.images_per_prompt,
        arguments.seed,
    )
    whole = arguments.subjects is None and arguments.prompts is None
    note = (
        "The published numbers are of 30 subjects with 25 prompts and 4 images each; this run is of a part."
    )
    plan = Plan(
        benchmark="dreambench",
        options={"protocol": arguments.protocol},
        tasks=tasks,
        data=arguments.data,
        published=dreambench.PUBLISHED[arguments.protocol],
        notes=() if whole else (note,),
    )
    return plan, _judges(arguments)


def _add_multi(parser):
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="pictures and prompts.json (docs/evaluation.md)")
    add(
        "--prompts", metavar="FILE", help="another file of prompts (default: prompts.json of the data folder)"
    )
    _add_images(parser, 4)
    _add_scorers(parser)


def _plan_multi(arguments):
    tasks = multi.build_tasks(arguments.data, arguments.prompts, arguments.images_per_prompt, arguments.seed)
    return Plan("multi", {}, tasks, arguments.data), _judges(arguments)


def _add_plus(parser):
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="data folder of DreamBench++: images/ and captions/")
    add("--judge", metavar="FOLDER", help="also write the images for the judge of DreamBench++ there")
    add(
        "--judge-prompts",
        metavar="FOLDER",
        help="dreambench_plus/prompts of its repository: write the judge's requests as well",
    )
    _add_images(parser, dreambench_plus.IMAGES_PER_PROMPT)
    _add_scorers(parser)


def _plan_plus(arguments):
    if arguments.judge_prompts and not arguments.judge:
        raise ValueError("--judge-prompts was given without --judge, the folder to write to. Pass both.")
    tasks = dreambench_plus.build_tasks(arguments.data, arguments.images_per_prompt, arguments.seed)
    return Plan("dreambench-plus", {}, tasks, arguments.data), _judges(arguments)


def _add_sprites(parser):
    parser.add_argument(
        "--count",
        type=int,
        default=sprite_bench.COUNT,
        metavar="N",
        help=f"prompts of each kind (default: {sprite_bench.COUNT})",
    )


def _plan_sprites(arguments):
    tasks, files = sprite_bench.build_tasks(arguments.count, arguments.seed)
    plan = Plan(
        "sprites", {"prompts of each kind": arguments.count}, tasks, files=files, notes=(sprite_bench.NOTE,)
    )
    return plan, [sprite_bench.ReaderJudge()]


# name -> what it says in the list, images at once, settings, its own flags, what makes its plan and judges of them
BENCHMARKS = {
    "dreambench": ("30 subjects, 25 prompts", 4, dreambench.SETTINGS, _add_dreambench, _plan_dreambench),
    "multi": ("prompts of several subjects", 4, dreambench.SETTINGS, _add_multi, _plan_multi),
    "dreambench-plus": ("DreamBench++", 4, dreambench_plus.SETTINGS, _add_plus, _plan_plus),
    "sprites": ("held-out sprites, read by rules", 50, sprite_bench.SETTINGS, _add_sprites, _plan_sprites),
}
