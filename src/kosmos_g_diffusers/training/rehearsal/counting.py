"""What a stage costs, counted and not measured: operations, and the memory of a GPU that nobody has to have.

A forward and backward pass runs on fake tensors: shapes are computed and numbers are not, so that it takes neither a GPU nor
memory. Counted are the operations of matrix products, convolutions and attention (a multiplication with its addition is
2), and the bytes that autograd keeps for the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from ...conversion.target import target_config
from ...modeling_aligner_n import AlignerNetN
from ...modeling_kosmos_g import KosmosGTextEncoder, KosmosGTextEncoderConfig
from ..adapters import inject_adapter
from ..config import TrainConfig
from ..optimizers import MOMENT_BYTES
from ..stages import AlignStage, InstructStage, PretrainStage, Stage

GIB = 2**30
SPARE = 0.25  # of a GPU's memory: the allocator's fragments, the largest temporary tensors, the driver
BATCHES = (10, 20)  # two sizes tell what a sample takes from what a pass takes
# operations a second in bfloat16, dense, summed in float32, by NVIDIA's data sheets
PEAKS = {"RTX 3090": 71e12, "RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}
UTILISATION = 0.3  # of the peak: an assumption
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Of a sample: tokens of the prompt with those of its images, images in it, side of the image to draw in pixels."""

    tokens: int
    images: float
    side: int = 512


@dataclass(frozen=True)
class Sizes:
    """Configurations of the models of a stage; those that it does not have are None."""

    text_encoder: KosmosGTextEncoderConfig
    target: CLIPTextConfig | None = None
    unet: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None

    @classmethod
    def of_stage(cls, stage: Stage) -> "Sizes":
        """Those of a stage that is in memory."""
        config = stage.text_encoder.config
        if isinstance(stage, AlignStage):
            return cls(config, target=stage.target.config)
        if isinstance(stage, InstructStage):
            models = (stage.unet, stage.vae, stage.noise_scheduler)
            return cls(config, None, *(dict(model.config) for model in models))
        return cls(config)

    @classmethod
    def of_folder(cls, stage: str, folder: str | Path, target: str = "") -> "Sizes":
        """Those of a pipeline folder, of which only configurations are read."""
        folder = Path(folder)
        config = KosmosGTextEncoderConfig.from_pretrained(folder / "text_encoder")
        if stage == "align":
            return cls(config, target=target_config(target or folder))
        if stage == "instruct":
            unet = UNet2DConditionModel.load_config(folder / "unet")
            vae = AutoencoderKL.load_config(folder / "vae")
            return cls(config, None, unet, vae, DDPMScheduler.load_config(folder / "scheduler"))
        return cls(config)


@dataclass(frozen=True)
class Cost:
    """Of a stage on one GPU, in bytes and operations.

    Attributes:
        trained: weights that train.
        weights: bytes of all weights.
        fixed: bytes that autograd keeps whatever the batch: half-precision copies of weights.
        kept: bytes that it keeps for each sample.
        operations: of each sample, forwards and backwards.
        frozen: of these, what a cache can bring, by the names of FrozenCache.
    """

    trained: int
    weights: int
    fixed: float
    kept: float
    operations: float
    frozen: dict[str, float]

    def parts(self, config: TrainConfig) -> dict[str, float]:
        """Bytes of a run with these settings, by what they are."""
        return {
            "weights": self.weights,
            "gradients": 4 * self.trained,
            "moments": MOMENT_BYTES[config.optimizer] * self.trained,
            "average": 4 * self.trained if config.ema_decay else 0,
            "copies in half precision": self.fixed,
            "kept for the backward pass": config.batch_size * self.kept,
        }

    def memory(self, config: TrainConfig) -> float:
        """Bytes of a run with these settings, without what is to be left free (`SPARE`)."""
        return sum(self.parts(config).values())


def count(config: TrainConfig, sizes: Sizes, shape: Shape) -> Cost:
    """Cost of the stage of a TrainConfig on samples of a shape. No weights are read."""
    name, half = config.stage, HALVES.get(config.mixed_precision)
    with FakeTensorMode():
        stage = build_stage(config, sizes).train()
        if config.gradient_checkpointing:
            stage.gradient_checkpointing_enable()
        small, large = (_bytes_kept(name, stage, size, shape, half) for size in BATCHES)
        with sdpa_kernel(SDPBackend.MATH):  # the operations of others go uncounted
            with FlopCounterMode(display=False) as counter:
                run_pass(name, stage, BATCHES[0], shape, half)
            frozen = {}
            for work_name, work in frozen_work(name, stage, BATCHES[0], shape).items():
                with FlopCounterMode(display=False) as frozen_counter, torch.no_grad():
                    work()
                frozen[work_name] = frozen_counter.get_total_flops() / BATCHES[0]
    kept = (large - small) / (BATCHES[1] - BATCHES[0])
    held = sum(parameter.numel() for model in stage.frozen_models for parameter in model.parameters())
    return Cost(
        trained=sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad),
        weights=held * (2 if half else 4) + sum(parameter.nbytes for parameter in stage.parameters()),
        fixed=max(0.0, small - BATCHES[0] * kept),
        kept=kept,
        operations=counter.get_total_flops() / BATCHES[0],
        frozen=frozen,
    )


def build_stage(config: TrainConfig, sizes: Sizes) -> Stage:
    """The stage of a TrainConfig, with weights of torch's default device; call it where they cost nothing."""
    text_config = sizes.text_encoder
    if config.stage == "align":
        target = sizes.target
        text_config = KosmosGTextEncoderConfig.from_dict(
            text_config.to_dict()
            | {"num_queries": target.max_position_embeddings, "aligner_hidden_size": target.hidden_size}
        )
        encoder = KosmosGTextEncoder(text_config)
        return AlignStage(encoder, AlignerNetN(text_config), CLIPTextModel(target))
    encoder = KosmosGTextEncoder(text_config)
    if config.stage == "pretrain":
        return PretrainStage(encoder, config.train_vision)
    unet = UNet2DConditionModel.from_config(sizes.unet)
    vae, scheduler = AutoencoderKL.from_config(sizes.vae), DDPMScheduler.from_config(sizes.scheduler)
    vision = "none" if config.lora_rank else config.train_vision
    stage = InstructStage(encoder, unet, vae, scheduler, vision, config.words_weight)
    if config.lora_rank:
        with _modules_stay():  # fake ones cannot move
            inject_adapter(encoder, config.lora_rank, HALVES.get(config.mixed_precision))
    return stage


@contextmanager
def _modules_stay() -> Iterator[None]:
    before = torch.nn.Module.to
    torch.nn.Module.to = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        torch.nn.Module.to = before


def _bytes_kept(name, stage, batch_size, shape, half):
    """Bytes that autograd keeps, weights not counted."""
    models = (stage, *stage.frozen_models)
    weights = {
        StorageWeakRef(parameter.untyped_storage()) for model in models for parameter in model.parameters()
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if StorageWeakRef(storage) not in weights:
            kept[StorageWeakRef(storage)] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_pass(name, stage, batch_size, shape, half, run_backward=False)
    return sum(storage.nbytes() for storage in kept.values())


def frozen_work(
    name: str, stage: Stage, batch_size: int, shape: Shape
) -> dict[str, Callable[[], torch.Tensor]]:
    """What gives the same in every step: functions without arguments, by the names of FrozenCache."""
    works, images = {}, round(shape.images * batch_size)
    if images:
        size = stage.text_encoder.config.vision_config.image_size
        works["vision_states"] = lambda: stage.vision_states(torch.zeros(images, 3, size, size))
    if name == "align":
        length = stage.target.config.max_position_embeddings
        works["clip_embeds"] = lambda: stage.clip_embeds(torch.zeros(batch_size, length, dtype=torch.int64))
    if name == "instruct":
        side = shape.side
        works["latent_parameters"] = lambda: stage.latent_parameters(torch.zeros(batch_size, 3, side, side))
    return works


def run_pass(
    name: str,
    stage: Stage,
    batch_size: int,
    shape: Shape,
    half: torch.dtype | None = torch.bfloat16,
    run_backward: bool = True,
    found: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """A step as `stage.forward` makes it, without what looks at values: there are none.

    Args:
        half: of autocast; None is without.
        found: results of `frozen_work` that need not be computed.
    """
    encoder, config = stage.text_encoder, stage.text_encoder.config
    tokens, images = shape.tokens, round(shape.images * batch_size)
    ids = torch.zeros(batch_size, tokens, dtype=torch.int64)
    mask = torch.zeros(batch_size, tokens, dtype=torch.bool)
    with torch.autocast("cpu", half, enabled=half is not None):
        frozen = found or {key: work() for key, work in frozen_work(name, stage, batch_size, shape).items()}
        image_embeds = stage.image_embeds(frozen) if images else None
        with torch.no_grad() if name == "align" else nullcontext():
            states = encoder.get_language_hidden_states(ids, image_embeds, mask)
        if name == "pretrain":
            words = max(1, batch_size * tokens - images * config.latent_query_num)
            logits = states.flatten(0, 1)[:words] @ encoder.get_input_embeddings().weight.T
            loss = torch.nn.functional.cross_entropy(logits.float(), ids.flatten()[:words])
        else:
            condition = encoder.aligner(states, ~mask)[-1]
        if name == "align":
            again = stage.aligner_n(condition, tokens)
            loss = (condition - frozen["clip_embeds"]).square().mean() + again.square().mean()
        elif name == "instruct":
            unet = stage.unet
            latents = frozen["latent_parameters"][:, : unet.config.in_channels]
            loss = unet(latents, torch.zeros(batch_size, dtype=torch.int64), condition).sample.square().mean()
    if run_backward:
        loss.backward()


def gpu_seconds(operations: float, peak: float, utilisation: float = UTILISATION) -> float:
    """Seconds that a GPU of so many operations a second takes."""
    return operations / (peak * utilisation)
