"""The whole road at small size, each step rehearsed before it is made: data, stage 1, init, alignment, instruction tuning.

    python -m examples.road.road --output runs/road [--share 0.1]

Stage 1 makes a small multimodal language model of the sprites, saved as transformers saves Kosmos-2, whose place it takes; `init`
joins it with the small Stable Diffusion of examples/sprites; alignment reads captions alone; instruction tuning reads what
`kosmos-g data import` makes of OmniGen's JSON lines and of shards whose members have names of somebody else's. At the end a table
has what each rehearsal said next to what happened. A step that is done is skipped, so the same command resumes.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    XLMRobertaTokenizer,
)
from transformers.models.kosmos2.processing_kosmos2 import Kosmos2Processor

from kosmos_g_diffusers import KosmosGPipeline, KosmosGTextEncoder, KosmosGTokenizer, cli
from kosmos_g_diffusers.conversion import initialize
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.training import TrainConfig
from kosmos_g_diffusers.training.checkpoints import list_checkpoints
from kosmos_g_diffusers.training.rehearsal import describe, rehearse

from ..sprites.base import build_text_encoder, build_tokenizer

BASE = Path(__file__).parents[1] / "sprites" / "base_model"
SAMPLES = 2000  # of each kind of data
REHEARSALS = 3
COMMON = {"batch_size": 16, "workers": 1, "log_every": 1, "keep_checkpoints": 1, "max_text_tokens": 200}
STEPS = {"pretrain": 1000, "align": 400, "instruct": 400}
LEARNING = {
    "pretrain": {"lr": 1.5e-3, "train_vision": "all", "warmup_steps": 50},
    "align": {"lr": 1e-3, "warmup_steps": 20},
    "instruct": {"lr": 5e-4, "warmup_steps": 20},
}
SPECIAL = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]


def write_data(folder):
    """Data as others store it: folders of images with text files, JSON lines, shards. Returns (lines to train on, name -> line to import)."""
    for name, kind in (("seen", "pictures"), ("captioned", "captions")):
        if not (folder / name).is_dir():
            partial = folder / f".{name}"
            partial.mkdir(parents=True, exist_ok=True)
            source = SpriteSource(kind, SAMPLES)
            for number in range(SAMPLES):
                sample = source.read(number, random.Random(number))
                image = sample.target or next(part for part in sample.prompt if not isinstance(part, str))
                words = sample.caption or " ".join(part for part in sample.prompt if isinstance(part, str))
                image.save(partial / f"{number:05d}.png")
                (partial / f"{number:05d}.txt").write_text(words.strip(), encoding="utf-8")
            partial.rename(folder / name)
    _write_compositions(folder / "compositions")
    _write_edits(folder / "edits-000000.tar")
    rows, root = folder / "compositions" / "rows.jsonl", folder / "compositions"
    theirs = {
        "compositions": f"datasets:json?data_files={rows}&root={root}&prompt=instruction&images=input_images&image=output_image",
        "edits": f"shards:{folder / 'edits-000000.tar'}?source=original_image.png&image=edited_image.png&edit=edit_prompt.txt",
    }
    return {"pretrain": [f"folder:{folder / 'seen'}"], "align": [f"folder:{folder / 'captioned'}"]}, theirs


def _write_compositions(folder):
    """Prompts with images at their marks, as OmniGen's JSON lines have them."""
    if folder.is_dir():
        return
    partial, source = folder.with_name(f".{folder.name}"), SpriteSource("compositions", SAMPLES)
    partial.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(SAMPLES):
        sample, words, images = source.read(number, random.Random(number)), [], []
        for part in sample.prompt:
            if not isinstance(part, str):
                images.append(f"{number:05d}-{len(images)}.png")
                part.save(partial / images[-1])
            words.append(part if isinstance(part, str) else f"<img><|image_{len(images)}|></img>")
        sample.target.save(partial / f"{number:05d}.png")
        row = {"task_type": "subject", "instruction": " ".join(words), "input_images": images}
        rows.append(json.dumps(row | {"output_image": f"{number:05d}.png"}))
    (partial / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    partial.rename(folder)


def _write_edits(shard):
    """Edits in a shard whose members are named as InstructPix2Pix's columns are."""
    if shard.is_file():
        return
    source, partial = SpriteSource("edits", SAMPLES), shard.with_suffix(".part")
    with tarfile.open(partial, "w") as tar:
        for number in range(SAMPLES):
            sample = source.read(number, random.Random(number))
            image = next(part for part in sample.prompt if not isinstance(part, str))
            words = " ".join(part.strip() for part in sample.prompt if isinstance(part, str))
            members = {"original_image.png": _png(image), "edited_image.png": _png(sample.target)}
            for name, content in {**members, "edit_prompt.txt": words.encode()}.items():
                member = tarfile.TarInfo(f"{number:05d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    partial.rename(shard)


def import_data(theirs, folder):
    """The lines of shards that `kosmos-g data import` makes of others' data; it continues what was stopped."""
    lines = []
    for name, line in theirs.items():
        flags = [line, "--output", str(folder / name), "--workers", "0", "--sheet-samples", "9"]
        if cli.main(["data", "import", *flags]):
            raise SystemExit(f"{line} cannot be imported.")
        lines.append(f"shards:{folder / name}")
    return lines


def _run(*command):
    """Peak memory in bytes of a Python process; SystemExit if it fails."""
    child = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"It ended with {os.waitstatus_to_exitcode(status)}; the same command resumes.")
    return 1024 * usage.ru_maxrss


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def build_untrained(folder):
    """A pipeline folder whose encoder knows nothing, from which stage 1 starts."""
    if not folder.is_dir():
        tokenizer = build_tokenizer()
        pipe = KosmosGPipeline(
            vae=AutoencoderKL.from_pretrained(BASE / "vae"),
            text_encoder=build_text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_pretrained(BASE / "unet"),
            scheduler=DDIMScheduler.from_pretrained(BASE / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(folder)
    return folder


def save_as_kosmos_2(checkpoint, folder):
    """The language model of a checkpoint of stage 1, as transformers saves Kosmos-2: what `init` reads."""
    encoder = KosmosGTextEncoder.from_pretrained(checkpoint, subfolder="text_encoder")
    ours = KosmosGTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
    config, first = encoder.config, len(SPECIAL)
    last = ours.convert_tokens_to_ids("<mask>") if "<mask>" in ours.get_vocab() else len(ours)
    pieces = sorted(ours.get_vocab().items(), key=lambda pair: pair[1])
    pieces = [(piece, -2.0 if len(piece) > 2 else -9.0) for piece, index in pieces if first <= index < last]
    tokenizer = XLMRobertaTokenizer(vocab=[*SPECIAL, *pieces, ("<mask>", 0.0)])
    side = config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    Kosmos2Processor(images, tokenizer, num_patch_index_tokens=16).save_pretrained(folder)
    text_config = config.text_config.to_dict() | {"vocab_size": len(tokenizer)}
    kosmos = Kosmos2ForConditionalGeneration(
        Kosmos2Config(
            text_config=text_config,
            vision_config=config.vision_config.to_dict(),
            latent_query_num=config.latent_query_num,
        )
    )
    weights = {
        name.replace("language_model.", "text_model.", 1): tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("aligner.")
    }
    embedding = torch.zeros(
        len(tokenizer), config.text_config.embed_dim
    )  # grounding tokens, which init leaves out
    embedding[: len(ours)] = weights["text_model.model.embed_tokens.weight"]
    weights |= {"text_model.model.embed_tokens.weight": embedding, "text_model.lm_head.weight": embedding}
    kosmos.load_state_dict(weights, strict=True)
    kosmos.save_pretrained(folder)
    return folder


def make_step(stage, model, data, output, share):
    """Rehearse and make a stage; returns its last checkpoint and a row of the table."""
    steps = max(20, round(STEPS[stage] * share))
    values = {**COMMON, **LEARNING[stage], "steps": steps, "save_every": max(10, steps // 4)}
    values["warmup_steps"] = min(values["warmup_steps"], steps // 5)
    values |= {"model": str(model), "data": data, "output": str(output / stage)}
    config, report = TrainConfig.from_dict(values, stage).replace(stage=stage), output / f"{stage}.json"
    if report.is_file():
        return list_checkpoints(output / stage)[-1], json.loads(report.read_text(encoding="utf-8"))
    found = [rehearse(stage, config) for _ in range(REHEARSALS)]
    print(describe(found[0]), flush=True)
    config.save(output / "settings.json")
    times = output / f"{stage}-times.jsonl"
    peak = _run("-m", "examples.road.timed_run", str(output / "settings.json"), str(times))
    steps = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    row = {
        "stage": stage,
        "rehearsed_seconds": [rehearsal.step_seconds for rehearsal in found],
        "seconds": statistics.median(step["seconds"] for step in steps),
        "rehearsed_cpu_seconds": [rehearsal.figures["step_cpu_seconds"] for rehearsal in found],
        "cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps),
        "rehearsed_peak": [rehearsal.figures["peak"] for rehearsal in found],
        "peak": peak,
    }
    report.write_text(json.dumps(row), encoding="utf-8")
    return list_checkpoints(output / stage)[-1], row


def print_table(rows):
    """Of each stage three kinds of figures: the median of the rehearsals (lowest to highest), what happened, and their ratio."""
    kinds = {
        "seconds": ("s a step", 1.0),
        "cpu_seconds": ("CPU s a step", 1.0),
        "peak": ("GiB at most", 2**30),
    }
    heads = ["stage"]
    for head, _ in kinds.values():
        heads += [f"{head}, rehearsed", head, "ratio"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        cells = [row["stage"]]
        for name, (_, unit) in kinds.items():
            found, true = [value / unit for value in row[f"rehearsed_{name}"]], row[name] / unit
            middle = statistics.median(found)
            spread = f"{middle:.3g} ({min(found):.3g} to {max(found):.3g})"
            cells += [spread, f"{true:.3g}", f"{middle / true:.2f}"]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description="The whole road at small size.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps (default: 1)")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    data, theirs = write_data(output / "data")
    data["instruct"], rows = import_data(theirs, output / "imported"), []
    checkpoint, row = make_step(
        "pretrain", build_untrained(output / "untrained"), data["pretrain"], output, arguments.share
    )
    rows.append(row)
    if not (output / "fresh").is_dir():
        mllm = save_as_kosmos_2(checkpoint, output / "mllm")
        initialize(mllm, BASE, output / "fresh", aligner_layers=3)
    model = output / "fresh"
    for stage in ("align", "instruct"):
        model, row = make_step(stage, model, data[stage], output, arguments.share)
        rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    main()
