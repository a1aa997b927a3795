"""Turn an official Kosmos-G checkpoint into a folder that diffusers loads.

The checkpoint is read as data: nothing in it runs. The folder appears when it is complete. One of stage 1 gets a new
AlignerNet, as kosmos-g init makes it, for kosmos-g train align.

examples:
  kosmos-g convert --checkpoint checkpoint_final.pt --tokenizer sentencepiece.bpe.model \\
      --base stable-diffusion-v1-5/stable-diffusion-v1-5 --output ./kosmos-g --dtype float16

then, in Python:
  pipe = KosmosGPipeline.from_pretrained("./kosmos-g", dtype=torch.float16).to("cuda")
  pipe("<i> in the suit of <i>", images=[dog, ironman]).images[0].save("out.png")
"""

import argparse

from ..environment import DTYPES, as_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="official .pt file of any stage")
    add("--tokenizer", required=True, metavar="FILE", help="official sentencepiece.bpe.model")
    base = "folder or Hub id of Stable Diffusion 1.5, for what the file lacks"
    add("--base", required=True, metavar="MODEL", help=base)
    add("--output", required=True, metavar="FOLDER", help="folder to write, new or empty")
    add("--seed", type=int, default=0, metavar="N", help="of the new AlignerNet of stage 1 (default: 0)")
    add("--dtype", choices=DTYPES, help="of the weights written (default: as in the checkpoint)")


def run(arguments: argparse.Namespace) -> None:
    from ..conversion import convert_checkpoint

    folder = convert_checkpoint(
        arguments.checkpoint,
        arguments.output,
        tokenizer=arguments.tokenizer,
        base=arguments.base,
        dtype=arguments.dtype and as_dtype(arguments.dtype),
        seed=arguments.seed,
    )
    print(folder)
