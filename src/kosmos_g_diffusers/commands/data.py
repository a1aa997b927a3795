"""Get and make training data: public sets, any source as shards, pages to look at; compositions from images alone.

list shows public data sets; import writes one of them, or any source, as shards with its licence and source in each sample; show makes a
page of samples as training reads them.

compose captions each image, lists the things that the caption names, and cuts each of them out. Samples go to
WebDataset shards with a manifest and a contact sheet, a page on which to see what was cut out. Stop a run at any moment
and start it again with the same flags: it continues. On several GPUs, let accelerate or torchrun start one process for
each; elsewhere, start the processes yourself, with --num-processes and a --process-index of its own for each.

examples:
  kosmos-g data list
  kosmos-g data import magicbrush --output ./magicbrush --min-side 256 --limit 5000
  kosmos-g data show 'folder:./photos' --model ./kosmos-g
  kosmos-g data compose --images ./images --output ./compositions
  kosmos-g data compose --images ./images --output ./compositions --batch-size 32 --workers 8 \\
      --model-entities Qwen/Qwen2.5-1.5B-Instruct --threshold 0.4
  accelerate launch --num_processes 8 --module kosmos_g_diffusers data compose --images ./images --output ./compositions
  kosmos-g data instructpix2pix --folder ./clip-filtered-dataset --output ./edits
  kosmos-g data instructpix2pix --dataset timbrooks/instructpix2pix-clip-filtered --output ./edits
  kosmos-g data sheet ./compositions --output look.html --samples 300
"""

import argparse
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

from ..data.public_sets import format_table
from ..data.settings import COLUMNS, ComposeSettings, EditSettings, ImportSettings
from ..environment import DTYPES, as_dtype, check_device, default_device, default_dtype
from ..fields import add_flags

RAY = "a Ray cluster that does the work: auto, ray://HOST:10001, or local; the output may then be s3://... or the like"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    _add_compose(actions.add_parser("compose", help="images -> captions with things cut out"))
    _add_instructpix2pix(actions.add_parser("instructpix2pix", help="InstructPix2Pix -> shards of edits"))
    _add_import(actions.add_parser("import", help="a public set, or any source -> shards"))
    _add_index(
        actions.add_parser("index", help="find out beforehand where samples lie and how long they are")
    )
    actions.add_parser("list", help="public data sets that import knows")
    _add_show(actions.add_parser("show", help="a page of samples as training reads them"))
    _add_show(actions.add_parser("sheet", help="the same as show"))


def _add_compose(parser):
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER", help="images, in it and all folders below")
    add_flags(parser, ComposeSettings)
    add("--device", help="cpu, cuda, cuda:1, ... (default: an accelerator, of this process, if there is one)")
    add("--dtype", choices=DTYPES, help="of the models (default: float32 on cpu, else bfloat16)")
    add("--batch-size", type=int, default=8, metavar="N", help="images a step (default: %(default)s)")
    add("--ray", metavar="ADDRESS", help=RAY)
    _add_output(parser)


def _add_instructpix2pix(parser):
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    layout = "the original layout: seeds.json, NAME/prompt.json, NAME/SEED_0.jpg, ..."
    source.add_argument("--folder", help=layout)
    source.add_argument("--dataset", metavar="NAME", help="Hub id or folder of a Hugging Face data set")
    add("--split", default="train", help="of the data set (default: %(default)s)")
    add("--revision", help="of the data set (default: the newest)")
    listed = ", ".join(f"{use}={column}" for use, column in COLUMNS.items())
    column = f"column of the data set, repeatable (default: {listed})"
    add("--column", action="append", default=[], metavar="USE=NAME", help=column)
    size = "most pixels of the shorter side (default: %(default)s)"
    add("--size", type=int, default=512, metavar="N", help=size)
    _add_output(parser)


def _add_import(parser):
    add = parser.add_argument
    add(
        "source",
        metavar="NAME_OR_LINE",
        help="a name of kosmos-g data list, or a line as train --data takes it",
    )
    add(
        "--data",
        metavar="FOLDER",
        help="where the set lies already (default: fetched from the Hub into the output)",
    )
    add("--limit", type=int, metavar="N", help="look at the first N samples alone")
    add("--min-side", type=int, default=0, metavar="N", help="pixels; smaller images to draw are left out")
    add(
        "--min-score",
        type=float,
        metavar="X",
        help="samples with a lower score are left out, where there are scores",
    )
    add("--ray", metavar="ADDRESS", help=RAY)
    _add_output(parser)


def _add_index(parser):
    add = parser.add_argument
    add("lines", metavar="LINE", nargs="+", help="as train --data takes them")
    add("--no-lengths", action="store_true", help="leave out the lengths, which only batches by length need")


def _add_show(parser):
    add = parser.add_argument
    add(
        "line",
        metavar="LINE",
        help="as train --data takes it; or a folder of shards, a shard, a pattern or a URL",
    )
    add("--output", default="contact-sheet.html", metavar="FILE", help="page to write (default: %(default)s)")
    add("--samples", type=int, default=100, metavar="N", help="to show (default: %(default)s)")
    add(
        "--read",
        type=int,
        default=1000,
        metavar="N",
        help="to count lengths, sizes and causes of (default: %(default)s)",
    )
    add("--model", metavar="FOLDER", help="whose tokens are counted, and whose limits hold (default: none)")
    add(
        "--stage",
        choices=("pretrain", "align", "instruct"),
        default="instruct",
        help="of training (default: %(default)s)",
    )
    add(
        "--target",
        metavar="MODEL",
        help="of the stage align: Stable Diffusion to imitate (default: what init wrote into --model)",
    )
    add("--resolution", type=int, default=512, metavar="N", help="of images to draw (default: %(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the order and the random choices (default: %(default)s)",
    )


def _add_output(parser):
    output = "folder of shards: new, or one to continue"
    parser.add_argument("--output", required=True, metavar="FOLDER", help=output)
    add = partial(parser.add_argument, type=int, metavar="N")
    add("--samples-per-shard", default=1000, help="most that a kill loses (default: %(default)s)")
    add("--workers", default=2, help="processes that decode images (default: %(default)s)")
    add("--num-processes", help="that share the work (default: of accelerate or torchrun, or 1)")
    add("--process-index", help="of this one, from 0 (default: of accelerate or torchrun, or 0)")
    add("--sheet-samples", default=100, help="on the contact sheet (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "list":
        return print(format_table())
    if arguments.action == "index":
        from ..data.indexing import build_index

        for line in arguments.lines:
            print(f"{line}: {build_index(line, with_lengths=not arguments.no_lengths):,} samples")
        return None
    if arguments.action in ("show", "sheet"):
        return _show(arguments)
    from ..data.making import compose, import_data, instructpix2pix
    from ..data.making.on_ray import compose_on_ray, import_on_ray

    given = vars(arguments)
    common = {name: given[name] for name in ("workers", "sheet_samples")}
    common["process_index"], common["num_processes"] = _share(arguments)
    with _sigterm_stops():
        if arguments.action == "import":
            names = ("source", "limit", "min_side", "min_score", "samples_per_shard")
            settings = ImportSettings(**{name: given[name] for name in names})
            if arguments.ray:
                manifest = import_on_ray(arguments.output, settings, arguments.ray, arguments.data)
            else:
                manifest = import_data(arguments.output, settings, data=arguments.data, **common)
        elif arguments.action == "compose":
            names = [entry.name for entry in fields(ComposeSettings) if entry.name in given]
            settings = ComposeSettings(**{name: given[name] for name in names})
            device = arguments.device or _own_device()
            check_device(device)
            dtype = arguments.dtype or default_dtype(device, half="bfloat16")
            options = {"device": device, "dtype": as_dtype(dtype), "batch_size": arguments.batch_size}
            options["samples_per_shard"] = arguments.samples_per_shard
            if arguments.ray:
                options["sheet_samples"] = arguments.sheet_samples
                manifest = compose_on_ray(
                    arguments.images, arguments.output, settings, arguments.ray, **options
                )
            else:
                manifest = compose(arguments.images, arguments.output, settings, **options, **common)
        else:
            names = ("folder", "dataset", "split", "revision", "size")
            columns = _columns(arguments.column)
            settings = EditSettings(columns=columns, **{name: given[name] for name in names})
            options = {**common, "samples_per_shard": arguments.samples_per_shard}
            manifest = instructpix2pix(arguments.output, settings, **options)
    if "samples" in manifest:
        print(f"{manifest['samples']:,} samples in {manifest['shards']:,} shards in {arguments.output}")
        print(manifest["summary"])


def _show(arguments):
    from ..data.making.show import show

    names = ("samples", "read", "model", "stage", "resolution", "seed")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.model and arguments.stage == "align":
        from ..conversion.target import load_target

        options["target_tokenizer"] = load_target(arguments.target or arguments.model)[1]
    path, summary = show(arguments.line, arguments.output, **options)
    print(path)
    if arguments.action == "show":
        print(summary)


def _share(arguments):
    """Index and number of processes: flags, or what the launcher says in its environment.

    The processes never talk to each other, so no process group is made: in one, the others fail when the first ends.
    """
    given = (arguments.process_index, arguments.num_processes)
    if given == (None, None):
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if None in given:
        raise ValueError("Only one of --process-index and --num-processes was given. Pass both.")
    return given


def _own_device():
    device, rank = default_device(), os.environ.get("LOCAL_RANK")
    return device if device == "cpu" or rank is None else f"{device}:{rank}"


def _columns(texts):
    columns = dict(COLUMNS)
    for text in texts:
        use, equals, name = text.partition("=")
        if not equals or use not in COLUMNS:
            raise ValueError(
                f"--column {text!r} was given. Expected USE=NAME, where USE is one of {', '.join(COLUMNS)}; an empty NAME "
                "for a column that is not there."
            )
        columns[use] = name or None
    return tuple(columns.items())


@contextmanager
def _sigterm_stops():
    """SIGTERM, as a cluster sends it, ends the work as an error does: samples that wait for their shard are written."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
