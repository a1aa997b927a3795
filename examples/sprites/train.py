"""Train the small model that ships with the package, from nothing, on two CPU cores.

    python examples/sprites/train.py --output runs/sprites

A first model of scenes of one and two sprites, then, from its weights on, the wide one: scenes of one to four in any places, and
drawings and words as other people make them. Two phases run side by side where they do not need each other. Phases that are done are skipped and one that was stopped
continues from its last checkpoint, so the same command resumes. --only names phases to run, one after the other.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from base import (
    CaptionCollate,
    DiffusionStage,
    ImageCollate,
    TypedCollate,
    VaeStage,
    build_clip_tokenizer,
    build_instruct_mixture,
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
    newest,
    read_images,
    train,
)
from controlnet import ControlNetStage, EdgesCollate
from diffusers import ControlNetModel
from lanes import run_lanes

from kosmos_g_diffusers import SPRITES, KosmosGProcessor
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.data import AlignCollate, InstructCollate, PretrainCollate, add_share
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.world import IMAGE_SIZE
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

WIDE = "diffusion-wide"  # phase of the text encoder that is aligned to
LONG = "diffusion-long"  # phase of the U-Net that ships


def train_vae(run):
    source = SpriteSource("captions")
    stage = VaeStage(build_vae(), read_images(source, range(256)))
    settings = {"steps": 2000, "batch_size": 24, "lr": 2e-3, "warmup_steps": 100, "weight_decay": 0.0}
    train(run / "vae", stage, [source], ImageCollate(), **settings)


def train_diffusion(run):
    vae, source = load_vae(run), SpriteSource("captions")
    latents = encode_latents(vae, source, run / "latents.safetensors")
    stage = DiffusionStage(build_clip_tokenizer(), build_scheduler())
    collate = CaptionCollate(stage.tokenizer, latents, vae.config.scaling_factor)
    settings = {"steps": 3500, "batch_size": 64, "lr": 8e-4, "warmup_steps": 150, "ema_decay": 0.998}
    train(run / "diffusion", stage, [source], collate, **settings)


def train_diffusion_wide(run):
    """Continues with scenes of one to four sprites in any places, and captions that leave parts out."""
    vae, source = load_vae(run), SpriteSource("captions", wide=True)
    latents = encode_latents(vae, source, run / "latents-wide.safetensors")
    tokenizer = build_clip_tokenizer()
    stage = DiffusionStage(tokenizer, build_scheduler(), load_unet(run), load_clip(run))
    collate = CaptionCollate(tokenizer, latents, vae.config.scaling_factor)
    settings = {"steps": 4500, "batch_size": 64, "lr": 6e-4, "warmup_steps": 150, "ema_decay": 0.998}
    train(run / WIDE, stage, [source], collate, **settings)


def train_diffusion_long(run):
    """Continues with the U-Net alone, so that what is aligned to the text encoder stays so, and for how many sprites stand where."""
    vae, source = load_vae(run), SpriteSource("captions", wide=True)
    latents = encode_latents(vae, source, run / "latents-wide.safetensors")
    tokenizer, clip = build_clip_tokenizer(), load_clip(run, WIDE).requires_grad_(False)
    stage = DiffusionStage(tokenizer, build_scheduler(), load_unet(run, WIDE), clip)
    collate = CaptionCollate(tokenizer, latents, vae.config.scaling_factor, noisier_share=0.5)
    settings = {"steps": 8000, "batch_size": 64, "lr": 7e-4, "warmup_steps": 150, "ema_decay": 0.999}
    train(run / LONG, stage, [source], collate, **settings)


def train_pretrain(run):
    train_to_caption(
        run / "pretrain",
        build_text_encoder(build_tokenizer()),
        [SpriteSource("pictures", 400_000)],
        4000,
        1.5e-3,
    )


def train_pretrain_varied(run):
    """Continues with captions that are harder to guess, which from the beginning teach shapes slowly."""
    encoder = load_encoder(run / "pretrain")
    train_to_caption(
        run / "pretrain-varied", encoder, [SpriteSource("varied pictures", 400_000)], 8000, 1.2e-3
    )


def train_pretrain_wide(run):
    """From the first model on: drawings as others make them, up to four sprites, and what `kosmos-g caption` asks."""
    sources = [SpriteSource("varied pictures", 400_000, wide=True), SpriteSource("asked pictures", 400_000)]
    train_to_caption(run / "pretrain-wide", load_encoder(run / "instruct-asked"), sources, 6000, 1e-3, [5, 1])


def train_to_caption(output, encoder, sources, steps, lr, weights=None):
    stage, collate = (
        PretrainStage(encoder, train_vision="all"),
        PretrainCollate(KosmosGProcessor(build_tokenizer())),
    )
    settings = {"steps": steps, "batch_size": 64, "lr": lr, "warmup_steps": 200, "train_vision": "all"}
    train(output, stage, sources, collate, weights, **settings)


def train_align(run):
    collate = AlignCollate(KosmosGProcessor(build_tokenizer()), build_clip_tokenizer(), max_text_tokens=None)
    train_to_align(run / "align", load_encoder(run / "pretrain-varied"), load_clip(run), collate, 900)


def train_align_wide(run):
    """Words as people type them, to the conditions of the captions that say the same."""
    collate = TypedCollate(KosmosGProcessor(build_tokenizer()), build_clip_tokenizer(), max_text_tokens=None)
    train_to_align(
        run / "align-wide",
        load_encoder(run / "pretrain-wide"),
        load_clip(run, WIDE),
        collate,
        900,
        wide=True,
    )


def train_to_align(output, encoder, clip, collate, steps, wide=False):
    stage = AlignStage(encoder, build_fresh(AlignerNetN, encoder.config, seed=1), clip)
    settings = {"steps": steps, "batch_size": 128, "lr": 1e-3, "warmup_steps": 100}
    train(output, stage, [SpriteSource("captions", wide=wide)], collate, **settings)


def train_instruct(run):
    # 5,000 steps to draw, and the rest so that it still speaks
    words = [SpriteSource("varied pictures", 400_000)]
    train_to_draw(
        run, "instruct", "align", "diffusion", build_instruct_mixture(), words, 1 / 8, 0.1, 5700, 5e-4
    )


def train_instruct_asked(run):
    """Continues with as many captions as drawings, which are now asked for as `kosmos-g caption` asks."""
    words, mixture = [SpriteSource("asked pictures", 400_000)], build_instruct_mixture()
    train_to_draw(run, "instruct-asked", "instruct", "diffusion", mixture, words, 1 / 2, 0.3, 800, 3e-4)


def train_instruct_wide(run):
    words = [SpriteSource("varied pictures", 400_000, wide=True), SpriteSource("asked pictures", 400_000)]
    mixture = build_instruct_mixture(wide=True)
    train_to_draw(run, "instruct-wide", "align-wide", WIDE, mixture, words, 1 / 8, 0.1, 4000, 5e-4)


def train_instruct_wide_asked(run):
    words, mixture = [SpriteSource("asked pictures", 400_000)], build_instruct_mixture(wide=True)
    train_to_draw(run, "instruct-wide-asked", "instruct-wide", LONG, mixture, words, 1 / 2, 0.3, 900, 3e-4)


def train_to_draw(run, name, start, unet, mixture, words, words_share, words_weight, steps, lr):
    encoder = load_encoder(run / start)
    stage = InstructStage(
        encoder, load_unet(run, unet), load_vae(run), build_scheduler(), words_weight=words_weight
    )
    processor = KosmosGProcessor(build_tokenizer())
    drawn = InstructCollate(processor, IMAGE_SIZE, vae_scale_factor=4, max_text_tokens=None, resize=False)
    sources = [*mixture["sources"], *words]
    collates = [drawn] * len(mixture["sources"]) + [PretrainCollate(processor)] * len(words)
    weights = add_share(mixture["weights"], words_share, len(words))
    settings = {"steps": steps, "batch_size": 48, "lr": lr, "warmup_steps": 200, "ema_decay": 0.998}
    train(run / name, stage, sources, collates, weights, **settings)


def train_controlnet(run):
    vae, source = load_vae(run), SpriteSource("captions", wide=True)
    latents = encode_latents(vae, source, run / "latents-wide.safetensors")
    stage = ControlNetStage(load_unet(run, LONG), load_clip(run, WIDE), build_scheduler())
    collate = EdgesCollate(latents, vae.config.scaling_factor)
    settings = {"steps": 1000, "batch_size": 48, "lr": 5e-4, "warmup_steps": 50}
    train(run / "controlnet", stage, [source], collate, **settings)


def write_model(run, name="model", encoder_from="instruct-wide-asked"):
    """The folder that ships: a Kosmos-G pipeline in half precision, and its ControlNet."""
    pipeline = build_pipeline(run, load_encoder(run / encoder_from), build_tokenizer(), LONG).to(
        torch.float16
    )
    controlnet = ControlNetModel.from_pretrained(newest(run / "controlnet") / "controlnet")
    unfinished, folder = run / f".{name}.partial", run / name
    for path in (unfinished, folder):
        shutil.rmtree(path, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    for copy in unfinished.rglob("*.py"):
        copy.unlink()  # of the package, in which this folder lies
    shutil.copy(Path(SPRITES) / "README.md", unfinished)
    controlnet.half().save_pretrained(unfinished / "controlnet")
    for path in unfinished.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that no other user may read
    for path in unfinished.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where the run lay
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


PHASES = {
    "vae": train_vae,
    "diffusion": train_diffusion,
    "diffusion-wide": train_diffusion_wide,
    "diffusion-long": train_diffusion_long,
    "pretrain": train_pretrain,
    "pretrain-varied": train_pretrain_varied,
    "align": train_align,
    "instruct": train_instruct,
    "instruct-asked": train_instruct_asked,
    "pretrain-wide": train_pretrain_wide,
    "align-wide": train_align_wide,
    "instruct-wide": train_instruct_wide,
    "instruct-wide-asked": train_instruct_wide_asked,
    "controlnet": train_controlnet,
    "model": write_model,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sprites"))
    parser.add_argument("--only", nargs="+", choices=PHASES, metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--threads", type=int, help="of a phase (default: the cores, shared by the phases)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    if arguments.only is None and cores > 1:
        code = run_lanes(__file__, arguments.output, arguments.threads or cores // 2)
        if code:
            sys.exit(code)
        arguments.only = ["model"]
    torch.set_num_threads(arguments.threads or cores)
    torch.manual_seed(0)
    for name in arguments.only or PHASES:
        print(f"== {name}", flush=True)
        PHASES[name](arguments.output)


if __name__ == "__main__":
    main()
