"""Memory that converting an official checkpoint of the released size takes, over the size of its file:

    python benchmarks/converting.py

Writes a checkpoint of random weights under the official names into a temporary folder (5.3 GiB in half precision, as
much again for what it becomes) and converts it in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from parts.arguments import parse
from parts.measure import PeakMemory, gib, memory, now, report, significant
from parts.models import (
    DTYPES,
    SCHEDULER,
    build_at_random,
    build_text_encoder,
    build_tiny,
    build_tokenizer,
    build_unet,
    build_vae,
)
from transformers import CLIPTextConfig, CLIPTextModel

from kosmos_g_diffusers import KosmosGTextEncoderConfig, convert_checkpoint
from kosmos_g_diffusers.conversion.keys import EMBEDDING, KEY_MAP, TIED, official_name
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN

FIELDS = {"resident": "VmRSS", "anonymous": "RssAnon"}
# the target of the alignment loss, which checkpoints of that stage hold and the conversion leaves behind
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def write(folder, stage, dtype, tiny):
    """Write what a conversion reads: checkpoint.pt, base/ and tokenizer/; the bytes of the checkpoint."""
    if tiny:
        pipe = build_tiny(dtype)
        parts, tokenizer = (
            {name: getattr(pipe, name) for name in ("text_encoder", "unet", "vae")},
            pipe.tokenizer,
        )
    else:
        parts = {
            "text_encoder": build_text_encoder(dtype),
            "unet": build_unet(dtype),
            "vae": build_vae(dtype),
        }
        tokenizer = build_tokenizer()
    parts["text_encoder"].config.save_pretrained(folder / "config")
    tokenizer.save_pretrained(folder / "tokenizer")
    DPMSolverMultistepScheduler(**SCHEDULER).save_pretrained(folder / "base" / "scheduler")
    for name in ("unet", "vae"):
        if stage == "final":
            parts[name].save_config(folder / "base" / name)
        else:  # in float32, as Stable Diffusion 1.5 is published
            parts[name].float().save_pretrained(folder / "base" / name)
    weights = {name: part.state_dict() for name, part in parts.items()}
    if stage == "align":
        del weights["unet"], weights["vae"]
        with torch.device("meta"):
            aligner_n = AlignerNetN(parts["text_encoder"].config).state_dict()
        weights["aligner_n"] = {
            name: torch.empty(empty.shape, dtype=dtype).normal_(0, 0.02) for name, empty in aligner_n.items()
        }
    model = {
        official_name(ours, KEY_MAP[part]): tensor
        for part, tensors in weights.items()
        for ours, tensor in tensors.items()
    }
    model[TIED] = model[EMBEDDING]
    if stage == "align" and not tiny:
        clip = build_at_random(lambda: CLIPTextModel(CLIPTextConfig(**CLIP)), dtype)
        model |= {f"aligner.clip_encoder.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save({"args": argparse.Namespace(), "model": model}, folder / "checkpoint.pt")


def convert(folder, dtype):
    """Convert in this process; print the figures as JSON."""
    before = {kind: memory(field) for kind, field in FIELDS.items()}
    start = now()
    with PeakMemory() as peak:
        convert_checkpoint(
            folder / "checkpoint.pt",
            folder / "converted",
            tokenizer=folder / "tokenizer",
            base=folder / "base",
            config=KosmosGTextEncoderConfig.from_pretrained(folder / "config"),
            dtype=dtype,
        )
    figures = {
        "seconds": now() - start,
        "checkpoint": (folder / "checkpoint.pt").stat().st_size,
        "before": before,
        "peak": {kind: getattr(peak, kind) for kind in FIELDS},
    }
    print(json.dumps(figures))


def main():
    parser = argparse.ArgumentParser(description="Peak memory of convert_checkpoint.")
    parser.add_argument(
        "--stage", choices=("final", "align"), default="final", help="of the checkpoint (default: final)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the checkpoint (default: float16)"
    )
    parser.add_argument("--to", choices=DTYPES, help="dtype of the folder (default: the checkpoint's)")
    parser.add_argument(
        "--folder", type=Path, help="where the temporary folder is made (default: the system's)"
    )
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)  # the folder, in the fresh process
    arguments = parse(parser)
    if arguments.convert is not None:
        return convert(arguments.convert, arguments.to)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write(Path(folder), arguments.stage, DTYPES[arguments.dtype], arguments.tiny)
        command = [sys.executable, __file__, "--convert", folder]
        command += ["--to", arguments.to] if arguments.to else []
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    rows = [
        [
            kind,
            gib(found["checkpoint"]),
            gib(found["before"][kind]),
            gib(found["peak"][kind]),
            f"{found['peak'][kind] / found['checkpoint']:.2f}",
            f"{(found['peak'][kind] - found['before'][kind]) / found['checkpoint']:.2f}",
        ]
        for kind in FIELDS
    ]
    title = (
        f"Converting a {arguments.dtype} checkpoint of the {arguments.stage} stage to "
        f"{arguments.to or arguments.dtype}, {significant(found['seconds'])} s"
    )
    columns = ["memory", "checkpoint", "imports", "peak", "over the checkpoint", "without the imports"]
    report(title, columns, rows, found, arguments.json)


if __name__ == "__main__":
    main()
