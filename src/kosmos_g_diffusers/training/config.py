"""The settings of a training run: one flat dataclass. TOML files and the command line are read from its fields."""

import argparse
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..environment import as_dtype
from ..fields import CHOICE, RANGE, add_flags, find_problem, is_of_type, setting
from ..files import write_text

if TYPE_CHECKING:
    import torch

STAGES = ("pretrain", "align", "instruct")
# accelerate's name -> name of the dtype that the forward pass computes in
MIXED_PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Defaults are the paper's (sec. 3 and app. A) where it has any; STAGE_DEFAULTS has each stage's.

    Raises:
        TypeError: a value of another type than its field's.
        ValueError: a value out of range.
    """

    stage: str = setting("", "what is trained: the command's word, kept with the run", choices=("", *STAGES))
    model: str = setting("", "pipeline folder or Hub id to start from", metavar="MODEL")
    output: str = setting("", "folder of the run: checkpoints, log, samples", fixed=False, metavar="FOLDER")
    data: tuple[str, ...] = setting((), "where samples come from; forms: docs/data.md", metavar="SOURCE")
    data_weights: tuple[float, ...] = setting(
        (), "how often each of them is drawn (default: all alike)", metavar="WEIGHT"
    )
    words: tuple[str, ...] = setting(
        (),
        "instruct: sources of stage 1 to keep training on, so the model keeps its words",
        metavar="SOURCE",
    )
    words_share: float = setting(0.1, "instruct: share of the batches of --words", low=0.001, high=0.999)
    words_weight: float = setting(0.1, "instruct: factor of the loss of these batches", low=0)
    target: str = setting(
        "",
        "align: Stable Diffusion whose text encoder is imitated, folder or Hub id (default: the model's own)",
        metavar="MODEL",
    )
    resolution: int = setting(
        0, "instruct: side of the images to draw, in pixels (default: what the U-Net was trained for)", low=0
    )
    max_text_tokens: int = setting(
        0, "leave out longer samples (default: align 85, instruct 128, pretrain none)", low=0
    )
    min_side: int = setting(0, "leave out captioned images of TSV rows with a smaller side, in pixels", low=0)
    entity_dropout: float = setting(0.5, "probability that an entity's words are dropped", low=0, high=1)
    background_probability: float = setting(0.5, "probability of a cut-out with background", low=0, high=1)
    data_moved: bool = setting(False, "the same data lies elsewhere than when the run was begun", fixed=False)
    take_over: bool = setting(
        False, "the process that a run's folder names is gone, though its disk cannot tell", fixed=False
    )
    max_bad_samples: float = setting(0.01, "largest share of unreadable samples", fixed=False, low=0, high=1)
    bucket_window: int = setting(8, "batches whose samples are sorted by length together; 1 is off", low=1)
    workers: int = setting(2, "processes that decode images", fixed=False, low=0)
    cache: str = setting("", "keeps the work of frozen models (default: none)", fixed=False, metavar="FOLDER")

    steps: int = setting(
        300_000, "optimizer steps; more of them continue a run of a constant schedule", low=1
    )
    batch_size: int = setting(16, "samples of a process and forward pass", low=1)
    accumulation: int = setting(1, "forward passes of an optimizer step", low=1)
    lr: float = setting(1e-3, "peak learning rate", low=0)
    lr_schedule: str = setting(
        "linear", "decay of the learning rate to zero", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = setting(375, "optimizer steps until the peak learning rate", low=0)
    optimizer: str = setting(
        "adamw", "adamw8bit keeps its moments in 8 bits (needs torchao)", choices=("adamw", "adamw8bit")
    )
    adam_beta1: float = setting(0.9, "of AdamW", low=0, high=0.999999)
    adam_beta2: float = setting(0.98, "of AdamW", low=0, high=0.999999)
    adam_epsilon: float = setting(1e-6, "of AdamW", low=0)
    weight_decay: float = setting(0.01, "of AdamW", low=0)
    max_grad_norm: float = setting(2.0, "gradients are clipped to this norm; 0 is off", low=0)
    ema_decay: float = setting(0.0, "of the averaged weights in checkpoints; 0 is off", low=0, high=0.999999)
    condition_dropout: float = setting(0.1, "instruct: probability of a sample without prompt", low=0, high=1)
    train_vision: str = setting(
        "last", "pretrain, instruct: blocks of the vision tower that train", choices=("none", "last", "all")
    )
    lora_rank: int = setting(0, "instruct: train adapters of this rank, not the weights; 0 is off", low=0)
    seed: int = setting(0, "of data order, noise and dropout", low=0)

    mixed_precision: str = setting("no", "dtype of the forward pass", choices=tuple(MIXED_PRECISIONS))
    gradient_checkpointing: bool = setting(False, "recompute layers to save memory", fixed=False)
    log_every: int = setting(10, "optimizer steps between lines of the log", fixed=False, low=1)
    save_every: int = setting(1000, "optimizer steps between checkpoints", fixed=False, low=1)
    keep_checkpoints: int = setting(2, "older ones are removed; 0 keeps all", fixed=False, low=0)
    sample_every: int = setting(0, "optimizer steps between grids of samples; 0 is off", fixed=False, low=0)
    sample_prompts: str = setting(
        "",
        'JSON file of prompts to draw: ["a dog", [{"image": "dog.png"}, "in the snow"]]',
        fixed=False,
        metavar="FILE",
    )
    tracker: str = setting("", "log there, too", choices=("", "tensorboard", "wandb"), fixed=False)

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _checked(entry, getattr(self, entry.name)))

    @property
    def dtype(self) -> "torch.dtype":
        """The torch dtype that `mixed_precision` names."""
        return as_dtype(MIXED_PRECISIONS[self.mixed_precision])

    @classmethod
    def from_toml(cls, path: str | Path, stage: str | None = None, **overrides: Any) -> Self:
        """Settings of a TOML file, with `overrides` over them and the defaults of `stage` under them.

        Raises:
            ValueError: no such file, not TOML, a table in it, or a key that is not a setting (named, with its neighbours).
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise ValueError(f"There is no configuration file at {str(path)!r}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}. Expected lines such as lr = 1e-4.") from error
        return cls.from_dict({**values, **overrides}, stage, str(path))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], stage: str | None = None, source: str = "The configuration"
    ) -> Self:
        """Settings of a dict over the defaults of `stage`; `source` begins the errors.

        Raises:
            ValueError: a key that is not a setting, a value out of range, or settings of another stage.
            TypeError: a value of another type.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            near = ((name, get_close_matches(name, known, 1)) for name in unknown)
            named = ", ".join(f"{name} (did you mean {found[0]}?)" if found else name for name, found in near)
            raise ValueError(f"{source} has unknown settings: {named}. All: kosmos-g train align --help.")
        if stage is not None and values.get("stage", stage) not in ("", stage):
            raise ValueError(
                f"{source} is for the stage {values['stage']!r}, and {stage!r} was asked for. "
                f"Run kosmos-g train {values['stage']}, or pass settings for {stage}."
            )
        values = {**STAGE_DEFAULTS.get(stage, {}), **values, **({"stage": stage} if stage else {})}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{source}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; ValueError if it is something else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no settings of a run ({error}). Another program's?") from error
        return cls.from_dict(values, source=str(path))

    def check_resumes(self, earlier: "TrainConfig", folder: str | Path) -> None:
        """Raise ValueError if a run with the settings `earlier` in `folder` must not be resumed with these."""
        moved = (
            ("data", "words") if self.data_moved else ()
        )  # the checkpoint says how many samples there were
        fixed = [
            entry.name
            for entry in fields(self)
            if entry.metadata.get("fixed", True) and entry.name not in moved
        ]
        pairs = [(name, getattr(earlier, name), getattr(self, name)) for name in fixed]
        changed = {name: (old, new) for name, old, new in pairs if old != new}
        constant = earlier.lr_schedule == self.lr_schedule == "constant"
        if constant and self.steps > earlier.steps:  # the rate of no step depends on how many follow
            changed.pop("steps", None)
        if not changed:
            return
        text = ", ".join(f"{name} (was {old!r}, now {new!r})" for name, (old, new) in changed.items())
        advice = "Continue with the settings it was begun with, or give a new run another --output."
        if list(changed) == ["steps"] and not constant:
            advice = (
                f"With the {earlier.lr_schedule} schedule the learning rate of every step depends on them. To train on, begin a "
                f"new run from its last checkpoint: pass {folder}/checkpoint-... as --model, with another --output. Only with "
                "--lr-schedule constant can a run be made longer."
            )
        raise ValueError(f"The run in {folder} has other settings: {text}. {advice}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return replace(self, **changes)


# kosmos-g.md's table of the paper; what a stage does not name is the default above
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {"lr": 2e-4, "steps": 300_000},
    "align": {"lr": 1e-3, "steps": 300_000, "batch_size": 56},
    "instruct": {"lr": 1e-3, "steps": 200_000, "batch_size": 16},
}


# Headings of the flags in --help, by the first setting under each
GROUPS = {"model": "model and data", "steps": "what is learned", "mixed_precision": "how it runs"}


def add_arguments(parser: argparse.ArgumentParser, stage: str | None = None) -> None:
    """Give an argparse parser a flag for each setting; those not given are absent from its result.

    Args:
        parser: argparse.ArgumentParser.
        stage: name whose defaults the help shows; there is no flag for the stage itself.
    """
    group = parser
    for entry in fields(TrainConfig):
        if entry.name in GROUPS:
            group = parser.add_argument_group(GROUPS[entry.name])
        add_flags(group, [entry], ("stage",), STAGE_DEFAULTS.get(stage, {}))


def _checked(entry, value):
    """The value, a list as a tuple and an int for a float as a float.

    Raises:
        TypeError, ValueError: it is of another type, none of the choices, or out of range.
    """
    kind, metadata = entry.type, entry.metadata
    if kind in (tuple[str, ...], tuple[float, ...]):
        kind = kind.__args__[0]
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{entry.name} is {value!r}. Expected a list of {kind.__name__} values.")
        return tuple(_checked_one(entry, item, kind) for item in value)
    value = _checked_one(entry, value, kind)
    problem, expected = find_problem(value, kind, **metadata), None
    if problem == CHOICE:
        expected = f"one of {', '.join(map(repr, metadata['choices']))}"
    elif problem == RANGE or (kind is float and math.isinf(value)):
        low, high = metadata["low"], metadata["high"]
        expected = f"at least {low}" if math.isinf(high) else f"{low} to {high}"
    if expected:
        raise ValueError(f"{entry.name} is {value!r}. Expected {expected}.")
    return value


def _checked_one(entry, value, kind):
    if not is_of_type(value, kind):
        example = json.dumps(entry.default) if entry.default not in ("", ()) else repr("...")
        raise TypeError(
            f"{entry.name} is {value!r} ({type(value).__name__}). Expected {kind.__name__}, such as {entry.name} = {example}."
        )
    return kind(value)
