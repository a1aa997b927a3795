"""Join Kosmos-2, a fresh AlignerNet and a Stable Diffusion into a folder to train.

Needs no official checkpoint: train align then teaches the AlignerNet from captions, train instruct all of it from
images. The folder appears when it is complete.

examples:
  kosmos-g init --mllm microsoft/kosmos-2-patch14-224 --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --output ./kosmos-g-fresh
  kosmos-g train align --help
"""

import argparse

from ..environment import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mllm", required=True, metavar="MODEL", help="folder or Hub id of Kosmos-2")
    base = (
        "folder or Hub id of the Stable Diffusion 1.x or 2.x that shall draw; its text encoder is what the AlignerNet "
        "learns to imitate"
    )
    add("--base", required=True, metavar="MODEL", help=base)
    add("--output", required=True, metavar="FOLDER", help="folder to write, new or empty")
    layers = "layers of each half of the AlignerNet (default: 12)"
    add("--aligner-layers", type=int, default=12, metavar="N", help=layers)
    add("--dtype", choices=DTYPES, help="of the weights written (default: float32, which training keeps)")
    add("--seed", type=int, default=0, help="of the AlignerNet's weights (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    from ..conversion import initialize

    folder = initialize(
        arguments.mllm,
        arguments.base,
        arguments.output,
        aligner_layers=arguments.aligner_layers,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    print(folder)
