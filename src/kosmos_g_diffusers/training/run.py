"""From settings to a run: the models, the data, what its checkpoints hold, and the loop over them."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..conversion.initial_weights import build_fresh
from ..conversion.target import MODEL_FOLDER, load_target
from ..data import AlignCollate, InstructCollate, MixtureDataset, PretrainCollate, add_share, build_source
from ..modeling_aligner_n import AlignerNetN
from ..modeling_kosmos_g import AlignerNet, KosmosGTextEncoder
from ..processing_kosmos_g import KosmosGProcessor, KosmosGTokenizer
from . import adapters, checkpoints
from .config import STAGES
from .loop import DTYPES, train
from .model_folder import (
    DECODER_FOLDER,
    complete,
    decoder_folder,
    load_scheduler,
    locate_model,
    save_decoder,
)
from .samples import SampleSheet
from .stages import AlignStage, InstructStage, PretrainStage

MAX_TEXT_TOKENS = {"pretrain": None, "align": 85, "instruct": 128}  # of the official loaders


@dataclass
class Run:
    """What `train` takes, made of settings.

    Attributes:
        config: TrainConfig.
        stage: PretrainStage, AlignStage or InstructStage.
        dataset: MixtureDataset of this process.
        save_model: writes the rest of a checkpoint, see `train`.
        draw_samples: SampleSheet, or None.
        cache: FrozenCache, or None.
        notes: sentences about choices that were made, for a person.
    """

    config: object
    stage: object
    dataset: object
    save_model: object
    draw_samples: object = None
    cache: object = None
    notes: list = field(default_factory=list)

    def describe(self):
        """What will be trained on what, in a few lines."""
        config, state = self.config, process_state()
        weights = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        samples = config.batch_size * config.accumulation * state.num_processes
        sources = ", ".join(f"{source.name} ({len(source):,} samples)" for source in self.dataset.sources)
        count = sum(parameter.numel() for parameter in weights)
        return "\n".join(
            [
                f"{config.stage}: {count:,} of {sum(p.numel() for p in self.stage.parameters()):,} weights train, from "
                f"{config.model}",
                f"data: {sources}",
                f"{config.steps:,} steps of {samples:,} samples ({config.batch_size} x {config.accumulation} passes x "
                f"{state.num_processes} processes) on {state.device}, mixed precision {config.mixed_precision}",
                f"output: {config.output}",
                *self.notes,
            ]
        )


def run_stage(name, config, sources=None, *, progress_bar=True, announce=None):
    """Train a stage of Kosmos-G, or go on with the run in `config.output`.

    Args:
        name: "pretrain", "align" or "instruct".
        config: TrainConfig, see `TrainConfig.from_toml(path, stage=name)`.
        sources: see data.Source; None builds those of `config.data`.
        progress_bar: show one on the main process.
        announce: called with a description of the run on the main process before it begins, such as `print`.

    Returns:
        Path of the last checkpoint: a pipeline folder, or with `lora_rank` a folder with an adapter in it.

    Raises:
        ValueError, TypeError: settings, models or data that do not work or do not go together.
        and what `train` raises.
    """
    run = build_run(name, config, sources)
    announces = announce is not None and process_state().is_main_process
    if announces:
        announce(run.describe())
    try:
        return train(
            run.config,
            run.stage,
            run.dataset,
            save_model=run.save_model,
            draw_samples=run.draw_samples,
            progress_bar=progress_bar,
        )
    finally:
        if run.cache is not None:
            run.cache.flush()
            if announces:
                announce(run.cache.summary())


def build_run(name, config, sources=None):
    """The parts of a run; arguments and errors as `run_stage`. Writes its settings into `config.output`."""
    config = _check_config(name, config)
    checkpoints.check_settings(config)
    folder = locate_model(config.model)
    state = process_state()
    sources = _build_sources(config, config.data) if sources is None else list(sources)
    text_encoder = KosmosGTextEncoder.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    tokenizer = KosmosGTokenizer.from_pretrained(folder, subfolder="tokenizer")
    sizes = text_encoder.config
    processor = KosmosGProcessor(tokenizer, sizes.vision_config.image_size, sizes.latent_query_num)
    with state.main_process_first():
        if state.is_main_process:
            checkpoints.begin_run(config)
        build = {"pretrain": _pretrain, "align": _align, "instruct": _instruct}[name]
        stage, collate, notes = build(config, folder, text_encoder, processor)
    collates, weights = [collate] * len(sources), list(config.data_weights) or [1.0] * len(sources)
    if config.words and len(weights) == len(sources):  # else the mixture says what does not fit
        words = _build_sources(config, config.words)
        weights = add_share(weights, config.words_share, len(words))
        sources = [*sources, *words]
        collates += [PretrainCollate(processor)] * len(words)
        named = ", ".join(source.name for source in words)
        notes.append(f"words: {config.words_share:.0%} of the batches are of {named}, learned as in stage 1")
    cache = None
    if config.cache:
        from .cache import FrozenCache

        cache = FrozenCache(config.cache, stage, config.mixed_precision)
        collates = [cache.attach(each) for each in collates]
    dataset = MixtureDataset(
        sources,
        collates,
        batch_size=config.batch_size,
        weights=weights,
        seed=config.seed,
        process_index=state.process_index,
        num_processes=state.num_processes,
        bucket_window=config.bucket_window,
    )
    run_folder = Path(config.output)
    rest = [path for path in (run_folder / DECODER_FOLDER, folder) if path.is_dir()]
    run = Run(config, stage, dataset, partial(_save_model, stage, rest, config), None, cache, notes)
    if config.lora_rank:
        run.save_model = partial(_save_adapter, stage)
    if config.sample_every:
        drawing = decoder_folder(folder, run_folder)
        unet, vae = (stage.unet, stage.vae) if name == "instruct" else _load_decoder(drawing)
        run.draw_samples = SampleSheet(
            config.sample_prompts,
            tokenizer=tokenizer,
            unet=unet,
            vae=vae,
            scheduler=load_scheduler(drawing),
            text_encoder=text_encoder,
            resolution=config.resolution or _own_resolution(unet, vae),
            dtype=DTYPES[config.mixed_precision],
            seed=config.seed,
        )
    return run


def process_state():
    """accelerate's state of the processes, as `Accelerator` will set it up."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


# The stages ------------------------------------------------------------------------------------------------------


def _pretrain(config, folder, text_encoder, processor):
    collate = PretrainCollate(processor, max_text_tokens=_max_text_tokens(config))
    return PretrainStage(text_encoder, config.train_vision), collate, []


def _align(config, folder, text_encoder, processor):
    if not config.target and not (folder / MODEL_FOLDER).is_dir():
        raise ValueError(
            f"{folder} does not say which text encoder to imitate: it has no {MODEL_FOLDER}. Pass --target with the Stable "
            "Diffusion that shall draw, such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    target, target_tokenizer = load_target(config.target or folder)
    notes, encoder_config = [], text_encoder.config
    given = (encoder_config.num_queries, encoder_config.aligner_hidden_size)
    wanted = (target.config.max_position_embeddings, target.config.hidden_size)
    fresh = given != wanted
    if fresh:
        encoder_config.num_queries, encoder_config.aligner_hidden_size = wanted
        encoder_config.aligner_attention_heads = target.config.num_attention_heads
        encoder_config.aligner_ffn_dim = target.config.intermediate_size
        text_encoder.aligner = build_fresh(AlignerNet, encoder_config, config.seed)
        notes.append(
            f"The AlignerNet of {given[0]} states of width {given[1]} is replaced by a new one, for the target's "
            f"{wanted[0]} of width {wanted[1]}."
        )
    if not fresh and (folder / "aligner_n").is_dir():
        aligner_n = AlignerNetN.from_pretrained(folder / "aligner_n", encoder_config)
    else:
        aligner_n = build_fresh(AlignerNetN, encoder_config, config.seed + 1)
        if not fresh:
            notes.append(
                "The model has no AlignerNet N, the way back that this stage needs: a new one is made."
            )
    if config.target and process_state().is_main_process:
        save_decoder(config.target, target, target_tokenizer, folder, config.output)
    if fresh and not (Path(config.output) / DECODER_FOLDER / "unet").is_dir():
        raise ValueError(
            f"The target {config.target} has no U-Net, and that of {folder} reads conditions of width {given[1]}, not "
            f"{wanted[1]}. Pass the whole Stable Diffusion as --target."
        )
    collate = AlignCollate(processor, target_tokenizer, max_text_tokens=_max_text_tokens(config))
    return AlignStage(text_encoder, aligner_n, target), collate, notes


def _instruct(config, folder, text_encoder, processor):
    unet, vae = _load_decoder(folder)
    scheduler = load_scheduler(folder)
    train_vision = "none" if config.lora_rank else config.train_vision
    stage = InstructStage(text_encoder, unet, vae, scheduler, train_vision, config.words_weight)
    if config.lora_rank:
        half = DTYPES[config.mixed_precision]
        adapters.add_adapter(
            text_encoder, config.lora_rank, None if half == torch.float32 else half, config.seed
        )
    collate = InstructCollate(
        processor,
        config.resolution or _own_resolution(unet, vae),
        num_train_timesteps=scheduler.config.num_train_timesteps,
        latent_channels=vae.config.latent_channels,
        vae_scale_factor=_scale_factor(vae),
        condition_dropout=config.condition_dropout,
        max_text_tokens=_max_text_tokens(config),
    )
    return stage, collate, []


def _save_model(stage, rest, config, folder, state_dict):
    stage.save_pretrained(folder, state_dict)
    complete(folder, rest, config)


def _save_adapter(stage, folder, state_dict):
    part = {
        name.removeprefix("text_encoder."): tensor for name, tensor in state_dict.items() if ".lora_" in name
    }
    adapters.save_adapter(stage.text_encoder, Path(folder) / adapters.FOLDER, part)


# Settings --------------------------------------------------------------------------------------------------------


def _check_config(name, config):
    """The settings with the stage's name in them; ValueError for some that the stage cannot follow."""
    if name not in STAGES:
        raise ValueError(f"{name!r} is no stage. Expected one of {', '.join(STAGES)}.")
    if config.stage not in ("", name):
        raise ValueError(f"These settings are for the stage {config.stage!r}, not for {name!r}.")
    for setting, stage in (
        ("target", "align"),
        ("lora_rank", "instruct"),
        ("resolution", "instruct"),
        ("words", "instruct"),
    ):
        if getattr(config, setting) and name != stage:
            raise ValueError(
                f"{setting} is {getattr(config, setting)!r}, which only the stage {stage} has. Leave it out of {name}."
            )
    if config.sample_every and not config.sample_prompts:
        raise ValueError(
            f"sample_every is {config.sample_every}, but there are no prompts to draw. Pass --sample-prompts FILE."
        )
    return config.replace(stage=name)


def _build_sources(config, lines):
    if not lines:
        raise ValueError(
            "No data was given. Pass --data with one or more sources, such as --data tsv:captions:/data/laion; "
            "docs/data.md has the forms."
        )
    return [
        build_source(
            line,
            word_dropout=config.entity_dropout,
            background=config.background_probability,
            min_side=config.min_side,
        )
        for line in lines
    ]


def _max_text_tokens(config):
    return config.max_text_tokens or MAX_TEXT_TOKENS[config.stage]


def _load_decoder(folder):
    """(U-Net, VAE) of a pipeline folder, float32."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return unet, AutoencoderKL.from_pretrained(folder, subfolder="vae")


def _own_resolution(unet, vae):
    """Side of the pictures that a U-Net was made for, in pixels."""
    return unet.config.sample_size * _scale_factor(vae)


def _scale_factor(vae):
    return 2 ** (len(vae.config.block_out_channels) - 1)
