"""The text encoder on small machines: size on disk, resident memory, time and error of each form that it can have, on the CPU:

    python benchmarks/portable.py                # the released size: 40 GB of disk, 20 GB of memory
    python benchmarks/portable.py --layers 2     # its widths, with 2 layers of each kind (of 24, 24 and 12): minutes

One prompt of two photos, random weights. Every form runs in a process of its own; its time is compared with that of torch in the
faster of float32 and bfloat16, in turns, one encoding each, so that a change of the machine's load meets both. Resident memory is
that of the process, with the libraries that it imported. The error is the RMS of the difference to float32 in torch over the RMS of
its condition. A form whose package is not installed is left out, and that is said. `--image` adds what the rest of an image of 512 x 512
takes, by torch in the same dtype: a step of the U-Net of Stable Diffusion 1.5 with guidance, and its VAE's decoder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from parts.arguments import parse
from parts.measure import gib, report, significant, spread, time_in_turns
from parts.models import PHOTOS, build_at_random, build_tiny, build_tokenizer, build_unet, build_vae
from PIL import Image

from kosmos_g_diffusers import SPRITES, KosmosGProcessor, KosmosGTextEncoder, KosmosGTextEncoderConfig
from kosmos_g_diffusers.captioning import load_reader
from kosmos_g_diffusers.export import export_encoder

PROMPT = "<i> in the style of <i>"
SPRITES_PROMPT = "<i> and <i>"
# name -> (kind of parts/encoding.py, format and dtype of an exported folder)
FORMS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8, torch": ("int8", None),
    "int4, torch": ("int4", None),
    "onnx": ("exported", ("onnx", "float32")),
    "onnx, int8": ("exported", ("onnx", "int8")),
    "openvino": ("exported", ("openvino", "float32")),
    "openvino, int8": ("exported", ("openvino", "int8")),
}


class Child:
    """A process that has loaded one form; RuntimeError with its last words if it cannot."""

    def __init__(self, kind, folder, inputs, threads, environment):
        command = [
            sys.executable,
            Path(__file__).parent / "parts" / "encoding.py",
            kind,
            folder,
            inputs,
            threads,
        ]
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.communicate()[1].strip().splitlines()[-1][:200])
        self.told = json.loads(line)
        self.condition = np.load(self.told["condition"])

    def encode(self):
        """Seconds of one encoding."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.communicate()


def build_folder(folder, arguments):
    """Write text encoder (float32, and a folder in bfloat16) and tokenizer, and the inputs; returns their file."""
    prompt, photos = PROMPT, [Image.open(path) for path in PHOTOS]
    if arguments.model:
        prompt = SPRITES_PROMPT if arguments.model == str(SPRITES) else PROMPT
        encoder, tokenizer = load_reader(arguments.model, torch.float32)
    elif arguments.tiny:
        pipe = build_tiny(torch.float32)
        encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    else:
        n = arguments.layers
        config = KosmosGTextEncoderConfig(
            text_config={"layers": n}, vision_config={"num_hidden_layers": n}, aligner_layers=-(-n // 2)
        )
        encoder = build_at_random(lambda: KosmosGTextEncoder(config), torch.float32)
        tokenizer = build_tokenizer(PROMPT.split())
    inputs = KosmosGProcessor(tokenizer)([prompt], [photos])
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    for dtype in ("float32", "bfloat16"):
        encoder.to(getattr(torch, dtype)).save_pretrained(folder / dtype / "text_encoder")
        tokenizer.save_pretrained(folder / dtype / "tokenizer")
    return folder / "inputs.npz"


def size_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@torch.no_grad()
def time_drawing(dtype, rounds, tiny):
    """Seconds of each of the two stages that draw, of random weights."""
    unet, vae = (
        (build_tiny(dtype).unet, build_tiny(dtype).vae) if tiny else (build_unet(dtype), build_vae(dtype))
    )
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents, states = torch.randn(2, 4, side, side, dtype=dtype), torch.randn(2, 77, width, dtype=dtype)
    stages = {
        "U-Net, a step with guidance": lambda: unet(latents, 500, encoder_hidden_states=states),
        "VAE decoder": lambda: vae.decode(latents[:1]),
    }
    return time_in_turns(stages, rounds)


def main():
    parser = argparse.ArgumentParser(
        description="Size, memory, time and error of each form of the text encoder."
    )
    parser.add_argument(
        "--layers", type=int, default=24, help="of language model and vision tower (default: 24)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="encodings of each form (default: 5)")
    parser.add_argument("--model", help="folder of a trained model in the place of random weights")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="leave others out")
    parser.add_argument("--image", action="store_true", help="time a step of the U-Net and the VAE as well")
    parser.add_argument("--steps", type=int, default=20, help="of the image of --image (default: 20)")
    arguments = parse(parser)
    threads = torch.get_num_threads()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if arguments.cpu_time:
        environment["CPU_TIME"] = "1"
    rows, figures, left_out = [], {}, {}

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        inputs = build_folder(place, arguments)
        folders = {}
        for name in arguments.forms:
            kind, exported = FORMS[name]
            folders[name] = place / (kind if kind in ("float32", "bfloat16") else "float32")
            try:
                if exported:
                    folders[name] = place / "-".join(exported)
                    export_encoder(place / "float32", folders[name], *exported)
            except ImportError as error:
                left_out[name] = str(error)

        def start(name):
            return Child(FORMS[name][0], folders[name], inputs, threads, environment)

        with start("float32") as one, start("bfloat16") as two:
            expected = one.condition
            seconds = [(one.encode(), two.encode()) for _ in range(arguments.rounds)]
        faster = ("float32", "bfloat16")[statistics.median(a / b for a, b in seconds) > 1]
        with start(faster) as fastest:
            for name in arguments.forms:
                if name in left_out:
                    continue
                try:
                    child = start(name)
                except RuntimeError as error:
                    left_out[name] = str(error)
                    continue
                with child:
                    pairs = [(child.encode(), fastest.encode()) for _ in range(arguments.rounds)]
                ratios = [own / other for own, other in pairs]
                kind = FORMS[name][0]
                saved = folders[name] if kind == "exported" else folders[name] / "text_encoder"
                if kind in ("int8", "int4"):
                    saved = folders[name] / f"text_encoder-{kind}"
                error = np.sqrt(np.square(child.condition - expected).mean() / np.square(expected).mean())
                figures[name] = {
                    "bytes": size_of(saved),
                    "resident": child.told["resident"],
                    "peak": child.told["peak"],
                    "seconds": [own for own, _ in pairs],
                    "ratios": ratios,
                    "error": float(error),
                }
                rows.append(
                    [
                        name,
                        gib(size_of(saved)),
                        gib(child.told["resident"]),
                        significant(statistics.median(own for own, _ in pairs)),
                        spread(ratios),
                        f"{error:.1e}",
                    ]
                )
    if arguments.image:
        drawing = time_drawing(getattr(torch, faster), arguments.rounds, arguments.tiny)
        figures["drawing"] = drawing
        medians = {stage: statistics.median(seconds) for stage, seconds in drawing.items()}
        rows += [
            [f"{stage}, {faster}", "", "", significant(value), "", ""] for stage, value in medians.items()
        ]
        step, decoder = medians.values()
        for name in [name for name in FORMS if name in figures]:
            whole = statistics.median(figures[name]["seconds"]) + arguments.steps * step + decoder
            rows.append([f"image of {arguments.steps} steps, {name}", "", "", significant(whole), "", ""])
    of = f"{arguments.layers} layers" if not (arguments.tiny or arguments.model) else "the model"
    title = f"Text encoder of {of}, one prompt of two photos; torch is faster in {faster}, which is 1."
    if left_out:
        title += " Left out: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    columns = ["form", "on disk", "resident", "seconds", "time / torch's faster dtype", "RMS error"]
    report(title, columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
