"""Train a small model on pictures that people know: emoji on grounds, 32 px, from nothing, on a CPU.

    python examples/emoji/train.py --packages runs/emoji-packages --output runs/emoji

Phases that are done are skipped and a phase that was stopped goes on from its last checkpoint, so the same command
resumes. --only names phases to run, --steps shortens each of them, to try them out.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.append(
    str(Path(__file__).resolve().parents[1] / "sprites")
)  # base and kosmos: what both worlds share
from base import CaptionCollate, build_scheduler
from diffusers import AutoencoderKL, UNet2DConditionModel
from kosmos import build_text_encoder
from models import (
    CHANNELS,
    FACTOR,
    EmojiDiffusionStage,
    EmojiVaeStage,
    PictureCollate,
    build_clip_tokenizer,
    build_tokenizer,
    encode_latents,
    list_words,
    read_pictures,
)
from packages import load_subjects, split
from source import SIZE, EmojiSource
from transformers import CLIPTextModel

from kosmos_g_diffusers import KosmosGPipeline, KosmosGProcessor, KosmosGTextEncoder
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.data import AlignCollate, InstructCollate, MixtureDataset, PretrainCollate
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.training.checkpoints import checkpoint_folder, list_checkpoints
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.loop import train as train_or_stop
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

COMMON = {
    "mixed_precision": "bf16",
    "workers": 0,  # a worker would only share the core
    "log_every": 20,
    "save_every": 100,
    "keep_checkpoints": 1,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
}


class Run:
    """A run's folder, the subjects it trains on, and what all phases make of them.

    Args:
        folder: of the run.
        subjects: those to train on.
        steps, batch_size: of each phase, instead of its own.
        samples: pictures of the diffusion phase, whose latents are kept.
    """

    def __init__(self, folder, subjects, steps=None, samples=40_000, batch_size=None):
        self.folder, self.subjects, self.samples = Path(folder), subjects, samples
        self.steps, self.batch_size = steps, batch_size
        self.words = list_words(subjects)
        self.clip_tokenizer, self.tokenizer = build_clip_tokenizer(self.words), build_tokenizer(self.words)

    def source(self, kind, size=200_000, draws=True):
        return EmojiSource(kind, self.subjects, size, draws=draws)

    def train(self, phase, stage, sources, collate, weights=None, **settings):
        """As the library's; a run that was told to stop ends the program instead of going on to the next phase."""
        if self.steps:
            settings |= {"steps": self.steps, "warmup_steps": 0}
        if self.batch_size:
            settings["batch_size"] = self.batch_size
        config = TrainConfig(output=str(self.folder / phase), **COMMON, **settings)
        dataset = MixtureDataset(sources, collate, batch_size=config.batch_size, weights=weights)
        checkpoint = train_or_stop(config, stage, dataset)
        if checkpoint != checkpoint_folder(config.output, config.steps):
            sys.exit(143)

    def newest(self, phase):
        return list_checkpoints(self.folder / phase)[-1]

    def load_vae(self):
        return AutoencoderKL.from_pretrained(self.newest("vae") / "vae")

    def load_unet(self):
        return UNet2DConditionModel.from_pretrained(self.newest("diffusion") / "unet")

    def load_encoder(self, phase):
        return KosmosGTextEncoder.from_pretrained(self.newest(phase) / "text_encoder", dtype=torch.float32)


def train_vae(run):
    source = run.source("captions")
    stage = EmojiVaeStage(read_pictures(source, range(256)))
    run.train(
        "vae",
        stage,
        [source],
        PictureCollate(),
        steps=1500,
        batch_size=32,
        lr=2e-3,
        warmup_steps=100,
        weight_decay=0.0,
    )


def train_diffusion(run):
    vae, source = run.load_vae(), run.source("captions", run.samples)
    latents = encode_latents(vae, source, run.folder / "latents.safetensors")
    run.train(
        "diffusion",
        EmojiDiffusionStage(run.clip_tokenizer, build_scheduler()),
        [run.source("captions", run.samples, draws=False)],
        CaptionCollate(run.clip_tokenizer, latents, vae.config.scaling_factor),
        steps=5000,
        batch_size=40,
        lr=8e-4,
        warmup_steps=200,
        ema_decay=0.998,
    )


def train_pretrain(run):
    stage = PretrainStage(build_text_encoder(run.tokenizer), train_vision="all")
    collate = PretrainCollate(KosmosGProcessor(run.tokenizer))
    run.train(
        "pretrain",
        stage,
        [run.source("pictures")],
        collate,
        steps=2000,
        batch_size=32,
        lr=1.5e-3,
        warmup_steps=200,
        train_vision="all",
    )


def train_align(run):
    encoder = run.load_encoder("pretrain")
    target = CLIPTextModel.from_pretrained(run.newest("diffusion") / "text_encoder")
    stage = AlignStage(encoder, build_fresh(AlignerNetN, encoder.config, seed=1), target)
    collate = AlignCollate(KosmosGProcessor(run.tokenizer), run.clip_tokenizer, max_text_tokens=None)
    sources = [run.source("captions", draws=False)]
    run.train("align", stage, sources, collate, steps=1000, batch_size=64, lr=1e-3, warmup_steps=100)


def train_instruct(run):
    encoder, vae = run.load_encoder("align"), run.load_vae()
    # the whole vision tower: 700 subjects' names, which taught it in stage 1, say little of what others look like
    stage = InstructStage(encoder, run.load_unet(), vae, build_scheduler(), train_vision="all")
    collate = InstructCollate(
        KosmosGProcessor(run.tokenizer),
        SIZE,
        latent_channels=CHANNELS,
        vae_scale_factor=FACTOR,
        max_text_tokens=None,
        resize=False,
    )
    run.train(
        "instruct",
        stage,
        [run.source("compositions"), run.source("captions")],
        collate,
        weights=[5, 1],
        steps=4000,
        batch_size=32,
        lr=5e-4,
        warmup_steps=200,
        ema_decay=0.998,
        train_vision="all",
    )


def write_model(run):
    """`model`, a Kosmos-G pipeline."""
    partial, folder = run.folder / ".model.partial", run.folder / "model"
    for path in (partial, folder):
        shutil.rmtree(path, ignore_errors=True)
    KosmosGPipeline(
        vae=run.load_vae(),
        text_encoder=run.load_encoder("instruct").eval(),
        tokenizer=run.tokenizer,
        unet=run.load_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(partial)
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
    # a trial needs no more pictures than its steps read
    run = Run(arguments.output, subjects, arguments.steps, **({"samples": 1000} if arguments.steps else {}))
    for name in arguments.only:
        print(f"== {name}", flush=True)
        PHASES[name](run)


if __name__ == "__main__":
    main()
