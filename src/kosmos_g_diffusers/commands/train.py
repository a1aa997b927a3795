"""Train Kosmos-G, or resume a run.

Three stages follow each other. A checkpoint of one is a whole pipeline folder: what the next starts from, and what
KosmosGPipeline.from_pretrained and kosmos-g generate read. The same command resumes a run that ended early: after
SIGTERM (exit code 143) or Ctrl-C (130) from where it stopped, otherwise from its last checkpoint. Settings come from --config,
and flags given with it win. With --rehearse a few steps are tried in a temporary folder: what memory, time and disk the run
will take, what runs out, and which settings fit.

examples:
  kosmos-g train align --help
  kosmos-g train align --config examples/recipes/one_gpu_align.toml --model ./kosmos-g-fresh --data tsv:captions:/data/laion \\
      --output runs/align --rehearse --for-memory 24 --price 2
  kosmos-g train align --model ./kosmos-g-fresh --data tsv:captions:/data/laion --output runs/align --mixed-precision bf16
  kosmos-g train instruct --config examples/recipes/one_gpu_instruct.toml --model runs/align/checkpoint-00100000 \\
      --data shards:/data/compositions shards:/data/edits tsv:captions:/data/laion --output runs/instruct
  accelerate launch --num_processes 8 -m kosmos_g_diffusers train instruct --config run.toml
  kosmos-g train merge --adapter runs/instruct/checkpoint-00020000 --model ./kosmos-g --output ./kosmos-g-mine
"""

import argparse
import json
import sys
from dataclasses import asdict, fields

from ..training.config import TrainConfig
from ..training.config import add_arguments as add_settings

STAGES = {
    "pretrain": (
        "Stage 1, multimodal language modelling: the next token after words and images.",
        "Trains the language model, the resampler and a part of the vision tower (--train-vision). kosmos-g init starts from\n"
        "Kosmos-2, which has been through this stage.",
        "--data tsv:captions:/data/laion shards:/data/interleaved --data-weights 1 1",
    ),
    "align": (
        "Stage 2, alignment: the AlignerNet learns to say what the text encoder of Stable Diffusion says.",
        "Trains the AlignerNet, from captions alone. The text encoder to imitate is the one that kosmos-g init has put into\n"
        "the model's folder, or that of --target.",
        "--data tsv:captions:/data/laion",
    ),
    "instruct": (
        "Stage 3, instruction tuning: the frozen U-Net says what a prompt of words and images should have said.",
        "Trains the AlignerNet, the language model, the resampler and the end of the vision tower; with --lora-rank adapters\n"
        "of the language model and the AlignerNet alone.",
        "--data tsv:captions:/data/laion tsv:edits:/data/edits tsv:compositions:/data/openimages --data-weights 1 2 2",
    ),
}
MERGE = "merge"
MERGED = "An adapter of --lora-rank becomes part of the weights: a folder like any other model's."
MERGE_DESCRIPTION = (
    "The folder draws what the model draws with the adapter on it, to rounding, and needs neither of them. Nothing else of the\n"
    "model changes, so its image words stay valid. The model card says what was merged."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_subparsers(metavar="STAGE", required=True, dest="stage")
    for name, (title, description, data) in STAGES.items():
        stage = stages.add_parser(
            name,
            help=title,
            usage=f"kosmos-g train {name} [--config FILE] [--model MODEL] [--data SOURCE ...] [--output FOLDER] [FLAG ...]",
            description=f"{title}\n\n{description}",
            epilog=f"example:\n  kosmos-g train {name} --model MODEL {data} \\\n      --output runs/{name}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        stage.add_argument("--config", metavar="FILE", help="TOML file of settings: lines such as lr = 1e-4")
        stage.add_argument(
            "--show", action="store_true", help="print the settings that result, as JSON, and stop"
        )
        _add_rehearsal(stage.add_argument_group("rehearsal"))
        add_settings(stage, name)
    _add_merge(
        stages.add_parser(
            MERGE,
            help=MERGED,
            description=f"{MERGED}\n\n{MERGE_DESCRIPTION}",
            epilog=f"example:\n  kosmos-g train {MERGE} --adapter runs/instruct/checkpoint-00020000 \\\n"
            "      --model runs/align/checkpoint-00100000 --output kosmos-g-mine",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )


def _add_rehearsal(group):
    rehearse = "try a few steps in a temporary folder, say what the run will take, and stop"
    group.add_argument("--rehearse", action="store_true", help=rehearse)
    memory = (
        "GPU memory to count for, and to propose settings for if it is short (default: that of the GPU here)"
    )
    group.add_argument("--for-memory", type=float, metavar="GIB", help=memory)
    pages = "write a page for each source there, as kosmos-g data show does"
    group.add_argument("--pages", metavar="FOLDER", help=pages)
    group.add_argument("--price", type=float, metavar="NUMBER", help="of an hour of a GPU, in any currency")


def _add_merge(parser):
    add = parser.add_argument
    add(
        "--adapter",
        required=True,
        metavar="FOLDER",
        help="a checkpoint with an adapter, or the adapter's folder",
    )
    add(
        "--model", required=True, metavar="MODEL", help="folder or Hub id of the model that it was trained on"
    )
    add("--output", required=True, metavar="FOLDER", help="folder to write, which does not exist yet")


def run(arguments: argparse.Namespace) -> None:
    if arguments.stage == MERGE:
        from ..training.model_folder import merge_into_folder

        return print(merge_into_folder(arguments.model, arguments.adapter, arguments.output))
    names = {entry.name for entry in fields(TrainConfig)} - {"stage"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if arguments.config is None:
        config = TrainConfig.from_dict(given, arguments.stage, "The command")
    else:
        config = TrainConfig.from_toml(arguments.config, arguments.stage, **given)
    if arguments.show:
        return print(json.dumps(asdict(config), indent=2))
    for flag in ("for_memory", "price"):
        value = getattr(arguments, flag)
        if value is not None and not (arguments.rehearse and 0 < value < 1e9):
            raise ValueError(
                f"--{flag.replace('_', '-')} {value:g} was given. It belongs to --rehearse, and is a positive number."
            )
    try:
        from ..training.loop import TrainingStopped
        from ..training.run import process_state, run_stage
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise ImportError("Training needs the package accelerate: pip install -U accelerate") from error
    from ..data import TooManyBadSamples

    if arguments.rehearse:
        return _rehearse(config, arguments)
    try:
        checkpoint = run_stage(config.stage, config, announce=print)
    except (TrainingStopped, TooManyBadSamples) as error:
        if arguments.traceback:
            raise
        print(f"kosmos-g: stopped: {error}", file=sys.stderr)  # in lines: one for each cause of bad samples
        raise SystemExit(2) from error
    state = process_state()
    if state.is_main_process:
        print(checkpoint)
    state.destroy_process_group()


def _rehearse(config, arguments):
    from ..training.rehearsal import describe, rehearse, write_pages
    from ..training.run import process_state

    def say(text):
        if process_state().is_main_process:
            print(text, file=sys.stderr, flush=True)

    found = rehearse(config.stage, config, for_memory=arguments.for_memory, price=arguments.price, say=say)
    state = process_state()
    if state.is_main_process:
        print(describe(found))
        for page in write_pages(config, arguments.pages) if arguments.pages else ():
            print(f"page: {page}")
    state.destroy_process_group()
