"""Compare two runs of kosmos-g evaluate: paired differences with intervals, images side by side.

Both runs must be of the same benchmark with the same options: each image of A is compared with the image of B that has
the same prompt and input images. The results are compare.json, compare.md, plots and HTML sheets.

examples:
  kosmos-g compare runs/before runs/after
  kosmos-g compare runs/guidance-7.5 runs/guidance-5 --output runs/guidance
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_a", metavar="RUN_A", help="the --output of a kosmos-g evaluate")
    parser.add_argument("run_b", metavar="RUN_B", help="another")
    parser.add_argument("--output", default="comparison", metavar="FOLDER", help="(default: comparison)")


def run(arguments: argparse.Namespace) -> None:
    from ..evaluation.compare import compare, comparison_table

    result = compare(arguments.run_a, arguments.run_b, arguments.output)
    print(comparison_table(result))
    print(f"\n{arguments.output}/compare.md")
