"""Run a benchmark: images, scores, a report beside the published numbers.

Everything goes to --output: the images with prompt, seed and settings inside, a file of scores for each scorer,
report.json, report.md, plots and HTML sheets. Repeat a command that was stopped and it goes on where it was; a folder
never mixes runs of different settings. Under accelerate launch the images are split over its processes.

examples:
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/dreambench
  accelerate launch --multi_gpu -m kosmos_g_diffusers evaluate dreambench --data dreambooth/dataset \\
      --model ./kosmos-g --output runs/dreambench
  kosmos-g evaluate coco --annotations captions_val2014.json --images val2014 --model ./kosmos-g --output runs/coco
  kosmos-g evaluate multi --data pairs --model ./kosmos-g --output runs/pairs
  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus
  kosmos-g evaluate sprites --output runs/sprites

kosmos-g evaluate BENCHMARK --help says what a benchmark measures and which flags it has.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

from ..environment import DTYPES, default_device, default_dtype
from ..evaluation.benchmarks import coco, dreambench, dreambench_plus, multi
from ..evaluation.benchmarks import sprites as sprite_bench
from ..evaluation.features import SCORERS
from ..evaluation.report import scores_table
from ..evaluation.run import Plan, evaluate
from ..evaluation.scoring import FeatureScorer
from ..generation.schedulers import SCHEDULERS
from ..sprites.pretrained import SPRITES_NOTE

DEFAULT_SCORERS = ("dino", "clip")  # of the paper


def add_arguments(parser):
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = benchmarks.add_parser(
            name,
            help=benchmark.title,
            description=f"{benchmark.title[0].upper()}{benchmark.title[1:]}.\n\n{benchmark.description.strip()}",
            epilog=f"{GOES_ON}\nexamples:\n{benchmark.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_arguments(command)
        _add_common(command, benchmark.settings, benchmark.batch_size)


def run(arguments):
    benchmark = BENCHMARKS[arguments.benchmark]
    device = arguments.device or default_device()
    settings = {"height": None, "width": None, **benchmark.settings}
    settings |= {
        name: getattr(arguments, name) for name in ("steps", "guidance", "scheduler", "dtype", "seed")
    }
    settings["dtype"] = settings["dtype"] or default_dtype(device)
    options = {
        "model": arguments.model,
        "settings": settings,
        "device": device,
        "batch_size": arguments.batch_size,
    }
    benchmark.run(arguments, options)
    if arguments.model is None and arguments.benchmark != "sprites":
        print(SPRITES_NOTE, file=sys.stderr)


def _run_plan(plan, scorers, arguments, options):
    """Images, scores, report; returns whether this process has written it."""
    return _print(evaluate(plan, arguments.output, scorers, repair=arguments.repair, **options), arguments)


def _print(report, arguments):
    if report is None:  # another process has written it
        return False
    print(scores_table(report))
    print(f"\n{arguments.output}/report.md")
    return True


def _add_common(parser, settings, batch_size):
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder or Hub id (default: the small model that ships, of sprites)")
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


def _add_scorers(parser, default=DEFAULT_SCORERS):
    parser.add_argument(
        "--scorer",
        action="append",
        dest="scorers",
        metavar="NAME[=WEIGHTS]",
        help=f"one of {', '.join(SCORERS)}; WEIGHTS is a folder or Hub id; repeat it "
        f"(default: {' and '.join(default) or 'none'})",
    )


def _make_scorers(arguments, options, data, default=DEFAULT_SCORERS):
    scorers = {}
    for text in arguments.scorers or default:
        name, _, source = text.partition("=")
        if name not in SCORERS:
            raise ValueError(f"There is no scorer {name!r}. There are {', '.join(SCORERS)}.")
        if name in scorers:
            raise ValueError(f"The scorer {name!r} was given twice.")
        scorers[name] = FeatureScorer(name, source or None, options["device"], data)
    return list(scorers.values())


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
    add("--subjects", type=_names, metavar="A,B", help="some of them (default: all 30)")
    add("--prompts", type=_numbers, metavar="N,N", help="some of them, from 0 to 24 (default: all 25)")
    _add_images(parser, dreambench.IMAGES_PER_PROMPT)
    _add_scorers(parser)


def _names(text):
    return [name.strip() for name in text.split(",")]


def _numbers(text):
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; expected some such as 0,20"
        ) from None


def _run_dreambench(arguments, options):
    tasks = dreambench.build_tasks(
        arguments.data,
        arguments.protocol,
        arguments.subjects,
        arguments.prompts,
        arguments.images_per_prompt,
        arguments.seed,
    )
    whole = len(tasks) == len(dreambench.SUBJECTS) * dreambench.N_PROMPTS * dreambench.IMAGES_PER_PROMPT
    note = (
        "The published numbers are of 30 subjects with 25 prompts and 4 images each; this run is of others."
    )
    plan = Plan(
        benchmark="dreambench",
        options={"protocol": arguments.protocol},
        tasks=tasks,
        data=arguments.data,
        published=dreambench.PUBLISHED[arguments.protocol],
        notes=() if whole else (note,),
    )
    _run_plan(plan, _make_scorers(arguments, options, arguments.data), arguments, options)


def _add_coco(parser):
    add = parser.add_argument
    add("--annotations", required=True, metavar="FILE", help="captions_val2014.json of MS-COCO")
    add("--images", required=True, metavar="FOLDER", help="its photographs, val2014")
    add(
        "--count",
        type=int,
        default=coco.COUNT,
        metavar="N",
        help=f"captions, drawn by --seed (default: {coco.COUNT:,})",
    )
    add(
        "--inception",
        metavar="FILE",
        help="weights of the FID's network (default: torch-fidelity's download)",
    )
    _add_scorers(parser, default=())


def _run_coco(arguments, options):
    report = coco.evaluate(
        arguments.annotations,
        arguments.images,
        arguments.output,
        count=arguments.count,
        seed=arguments.seed,
        inception=arguments.inception,
        scorers=_make_scorers(arguments, options, arguments.images, default=()),
        repair=arguments.repair,
        **options,
    )
    _print(report, arguments)


def _add_multi(parser):
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="pictures and prompts.json (docs/evaluation.md)")
    add(
        "--prompts", metavar="FILE", help="another file of prompts (default: prompts.json of the data folder)"
    )
    _add_images(parser, 4)
    _add_scorers(parser)


def _run_multi(arguments, options):
    tasks = multi.build_tasks(arguments.data, arguments.prompts, arguments.images_per_prompt, arguments.seed)
    plan = Plan("multi", {}, tasks, arguments.data)
    _run_plan(plan, _make_scorers(arguments, options, arguments.data), arguments, options)


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


def _run_plus(arguments, options):
    if arguments.judge_prompts and not arguments.judge:
        raise ValueError("--judge-prompts was given without --judge, the folder to write to. Pass both.")
    if arguments.judge_prompts:  # before hours of work
        dreambench_plus.read_instructions(arguments.judge_prompts)
    tasks = dreambench_plus.build_tasks(arguments.data, arguments.images_per_prompt, arguments.seed)
    plan = Plan("dreambench-plus", {}, tasks, arguments.data)
    if (
        _run_plan(plan, _make_scorers(arguments, options, arguments.data), arguments, options)
        and arguments.judge
    ):
        dreambench_plus.export(arguments.output, arguments.data, arguments.judge, arguments.judge_prompts)


def _add_sprites(parser):
    parser.add_argument(
        "--count",
        type=int,
        default=sprite_bench.COUNT,
        metavar="N",
        help=f"prompts of each kind (default: {sprite_bench.COUNT})",
    )


def _run_sprites(arguments, options):
    tasks, files = sprite_bench.build_tasks(arguments.count, arguments.seed)
    plan = Plan(
        "sprites", {"prompts of each kind": arguments.count}, tasks, files=files, notes=(sprite_bench.NOTE,)
    )
    _run_plan(plan, [sprite_bench.ReaderScorer()], arguments, options)


class Benchmark(NamedTuple):
    title: str
    batch_size: int  # images at once, unless the user says otherwise
    settings: dict  # likewise
    add_arguments: Callable  # of a parser: the flags that others have not
    run: Callable  # of the arguments, and of model, settings, device and batch size as `open_run` takes them
    description: str  # for the help
    examples: str


GOES_ON = """A command that was stopped goes on where it was when it is repeated; report.md and sheets/index.html of --output are what to
look at when it is done.
"""

BENCHMARKS = {
    "dreambench": Benchmark(
        "30 subjects with 25 prompts each",
        4,
        dreambench.SETTINGS,
        _add_dreambench,
        _run_dreambench,
        """
A picture of a subject in new scenes, with the settings of the paper. DINO and CLIP-I tell whether it is the subject, CLIP-T
whether it is the scene. Both protocols give the model the same picture: paper compares with that one, standard with every
picture of the subject. The data folder has a folder of pictures for each subject, such as dog/02.jpg.
""",
        """  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/dreambench
  # a taste of it: two subjects, two prompts, one image each; scored without anything from a hub
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/taste \\
      --subjects dog,can --prompts 0,20 --images-per-prompt 1 --scorer efficientnet
  # other weights of a scorer, from a folder
  kosmos-g evaluate dreambench --data dreambooth/dataset --model ./kosmos-g --output runs/offline \\
      --scorer dino=./dino-vits16 --scorer clip=./clip-vit-base-patch32""",
    ),
    "coco": Benchmark(
        "FID-30k on MS-COCO",
        8,
        coco.SETTINGS,
        _add_coco,
        _run_coco,
        """
Images for captions of MS-COCO val2014, with the settings of the paper, and their distance to its photographs (FID, lower is
better). --seed draws the captions, which are saved. With a smaller --count than 30,000 the FID is larger, and compares with no
published one.
""",
        """  kosmos-g evaluate coco --annotations captions_val2014.json --images val2014 --model ./kosmos-g --output runs/coco
  kosmos-g evaluate coco --annotations captions_val2014.json --images val2014 --model ./kosmos-g --output runs/coco-offline \\
      --inception pt_inception-2015-12-05-6726825d.pth""",
    ),
    "multi": Benchmark(
        "prompts of several subjects",
        4,
        dreambench.SETTINGS,
        _add_multi,
        _run_multi,
        """
Several pictures in one prompt: DINO and CLIP-I with each subject and with the worst of them, CLIP-T with the words. The data folder
has the pictures and prompts.json:

  [{"prompt": "<i> and <i> in the jungle", "images": ["dog/02.jpg", "can/01.jpg"], "text": "a dog and a can in the jungle"}]
""",
        "  kosmos-g evaluate multi --data pairs --model ./kosmos-g --output runs/pairs",
    ),
    "dreambench-plus": Benchmark(
        "DreamBench++, and its images for its judge",
        4,
        dreambench_plus.SETTINGS,
        _add_plus,
        _run_plus,
        """
The data of DreamBench++, scored by DINO and CLIP. Its judge is a hosted model, which is not called: --judge writes the images and
questions that it is asked.
""",
        """  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus
  kosmos-g evaluate dreambench-plus --data dreambench_plus/data --model ./kosmos-g --output runs/plus \\
      --judge judge --judge-prompts dreambench_plus/dreambench_plus/prompts""",
    ),
    "sprites": Benchmark(
        "held-out sprites, read by rules",
        50,
        sprite_bench.SETTINGS,
        _add_sprites,
        _run_sprites,
        """
For models of the miniature world, such as the small one that ships: 500 prompts of each of four kinds (new background, two pictures,
words alone, another colour), of sprites that no training has seen. Rules read shape, colour and pattern from the images. The control
judges them by the pictures of other prompts. Needs no data and no network.
""",
        """  kosmos-g evaluate sprites --output runs/sprites
  kosmos-g evaluate sprites --count 20 --output runs/sprites-quick
  kosmos-g evaluate sprites --model runs/sprites-training/model --output runs/mine""",
    ),
}
