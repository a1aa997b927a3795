"""Frozen work is done once: what the VAE, the target text encoder and the frozen vision blocks compute is kept on disk.

    cache = FrozenCache("cache", stage, config.mixed_precision)
    dataset = MixtureDataset(sources, cache.attach(collate), ...)
    train(config, stage, dataset)
    cache.flush()

The workers that read the data look for kept results and bring what is missing as it is. The stage computes that before
its forward pass, and from then on it is kept. docs/training-caches.md says how much disk it takes and when it pays.

Letters of the shapes: n entries of a batch (samples, or images), m of them that were not found.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from ..environment import as_dtype
from .cache_store import KEEP_FREE, TensorStore, as_bytes, content_key, keys_as_tensor
from .config import MIXED_PRECISIONS
from .stages import AlignStage, InstructStage

if TYPE_CHECKING:
    from ..data import Sample
    from ..data.mixture import Collate
    from .stages import Stage

FORMAT_VERSION = 1  # of the folders; raise it when the same work would be kept in another way
# what the workers hand to `complete`, behind the name of a work
FOUND, MISSING, KEYS = ".found", ".missing", ".keys"
NOT_ARCHITECTURE = {"transformers_version", "dtype", "torch_dtype", "architectures"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenWork:
    """Something that a stage computes alike whenever it meets the same input.

    Attributes:
        name: of the result, under which the stage takes it from a batch.
        inputs: names of what it is computed from; the second and later ones may be absent.
        modules: that compute it, all frozen.
        config: what besides their weights decides what they compute.
        compute: takes the inputs (n, ...), returns (n, ...).
    """

    name: str
    inputs: tuple[str, ...]
    modules: nn.ModuleList
    config: dict[str, Any]
    compute: Callable[..., torch.Tensor]


class FrozenCache:
    """Keeps the frozen work of a stage in a folder, for this run and later ones.

    A result is found by the content of its input, in a subfolder named by the weights that computed it: other weights
    look into another subfolder. Results are rounded to `dtype` when they are computed, not only when they are read, so
    that training is the same whether they were found or not.

    Args:
        folder: of the cache; runs, stages and processes can share it.
        stage: one of stages.py, as yet in float32.
        mixed_precision: the training's, "no", "bf16" or "fp16": results of one are not found in another.
        dtype: results are kept in; None takes float32 without mixed precision, float16 otherwise. (float16 holds what a
            bf16 model gives without loss, unless it is below 6e-5, and rounds to 11 bits what it keeps in float32.)
        only: names of the works to keep, of `latent_parameters`, `clip_embeds` and `vision_states`; None keeps all that
            the stage has.
        keep_free: bytes of the disk to leave for others, such as checkpoints; with less, nothing more is kept.

    Raises:
        ValueError: the stage has no frozen work that could be kept, or not the one asked for.
    """

    stage: "Stage"
    precision: torch.dtype
    works: list[FrozenWork]
    stores: dict[str, TensorStore]
    found: dict[str, int]
    computed: dict[str, int]

    def __init__(
        self,
        folder: str | Path,
        stage: "Stage",
        mixed_precision: str = "no",
        *,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
        keep_free: int = KEEP_FREE,
    ):
        if dtype is None:
            dtype = torch.float32 if mixed_precision == "no" else torch.float16
        self.stage, self.precision = stage, as_dtype(MIXED_PRECISIONS[mixed_precision])
        works = find_frozen_work(stage)
        names = [work.name for work in works]
        if not names or set(only or ()) - set(names):
            raise ValueError(
                f"{', '.join(only or ('Frozen work',))} of {type(stage).__name__} cannot be kept in the cache "
                f"{str(folder)!r}: with train_vision={stage.train_vision!r} it has {', '.join(names) or 'none'}. "
                "Leave the cache out, or train fewer blocks of the vision tower."
            )
        self.works = [work for work in works if only is None or work.name in only]
        self.stores = {}
        for work in self.works:
            path = Path(folder) / f"{work.name}-{_fingerprint(work, mixed_precision, dtype)[:16]}"
            self.stores[work.name] = TensorStore(path, dtype, keep_free=keep_free)
        self.found = dict.fromkeys(self.stores, 0)
        self.computed = dict.fromkeys(self.stores, 0)
        stage.register_forward_pre_hook(lambda stage, inputs: (self.complete(*inputs),))

    def attach(self, collate: "Collate") -> "CachedCollate":
        """A collate that brings what is kept; what its batches lack the stage computes before its forward pass, and keeps.

        Args:
            collate: of the stage's batches; see data/collate.py.
        """
        works = [(work.name, work.inputs, self.stores[work.name]) for work in self.works]
        return CachedCollate(collate, works)

    @torch.no_grad()
    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of a `CachedCollate`, on the stage's device -> one that the stage reads; what was missing is kept."""
        batch = dict(batch)
        device = next(iter(batch.values())).device
        # autocast would not put float16 together where it computes in bf16
        with torch.autocast(device.type, enabled=False):
            for work in self.works:
                values, missing = batch.pop(work.name + FOUND, None), batch.pop(work.name + MISSING, None)
                if missing is not None:
                    inputs = [batch.pop(name) for name in work.inputs if name in batch]
                    computed = self._compute(work, inputs, batch.pop(work.name + KEYS))
                    values = computed if values is None else values.index_copy(0, missing, computed)
                if values is not None:
                    batch[work.name] = values
                    self.found[work.name] += len(values) - (0 if missing is None else len(missing))
        return batch

    def flush(self) -> None:
        """Write what is not yet on disk: call it when training ends."""
        for store in self.stores.values():
            store.flush()

    def summary(self) -> str:
        """What the cache was good for, in one line."""
        return "Frozen work: " + ", ".join(
            f"{name} {self.found[name]:,} found and {self.computed[name]:,} computed" for name in self.stores
        )

    def _compute(self, work, inputs, keys):
        """(m, ...) results for (m, ...) inputs, in the cache's dtype."""
        store, device = self.stores[work.name], inputs[0].device
        keys = [key.tobytes() for key in keys.cpu().numpy()]
        # since the workers looked, a batch before this one, or another process, may have brought some
        values, missing = store.read(keys)
        self.found[work.name] += len(keys) - len(missing)
        if not missing:
            return values.to(device)
        rows = torch.tensor(missing, device=device)
        half = self.precision != torch.float32
        with torch.autocast(device.type, self.precision if half else None, enabled=half):
            computed = work.compute(*[tensor[rows] for tensor in inputs]).to(store.dtype)
        self.computed[work.name] += len(missing)
        store.add([keys[position] for position in missing], computed)
        return computed if values is None else values.to(device).index_copy(0, rows, computed)


class CachedCollate:
    """A collate whose batches hold kept results, as far as there are any, in the place of what they are computed from.

    Made by `FrozenCache.attach`. For every work it replaces the inputs by NAME.found (n, ...), absent if nothing was
    found; and, unless all was, NAME.missing (m,) rows, NAME.keys (m, 16), and the inputs of these rows alone.

    Args:
        collate: with `prepare(sample, generator)`, and a call that makes a batch of rows.
        works: list of (name, names of inputs, TensorStore).
    """

    collate: "Collate"
    works: Sequence[tuple[str, tuple[str, ...], TensorStore]]

    def __init__(self, collate: "Collate", works: Sequence[tuple[str, tuple[str, ...], TensorStore]]):
        self.collate, self.works = collate, works

    def prepare(self, sample: "Sample", generator: torch.Generator) -> dict[str, Any]:
        return self.collate.prepare(sample, generator)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        for name, inputs, store in self.works:
            given = {each: batch.pop(each) for each in inputs if each in batch}
            if not given:
                continue
            keys = [content_key(*parts) for parts in zip(*given.values(), strict=True)]
            values, missing = store.read(keys)
            if values is not None:
                batch[name + FOUND] = values
            if missing:
                batch |= {each: tensor[missing] for each, tensor in given.items()}
                batch[name + MISSING] = torch.tensor(missing)
                batch[name + KEYS] = keys_as_tensor([keys[position] for position in missing])
        return batch


def find_frozen_work(stage: "Stage") -> list[FrozenWork]:
    """The works of a stage that give the same for the same input all through its training, as a list of FrozenWork."""
    encoder, works = stage.text_encoder, []
    vision = encoder.vision_model.model
    blocks = nn.ModuleList([vision.embeddings, vision.pre_layrnorm, *vision.encoder.layers[:-1]])
    frozen = not any(parameter.requires_grad for parameter in blocks.parameters())
    vision_config = encoder.config.vision_config
    if frozen and not vision_config.attention_dropout:
        # these gather a layer's weights in all processes at once, and only some may have images to compute
        if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            logger.warning("States of the vision tower are not kept under FSDP and DeepSpeed.")
        else:
            config, inputs = vision_config.to_dict(), ("pixel_values",)
            works.append(FrozenWork("vision_states", inputs, blocks, config, stage.vision_states))
    if isinstance(stage, InstructStage):
        vae, inputs = stage.vae, ("target_pixel_values",)
        modules = nn.ModuleList(part for part in (vae.encoder, vae.quant_conv) if part is not None)
        config = dict(vae.config)
        works.append(FrozenWork("latent_parameters", inputs, modules, config, stage.latent_parameters))
    if isinstance(stage, AlignStage):
        modules, inputs = nn.ModuleList([stage.target]), ("clip_input_ids", "clip_attention_mask")
        config = stage.target.config.to_dict()
        works.append(FrozenWork("clip_embeds", inputs, modules, config, stage.clip_embeds))
    return works


def _fingerprint(work, mixed_precision, dtype):
    """Hexadecimal hash of all that decides what a work gives and how it is kept, but for its input."""
    names = [name for name in work.config if not name.startswith("_") and name not in NOT_ARCHITECTURE]
    config = {name: work.config[name] for name in names}
    described = [FORMAT_VERSION, work.name, mixed_precision, str(dtype), config]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(work.modules.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()
