"""Write the text encoder for programs without torch: ONNX, OpenVINO, or torch's own exported programs.

The folder has two graphs, images -> states and words with states -> condition, the tokenizer, sizes and ids in
kosmos_g.json, and for ONNX and OpenVINO kosmos_g_runner.py, which runs them without this package. It appears when it
is complete, and the error that the graphs make is printed.

examples:
  kosmos-g export ./kosmos-g --format onnx --output ./kosmos-g-onnx
  kosmos-g export ./kosmos-g --format openvino --dtype int8 --output ./kosmos-g-int8

then, where numpy, pillow, tokenizers and onnxruntime or openvino are installed:
  python ./kosmos-g-onnx/kosmos_g_runner.py states.npy "<i> in a hat" dog.png  # 77 states; "" is the null condition
"""

import argparse

from ..export.formats import DTYPES, PACKAGES
from ..sprites.pretrained import SPRITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder or Hub id (default: the small model that ships, of sprites)",
    )
    add(
        "--format", choices=tuple(PACKAGES), required=True, help="of the graphs; pt2 is for torch.export.load"
    )
    add("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    dtype = "of the weights; what goes in and out is float32 (default: float32)"
    add("--dtype", choices=DTYPES, default=DTYPES[0], help=dtype)


def run(arguments: argparse.Namespace) -> None:
    from ..export import export_encoder

    done = export_encoder(arguments.model or SPRITES, arguments.output, arguments.format, arguments.dtype)
    error = "" if done.error is None else f", RMS error {done.error:.2g} of torch's float32"
    print(f"{done.folder}: {done.size / 2**20:,.1f} MiB{error}")
