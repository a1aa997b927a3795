"""Train a small model on images that people know: emoji on grounds, 32 px, from nothing, on a CPU.

    python -m examples.emoji.train --packages runs/emoji-packages --output runs/emoji

Phases that are done are skipped and a phase that was stopped continues from its last checkpoint, so the same command
resumes. --only names phases to run, --steps shortens each of them, to try them out.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch

from kosmos_g_diffusers import KosmosGProcessor
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.data import AlignCollate, InstructCollate, PretrainCollate
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

from ..sprites.base import (
    FACTOR,
    CaptionCollate,
    DiffusionStage,
    ImageCollate,
    VaeStage,
    build_clip_tokenizer,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_vae,
    encode_latents,
    load_clip,
    load_encoder,
    load_unet,
    load_vae,
    read_images,
    train,
)
from .models import CHANNELS, UNET, VAE, list_words
from .packages import load_subjects, split
from .source import SIZE, EmojiSource


class Run:
    """A run's folder, the subjects it trains on, and what all phases make of them.

    Args:
        folder: of the run.
        subjects: those to train on.
        steps, batch_size: of each phase, instead of its own.
        samples: images of the diffusion phase, whose latents are kept.
    """

    def __init__(self, folder, subjects, steps=None, samples=40_000, batch_size=None):
        self.folder, self.subjects, self.samples = Path(folder), subjects, samples
        self.steps, self.batch_size = steps, batch_size
        words = list_words(subjects)
        self.clip_tokenizer, self.tokenizer = build_clip_tokenizer(words), build_tokenizer(words, None)

    def source(self, kind, size=200_000, draws=True):
        return EmojiSource(kind, self.subjects, size, draws=draws)

    def train(self, phase, stage, sources, collate, weights=None, **settings):
        if self.steps:
            settings |= {"steps": self.steps, "warmup_steps": 0}
        if self.batch_size:
            settings["batch_size"] = self.batch_size
        # no workers: one would only share the core
        train(self.folder / phase, stage, sources, collate, weights, workers=0, **settings)


def train_vae(run):
    source = run.source("captions")
    stage = VaeStage(build_vae(**VAE), read_images(source, range(256)))
    settings = {"steps": 1500, "batch_size": 32, "lr": 2e-3, "warmup_steps": 100, "weight_decay": 0.0}
    run.train("vae", stage, [source], ImageCollate(CHANNELS), **settings)


def train_diffusion(run):
    vae, source = load_vae(run.folder), run.source("captions", run.samples)
    latents = encode_latents(vae, source, run.folder / "latents.safetensors")
    stage = DiffusionStage(run.clip_tokenizer, build_scheduler(), UNET)
    sources = [run.source("captions", run.samples, draws=False)]
    collate = CaptionCollate(run.clip_tokenizer, latents, vae.config.scaling_factor)
    settings = {"steps": 5000, "batch_size": 40, "lr": 8e-4, "warmup_steps": 200, "ema_decay": 0.998}
    run.train("diffusion", stage, sources, collate, **settings)


def train_pretrain(run):
    stage = PretrainStage(build_text_encoder(run.tokenizer), train_vision="all")
    collate = PretrainCollate(KosmosGProcessor(run.tokenizer))
    settings = {"steps": 2000, "batch_size": 32, "lr": 1.5e-3, "warmup_steps": 200, "train_vision": "all"}
    run.train("pretrain", stage, [run.source("pictures")], collate, **settings)


def train_align(run):
    encoder = load_encoder(run.folder / "pretrain")
    stage = AlignStage(encoder, build_fresh(AlignerNetN, encoder.config, seed=1), load_clip(run.folder))
    collate = AlignCollate(KosmosGProcessor(run.tokenizer), run.clip_tokenizer, max_text_tokens=None)
    settings = {"steps": 1000, "batch_size": 64, "lr": 1e-3, "warmup_steps": 100}
    run.train("align", stage, [run.source("captions", draws=False)], collate, **settings)


def train_instruct(run):
    encoder, unet, vae = load_encoder(run.folder / "align"), load_unet(run.folder), load_vae(run.folder)
    # the whole vision tower: 700 subjects' names, which taught it in stage 1, say little of what others look like
    stage = InstructStage(encoder, unet, vae, build_scheduler(), train_vision="all")
    sizes = {"latent_channels": CHANNELS, "vae_scale_factor": FACTOR, "max_text_tokens": None}
    collate = InstructCollate(KosmosGProcessor(run.tokenizer), SIZE, resize=False, **sizes)
    sources, weights = [run.source("compositions"), run.source("captions")], [5, 1]
    settings = {"steps": 4000, "batch_size": 32, "lr": 5e-4, "warmup_steps": 200, "ema_decay": 0.998}
    run.train("instruct", stage, sources, collate, weights, train_vision="all", **settings)


def write_model(run):
    """`model`, a Kosmos-G pipeline."""
    partial, folder = run.folder / ".model.partial", run.folder / "model"
    for path in (partial, folder):
        shutil.rmtree(path, ignore_errors=True)
    build_pipeline(run.folder, load_encoder(run.folder / "instruct"), run.tokenizer).save_pretrained(partial)
    partial.rename(folder)


PHASES = {
    "vae": train_vae,
    "diffusion": train_diffusion,
    "pretrain": train_pretrain,
    "align": train_align,
    "instruct": train_instruct,
    "model": write_model,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, default=Path("runs/emoji-packages"), help="folder of the tarballs"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--steps", type=int, help="of every phase, to try them out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    subjects, _ = split(load_subjects(arguments.packages))
    # a trial needs no more images than its steps read
    run = Run(arguments.output, subjects, arguments.steps, **({"samples": 1000} if arguments.steps else {}))
    for name in arguments.only:
        print(f"== {name}", flush=True)
        PHASES[name](run)


if __name__ == "__main__":
    main()
