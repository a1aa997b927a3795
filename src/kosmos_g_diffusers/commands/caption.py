"""Say what images show, or answer a question about them, with the multimodal language model alone.

The prompt is what the model continues; it was trained on text, not on instructions: "An image of" asks for a caption,
"Question: ... Answer:" for an answer. Each image stands in front of the prompt, and gets an answer of its own. With <i>
marks in the prompt, all images belong to one prompt and stand where the marks are.

examples:
  kosmos-g caption photo.png --model ./kosmos-g
  kosmos-g caption photo.png --prompt "Question: what is on the table? Answer:" --model ./kosmos-g
  kosmos-g caption one.png two.png --prompt "<i> <i> Question: which is older? Answer:" --model ./kosmos-g
"""

import argparse
import sys

from ..captioning import MAX_NEW_TOKENS
from ..environment import DTYPES, as_dtype, check_device, default_device, default_dtype
from ..files import check_output_file, write_text
from ..sprites.pretrained import SPRITES, SPRITES_NOTE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="path or URL")
    add("--prompt", metavar="TEXT", help="(default: one that asks for a caption)")
    add("--output", metavar="FILE", help="text file to write as well, with the same lines")
    add("--force", action="store_true", help="overwrite the file if it is there")
    add("--model", metavar="MODEL", help="folder or Hub id (default: the small model that ships, of sprites)")
    longest = f"longest answer (default: {MAX_NEW_TOKENS})"
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=longest)
    beams = "answers pursued at once (default: 1, the likeliest word)"
    add("--num-beams", type=int, default=1, metavar="N", help=beams)
    add("--dtype", choices=DTYPES, help="of the weights (default: float32 on the CPU, else float16)")
    add("--device", help="cpu, cuda, mps, ... (default: an accelerator if there is one)")


def run(arguments: argparse.Namespace) -> None:
    from ..captioning import load_answerer
    from ..processing_kosmos_g import CAPTION_PROMPT, IMAGE_MARK

    device = arguments.device or default_device()
    check_device(device)
    if arguments.num_beams < 1:
        raise ValueError(f"--num-beams is {arguments.num_beams}; expected 1 or more.")
    output = arguments.output
    if output is not None:
        output = check_output_file(output, arguments.force)
    dtype = as_dtype(arguments.dtype or default_dtype(device))
    answer = load_answerer(arguments.model or SPRITES, dtype, device)
    prompt = CAPTION_PROMPT if arguments.prompt is None else arguments.prompt
    groups = [arguments.images]
    if IMAGE_MARK not in prompt:
        prompt, groups = f"{IMAGE_MARK} {prompt}", [[image] for image in arguments.images]
    options = {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams}
    lines = []
    for group in groups:
        text = answer(prompt, group, **options)
        lines.append(text if len(groups) == 1 else f"{group[0]}: {text}")
        print(lines[-1])
    if output is not None:
        write_text(output, "".join(f"{line}\n" for line in lines))
    if arguments.model is None:
        print(SPRITES_NOTE, file=sys.stderr)
