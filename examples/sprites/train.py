"""Train the small model that ships with the package, from nothing, on two CPU cores.

    python examples/sprites/train.py --output runs/sprites

Two phases run side by side where they do not need each other. Those that are done are skipped and one that was stopped goes
on from its last checkpoint, so the same command resumes. --only names phases to run, one after the other.
"""

import argparse
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from base import (
    CaptionCollate,
    DiffusionStage,
    PictureCollate,
    VaeStage,
    build_clip_tokenizer,
    build_scheduler,
    encode_latents,
)
from controlnet import ControlNetStage, EdgesCollate
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from kosmos import build_instruct_mixture, build_text_encoder, build_tokenizer
from lanes import run_lanes
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from kosmos_g_diffusers import KosmosGPipeline, KosmosGProcessor, KosmosGTextEncoder
from kosmos_g_diffusers.conversion.initial_weights import build_fresh
from kosmos_g_diffusers.data import (
    AlignCollate,
    InstructCollate,
    MixtureDataset,
    PretrainCollate,
    add_share,
)
from kosmos_g_diffusers.modeling_aligner_n import AlignerNetN
from kosmos_g_diffusers.sprites.source import SpriteSource
from kosmos_g_diffusers.sprites.world import IMAGE_SIZE
from kosmos_g_diffusers.training.checkpoints import checkpoint_folder, list_checkpoints
from kosmos_g_diffusers.training.config import TrainConfig
from kosmos_g_diffusers.training.loop import train as train_or_stop
from kosmos_g_diffusers.training.stages import AlignStage, InstructStage, PretrainStage

COMMON = {
    "mixed_precision": "bf16",
    "workers": 1,
    "log_every": 20,
    "save_every": 100,
    "keep_checkpoints": 1,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
}


def train_vae(run):
    config = TrainConfig(
        output=str(run / "vae"),
        steps=2000,
        batch_size=24,
        lr=2e-3,
        warmup_steps=100,
        weight_decay=0.0,
        **COMMON,
    )
    dataset = MixtureDataset([SpriteSource("captions")], PictureCollate(), batch_size=config.batch_size)
    train(config, VaeStage(), dataset)


def train_diffusion(run):
    vae = AutoencoderKL.from_pretrained(newest(run / "vae") / "vae")
    source = SpriteSource("captions")
    latents = encode_latents(vae, source, run / "latents.safetensors")
    tokenizer, scheduler = build_clip_tokenizer(), build_scheduler()
    config = TrainConfig(
        output=str(run / "diffusion"),
        steps=3500,
        batch_size=64,
        lr=8e-4,
        warmup_steps=150,
        ema_decay=0.998,
        **COMMON,
    )
    collate = CaptionCollate(tokenizer, latents, vae.config.scaling_factor)
    train(config, DiffusionStage(tokenizer, scheduler), MixtureDataset([source], collate, batch_size=64))


def train_pretrain(run):
    tokenizer = build_tokenizer()
    train_to_caption(run / "pretrain", build_text_encoder(tokenizer), tokenizer, "pictures", 4000, 1.5e-3)


def train_pretrain_varied(run):
    """Goes on with captions that are harder to guess, which from the beginning teach shapes slowly."""
    encoder, tokenizer = load_encoder(run / "pretrain")
    train_to_caption(run / "pretrain-varied", encoder, tokenizer, "varied pictures", 8000, 1.2e-3)


def train_to_caption(output, encoder, tokenizer, kind, steps, lr):
    config = TrainConfig(
        output=str(output),
        steps=steps,
        batch_size=64,
        lr=lr,
        warmup_steps=200,
        train_vision="all",
        **COMMON,
    )
    collate = PretrainCollate(KosmosGProcessor(tokenizer))
    dataset = MixtureDataset([SpriteSource(kind, 400_000)], collate, batch_size=config.batch_size)
    train(config, PretrainStage(encoder, train_vision="all"), dataset)


def train_align(run):
    encoder, tokenizer = load_encoder(run / "pretrain-varied")
    target = CLIPTextModel.from_pretrained(newest(run / "diffusion") / "text_encoder")
    config = TrainConfig(
        output=str(run / "align"),
        steps=900,
        batch_size=128,
        lr=1e-3,
        warmup_steps=100,
        **COMMON,
    )
    aligner_n = build_fresh(AlignerNetN, encoder.config, seed=1)
    collate = AlignCollate(KosmosGProcessor(tokenizer), build_clip_tokenizer(), max_text_tokens=None)
    dataset = MixtureDataset([SpriteSource("captions")], collate, batch_size=config.batch_size)
    train(config, AlignStage(encoder, aligner_n, target), dataset)


def train_instruct(run, name="instruct", start="align"):
    encoder, tokenizer = load_encoder(run / start)
    # 5,000 steps to draw, and the rest so that it goes on to speak
    train_to_draw(run, name, encoder, tokenizer, "varied pictures", 1 / 8, 0.1, steps=5700, lr=5e-4)


def train_instruct_asked(run, name="instruct-asked", start="instruct"):
    """Goes on with as many captions as drawings, which are now asked for as `kosmos-g caption` asks."""
    encoder, tokenizer = load_encoder(run / start)
    train_to_draw(run, name, encoder, tokenizer, "asked pictures", 1 / 2, 0.3, steps=800, lr=3e-4)


def train_to_draw(run, name, encoder, tokenizer, words, words_share, words_weight, steps, lr):
    unet = UNet2DConditionModel.from_pretrained(newest(run / "diffusion") / "unet")
    vae = AutoencoderKL.from_pretrained(newest(run / "vae") / "vae")
    config = TrainConfig(
        output=str(run / name),
        steps=steps,
        batch_size=48,
        lr=lr,
        warmup_steps=200,
        ema_decay=0.998,
        **COMMON,
    )
    processor, mixture = KosmosGProcessor(tokenizer), build_instruct_mixture()
    drawn = InstructCollate(processor, IMAGE_SIZE, vae_scale_factor=4, max_text_tokens=None, resize=False)
    dataset = MixtureDataset(
        [*mixture["sources"], SpriteSource(words, 400_000)],
        [drawn] * len(mixture["sources"]) + [PretrainCollate(processor)],
        batch_size=config.batch_size,
        weights=add_share(mixture["weights"], words_share, 1),
    )
    train(config, InstructStage(encoder, unet, vae, build_scheduler(), words_weight=words_weight), dataset)


def train_controlnet(run):
    folder, vae = newest(run / "diffusion"), AutoencoderKL.from_pretrained(newest(run / "vae") / "vae")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    source = SpriteSource("captions")
    latents = encode_latents(vae, source, run / "latents.safetensors")
    config = TrainConfig(
        output=str(run / "controlnet"),
        steps=800,
        batch_size=48,
        lr=5e-4,
        warmup_steps=50,
        **COMMON,
    )
    collate = EdgesCollate(latents, vae.config.scaling_factor)
    dataset = MixtureDataset([source], collate, batch_size=config.batch_size)
    train(config, ControlNetStage(unet, text_encoder, build_scheduler()), dataset)


def write_model(run, name="model", encoder_from="instruct-asked"):
    """The folder that ships: a Kosmos-G pipeline in half precision, with the ControlNet beside it."""
    encoder, tokenizer = load_encoder(run / encoder_from)
    pipeline = KosmosGPipeline(
        vae=AutoencoderKL.from_pretrained(newest(run / "vae") / "vae"),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(newest(run / "diffusion") / "unet"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    controlnet = ControlNetModel.from_pretrained(newest(run / "controlnet") / "controlnet")
    unfinished, folder = run / f".{name}.partial", run / name
    for path in (unfinished, folder):
        shutil.rmtree(path, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    for copy in unfinished.rglob("*.py"):
        copy.unlink()  # of the package, in which this folder lies
    shutil.copy(Path(__file__).with_name("CARD.md"), unfinished / "README.md")
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


def load_encoder(run):
    """(text encoder of a run's newest checkpoint in float32, the tokenizer)."""
    return KosmosGTextEncoder.from_pretrained(
        newest(run) / "text_encoder", dtype=torch.float32
    ), build_tokenizer()


def train(config, stage, dataset):
    """As the library's; a run that was told to stop ends the program instead of going on to the next phase."""
    # of few positions in bfloat16, the backward pass of PyTorch's fused attention takes two to five times as long on a CPU
    with sdpa_kernel(SDPBackend.MATH):
        checkpoint = train_or_stop(config, stage, dataset)
    if checkpoint != checkpoint_folder(config.output, config.steps):
        sys.exit(143)


def newest(run):
    return list_checkpoints(run)[-1]


PHASES = {
    "vae": train_vae,
    "diffusion": train_diffusion,
    "pretrain": train_pretrain,
    "pretrain-varied": train_pretrain_varied,
    "align": train_align,
    "instruct": train_instruct,
    "instruct-asked": train_instruct_asked,
    "controlnet": train_controlnet,
    "model": write_model,
}
CONTROLS = {  # what a stage is good for: models to be evaluated beside the one that ships
    "instruct-unaligned": partial(train_instruct, name="instruct-unaligned", start="pretrain-varied"),
    "instruct-asked-unaligned": partial(
        train_instruct_asked, name="instruct-asked-unaligned", start="instruct-unaligned"
    ),
    "model-stage-2-skipped": partial(
        write_model, name="model-stage-2-skipped", encoder_from="instruct-asked-unaligned"
    ),
    "model-stage-3-skipped": partial(write_model, name="model-stage-3-skipped", encoder_from="align"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sprites"))
    parser.add_argument(
        "--only", nargs="+", choices=[*PHASES, *CONTROLS], metavar="PHASE", help=f"{', '.join(PHASES)}; "
        f"or, for controls, {', '.join(CONTROLS)}",
    )  # fmt: skip
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
        (PHASES | CONTROLS)[name](arguments.output)


if __name__ == "__main__":
    main()
