"""From settings to a run: the models, the data, what its checkpoints hold, and the loop over them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..conversion.folder import public_name
from ..conversion.initial_weights import build_fresh
from ..conversion.target import MODEL_FOLDER, load_target
from ..data import (
    AlignCollate,
    InstructCollate,
    MixtureDataset,
    PretrainCollate,
    Source,
    add_share,
    build_source,
)
from ..loading import IncompleteWeights, load_pretrained
from ..modeling_aligner_n import AlignerNetN
from ..modeling_kosmos_g import AlignerNet, KosmosGTextEncoder
from ..processing_kosmos_g import KosmosGProcessor, KosmosGTokenizer
from ..quiet import brief_bars
from . import adapters
from .cache import FrozenCache
from .checkpoints import begin_run, trained_parameters
from .config import STAGES, TrainConfig
from .loop import train
from .model_folder import DECODER_FOLDER, complete, decoder_folder, load_scheduler, locate_model, save_decoder
from .samples import SampleSheet
from .stages import AlignStage, InstructStage, PretrainStage

MAX_TEXT_TOKENS: dict[str, int | None] = {
    "pretrain": None,
    "align": 85,
    "instruct": 128,
}  # of the official loaders


def run_stage(
    name: str,
    config: TrainConfig,
    sources: Sequence[Source] | None = None,
    *,
    progress_bar: bool = True,
    announce: Callable[[str], object] | None = None,
) -> Path:
    """Train a stage of Kosmos-G, or resume the run in `config.output`.

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
    announces = announce is not None and run.state.is_main_process
    if announces:
        announce(run.describe())
    try:
        return run.train(progress_bar)
    finally:
        if announces and run.cache is not None:
            announce(run.cache.summary())


def build_run(name: str, config: TrainConfig, sources: Sequence[Source] | None = None) -> "Run":
    """A `Run`, not yet trained; arguments and errors as `run_stage`. Its settings are written into `config.output`."""
    return Run(name, config, sources)


def check_warmup(config: TrainConfig) -> list[str]:
    """A note if a run's warm-up is longer than itself."""
    if config.warmup_steps < config.steps:
        return []
    reached = config.lr * (config.steps - 1) / config.warmup_steps
    return [
        f"Note: the warm-up of {config.warmup_steps:,} steps is longer than the run of {config.steps:,}: the learning rate "
        f"ends at {reached:.1e} and never reaches {config.lr:.1e}. Pass --warmup-steps, such as {max(1, config.steps // 10)}."
    ]


def process_state() -> PartialState:
    """accelerate's state of the processes, as `Accelerator` will set it up."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class Run:
    """A stage of Kosmos-G with its models and data; see `build_run`.

    Attributes:
        config: TrainConfig.
        stage: PretrainStage, AlignStage or InstructStage.
        dataset: MixtureDataset of this process.
        cache: FrozenCache, or None.
        notes: sentences about choices that were made, for a person.
    """

    config: TrainConfig
    state: PartialState
    notes: list[str]
    folder: Path
    text_encoder: KosmosGTextEncoder
    processor: KosmosGProcessor
    stage: PretrainStage | AlignStage | InstructStage
    cache: FrozenCache | None
    dataset: MixtureDataset
    draw_samples: SampleSheet | None

    def __init__(self, name: str, config: TrainConfig, sources: Sequence[Source] | None = None):
        self.config = config = _check_config(name, config)
        self.state, self.notes = process_state(), []
        self.notes += check_warmup(config)
        self.folder = locate_model(config.model)
        sources = _build_sources(config, config.data) if sources is None else list(sources)
        lock = begin_run(config, self.state)
        try:
            self._build(name, sources)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def _build(self, name, sources):
        config = self.config
        self.text_encoder = _load(KosmosGTextEncoder, self.folder, "text_encoder")
        tokenizer = KosmosGTokenizer.from_pretrained(self.folder, subfolder="tokenizer")
        sizes = self.text_encoder.config
        self.processor = KosmosGProcessor(tokenizer, sizes.vision_config.image_size, sizes.latent_query_num)
        build = {"pretrain": self._pretrain, "align": self._align, "instruct": self._instruct}[name]
        with self.state.main_process_first():  # it writes the decoder that the others read
            self.stage, collate = build()
        self.cache = FrozenCache(config.cache, self.stage, config.mixed_precision) if config.cache else None
        self.dataset = self._mix(sources, collate)
        self.draw_samples = self._build_sheet() if config.sample_every else None

    def describe(self) -> str:
        """What will be trained on what, in a few lines."""
        config, processes = self.config, self.state.num_processes
        samples = config.batch_size * config.accumulation * processes
        sources = ", ".join(f"{source.name} ({len(source):,} samples)" for source in self.dataset.sources)
        trained = sum(parameter.numel() for parameter in trained_parameters(self.stage))
        total = sum(parameter.numel() for parameter in self.stage.parameters())
        lines = [
            f"{config.stage}: {trained:,} of {total:,} weights train, from {config.model}",
            f"data: {sources}",
            f"{config.steps:,} steps of {samples:,} samples ({config.batch_size} x {config.accumulation} passes x "
            f"{processes} processes) on {self.state.device}, mixed precision {config.mixed_precision}",
            f"output: {config.output}",
        ]
        if processes > 1:
            lines.append(
                f"resumes on {processes} processes alone: the order of samples and the random states depend on their number"
            )
        return "\n".join([*lines, *self.notes])

    def train(self, progress_bar: bool = True) -> Path:
        """Train it to the end; returns and raises as `run_stage`."""
        try:
            return train(
                self.config,
                self.stage,
                self.dataset,
                save_model=self._save_adapter if self.config.lora_rank else self._save_model,
                draw_samples=self.draw_samples,
                progress_bar=progress_bar,
                begun=True,
            )
        finally:
            if self.cache is not None:
                self.cache.flush()

    # The stages: (stage, collate) ------------------------------------------------------------------------------------

    def _pretrain(self):
        collate = PretrainCollate(self.processor, max_text_tokens=self._max_text_tokens())
        return PretrainStage(self.text_encoder, self.config.train_vision), collate

    def _align(self):
        config, folder, text_encoder = self.config, self.folder, self.text_encoder
        if not config.target and not (folder / MODEL_FOLDER).is_dir():
            raise ValueError(
                f"{folder} does not say which text encoder to imitate: it has no {MODEL_FOLDER}. Pass --target with "
                "the Stable Diffusion that shall draw, such as stable-diffusion-v1-5/stable-diffusion-v1-5."
            )
        target, target_tokenizer = load_target(config.target or folder)
        sizes = text_encoder.config
        given = (sizes.num_queries, sizes.aligner_hidden_size)
        wanted = (target.config.max_position_embeddings, target.config.hidden_size)
        fresh = given != wanted
        if fresh:
            sizes.num_queries, sizes.aligner_hidden_size = wanted
            sizes.aligner_attention_heads = target.config.num_attention_heads
            sizes.aligner_ffn_dim = target.config.intermediate_size
            text_encoder.aligner = build_fresh(AlignerNet, sizes, config.seed)
            self.notes.append(
                f"The AlignerNet of {given[0]} states of width {given[1]} is replaced by a new one, for the target's "
                f"{wanted[0]} of width {wanted[1]}."
            )
        if not fresh and (folder / "aligner_n").is_dir():
            aligner_n = AlignerNetN.from_pretrained(folder / "aligner_n", sizes)
        else:
            aligner_n = build_fresh(AlignerNetN, sizes, config.seed + 1)
            if not fresh:
                self.notes.append(
                    "The model has no AlignerNet N, the inverse projection that this stage needs: a new one is made."
                )
        if config.target and self.state.is_main_process:
            save_decoder(config.target, target, target_tokenizer, folder, config.output)
        if fresh and not (Path(config.output) / DECODER_FOLDER / "unet").is_dir():
            raise ValueError(
                f"The target {config.target} has no U-Net, and that of {folder} reads conditions of width {given[1]}, not "
                f"{wanted[1]}. Pass the whole Stable Diffusion as --target."
            )
        collate = AlignCollate(self.processor, target_tokenizer, max_text_tokens=self._max_text_tokens())
        return AlignStage(text_encoder, aligner_n, target), collate

    def _instruct(self):
        config, text_encoder = self.config, self.text_encoder
        unet, vae = _load_decoder(self.folder)
        scheduler = load_scheduler(self.folder)
        train_vision = "none" if config.lora_rank else config.train_vision
        stage = InstructStage(text_encoder, unet, vae, scheduler, train_vision, config.words_weight)
        if config.lora_rank:
            frozen_dtype = None if config.dtype == torch.float32 else config.dtype
            name = public_name(config.model)
            adapters.add_adapter(text_encoder, config.lora_rank, frozen_dtype, config.seed, name)
        collate = InstructCollate(
            self.processor,
            config.resolution or _own_resolution(unet, vae),
            num_train_timesteps=scheduler.config.num_train_timesteps,
            latent_channels=vae.config.latent_channels,
            vae_scale_factor=_scale_factor(vae),
            condition_dropout=config.condition_dropout,
            max_text_tokens=self._max_text_tokens(),
        )
        return stage, collate

    def _max_text_tokens(self):
        return self.config.max_text_tokens or MAX_TEXT_TOKENS[self.config.stage]

    # Data, sheets and checkpoints ------------------------------------------------------------------------------------

    def _mix(self, sources, collate):
        """MixtureDataset of this process: the sources, and those of stage 1 that keep the model's words."""
        config, state = self.config, self.state
        collates, weights = [collate] * len(sources), list(config.data_weights) or [1.0] * len(sources)
        if config.words and len(weights) == len(sources):  # else the mixture says what does not fit
            words = _build_sources(config, config.words)
            weights = add_share(weights, config.words_share, len(words))
            sources = [*sources, *words]
            collates += [PretrainCollate(self.processor)] * len(words)
            named = ", ".join(source.name for source in words)
            self.notes.append(f"words: {config.words_share:.0%} of the batches are of {named}, as in stage 1")
        if self.cache is not None:
            collates = [self.cache.attach(each) for each in collates]
        return MixtureDataset(
            sources,
            collates,
            batch_size=config.batch_size,
            weights=weights,
            seed=config.seed,
            process_index=state.process_index,
            num_processes=state.num_processes,
            bucket_window=config.bucket_window,
        )

    def _build_sheet(self):
        config, stage = self.config, self.stage
        folder = decoder_folder(self.folder, config.output)
        unet, vae = (stage.unet, stage.vae) if config.stage == "instruct" else _load_decoder(folder)
        return SampleSheet(
            config.sample_prompts,
            tokenizer=self.processor.tokenizer,
            unet=unet,
            vae=vae,
            scheduler=load_scheduler(folder),
            text_encoder=self.text_encoder,
            resolution=config.resolution or _own_resolution(unet, vae),
            dtype=config.dtype,
            seed=config.seed,
        )

    @brief_bars()
    def _save_model(self, folder, state_dict):
        self.stage.save_pretrained(folder, state_dict)
        parts = (Path(self.config.output) / DECODER_FOLDER, self.folder)
        complete(folder, [part for part in parts if part.is_dir()], self.config)

    def _save_adapter(self, folder, state_dict):
        part = {name: weight for name, weight in state_dict.items() if ".lora_" in name}
        part = {name.removeprefix("text_encoder."): weight for name, weight in part.items()}
        adapters.save_adapter(self.text_encoder, Path(folder) / adapters.FOLDER, part)


def _check_config(name, config):
    """The settings with the stage's name in them; ValueError for some that the stage cannot follow."""
    if name not in STAGES:
        raise ValueError(f"{name!r} is not a stage. Expected one of {', '.join(STAGES)}.")
    if config.stage not in ("", name):
        raise ValueError(f"These settings are for the stage {config.stage!r}, not for {name!r}.")
    only = {"target": "align", "lora_rank": "instruct", "resolution": "instruct", "words": "instruct"}
    for setting, stage in only.items():
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
    chances = {"word_dropout": config.entity_dropout, "background": config.background_probability}
    return [build_source(line, **chances, min_side=config.min_side) for line in lines]


def _load(model_class, folder, part):
    """A part of a pipeline folder, float32."""
    try:
        return load_pretrained(model_class, folder, subfolder=part)
    except IncompleteWeights as error:
        raise ValueError(f"The {part} of {folder} cannot be read: {error}. Get or make it again.") from error


def _load_decoder(folder):
    """(U-Net, VAE) of a pipeline folder."""
    return _load(UNet2DConditionModel, folder, "unet"), _load(AutoencoderKL, folder, "vae")


def _own_resolution(unet, vae):
    """Side of the images that a U-Net was made for, in pixels."""
    return unet.config.sample_size * _scale_factor(vae)


def _scale_factor(vae):
    return 2 ** (len(vae.config.block_out_channels) - 1)
