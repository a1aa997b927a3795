"""The settings of a training run: one flat dataclass. TOML files and the command line are read from its fields."""

import argparse
import json
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path

from ..files import written_atomically

STAGES = ("pretrain", "align", "instruct")


def knob(default, text, choices=None, fixed=True, value=None):
    """A field with its help and the name of its `value` there.

    `fixed` ones change what is learned: a run that goes on must keep them.
    """
    metadata = {"help": text, "choices": choices, "fixed": fixed, "value": value}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Defaults are the paper's (sec. 3 and app. A) where it has any; STAGE_DEFAULTS has each stage's.

    Raises:
        TypeError: a value of another type than its field's.
        ValueError: a value out of range.
    """

    stage: str = knob("", "what is trained: the command's word, kept with the run", ("", *STAGES))
    model: str = knob("", "pipeline folder or Hub id to start from", value="MODEL")
    output: str = knob("", "folder of the run: checkpoints, log, samples", fixed=False, value="FOLDER")
    data: tuple[str, ...] = knob((), "where samples come from; docs/data.md has the forms", value="SOURCE")
    data_weights: tuple[float, ...] = knob(
        (), "how often each of them is drawn (default: all alike)", value="WEIGHT"
    )
    words: tuple[str, ...] = knob(
        (), "instruct: sources of stage 1 to go on with, so that the model keeps its words", value="SOURCE"
    )
    words_share: float = knob(0.1, "instruct: share of the batches that come from --words")
    words_weight: float = knob(0.1, "instruct: factor of the loss of these batches")
    target: str = knob(
        "",
        "align: Stable Diffusion whose text encoder is imitated, folder or Hub id (default: the model's own)",
        value="MODEL",
    )
    resolution: int = knob(
        0, "instruct: side of the pictures to draw, in pixels (default: what the U-Net was trained for)"
    )
    max_text_tokens: int = knob(
        0, "leave out longer samples (default: align 85, instruct 128, pretrain none)"
    )
    min_side: int = knob(0, "leave out captioned pictures of TSV rows with a smaller side, in pixels")
    entity_dropout: float = knob(0.5, "probability that the words of a cut-out entity are dropped")
    background_probability: float = knob(0.5, "probability that a cut-out keeps its background")
    max_bad_samples: float = knob(0.01, "largest share of samples that may be unreadable", fixed=False)
    bucket_window: int = knob(8, "batches whose samples are sorted by length together; 1 is off")
    workers: int = knob(2, "processes that decode pictures", fixed=False)
    cache: str = knob(
        "", "folder that keeps the work of frozen models (default: none)", fixed=False, value="FOLDER"
    )

    steps: int = knob(300_000, "optimizer steps")
    batch_size: int = knob(16, "samples of a process and forward pass")
    accumulation: int = knob(1, "forward passes of an optimizer step")
    lr: float = knob(1e-3, "peak learning rate")
    lr_schedule: str = knob("linear", "decay of the learning rate to zero", ("linear", "cosine", "constant"))
    warmup_steps: int = knob(375, "optimizer steps until the peak learning rate")
    adam_beta1: float = knob(0.9, "of AdamW")
    adam_beta2: float = knob(0.98, "of AdamW")
    adam_epsilon: float = knob(1e-6, "of AdamW")
    weight_decay: float = knob(0.01, "of AdamW")
    max_grad_norm: float = knob(2.0, "gradients are clipped to this norm; 0 is off")
    ema_decay: float = knob(0.0, "of the average of the weights that checkpoints hold; 0 is off")
    condition_dropout: float = knob(0.1, "instruct: probability that a sample trains without its prompt")
    train_vision: str = knob(
        "last", "pretrain, instruct: blocks of the vision tower that train", ("none", "last", "all")
    )
    lora_rank: int = knob(0, "instruct: train adapters of this rank instead of the weights; 0 is off")
    seed: int = knob(0, "of data order, noise and dropout")

    mixed_precision: str = knob("no", "dtype of the forward pass", ("no", "fp16", "bf16"))
    gradient_checkpointing: bool = knob(False, "recompute layers to save memory", fixed=False)
    log_every: int = knob(10, "optimizer steps between lines of the log", fixed=False)
    save_every: int = knob(1000, "optimizer steps between checkpoints", fixed=False)
    keep_checkpoints: int = knob(2, "older ones are removed; 0 keeps all", fixed=False)
    sample_every: int = knob(0, "optimizer steps between grids of samples; 0 is off", fixed=False)
    sample_prompts: str = knob(
        "",
        'JSON file of prompts to draw: ["a dog", [{"image": "dog.png"}, "in the snow"]]',
        fixed=False,
        value="FILE",
    )
    tracker: str = knob("", "log there, too", ("", "tensorboard", "wandb"), fixed=False)

    def __post_init__(self):
        for entry in fields(self):
            object.__setattr__(self, entry.name, _check_type(entry, getattr(self, entry.name)))
        for name in ("steps", "batch_size", "accumulation", "bucket_window", "log_every", "save_every"):
            self._check_range(name, 1)
        for name in ("warmup_steps", "workers", "keep_checkpoints", "sample_every", "lora_rank", "seed"):
            self._check_range(name, 0)
        for name in ("resolution", "max_text_tokens", "min_side"):
            self._check_range(name, 0)
        for name in ("lr", "adam_epsilon", "weight_decay", "max_grad_norm", "words_weight"):
            self._check_range(name, 0)
        for name in ("entity_dropout", "background_probability", "max_bad_samples", "condition_dropout"):
            self._check_range(name, 0, 1)
        self._check_range("words_share", 0.001, 0.999)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._check_range(name, 0, 0.999999)
        for entry in fields(self):
            choices, value = entry.metadata["choices"], getattr(self, entry.name)
            if choices and value not in choices:
                known = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{entry.name} is {value!r}. Expected one of {known}.")

    def _check_range(self, name, low, high=float("inf")):
        value = getattr(self, name)
        if not low <= value <= high or math.isinf(value):
            expected = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise ValueError(f"{name} is {value!r}. Expected {expected}.")

    @classmethod
    def from_toml(cls, path, stage=None, **overrides):
        """Settings of a TOML file, with `overrides` over them and the defaults of `stage` under them.

        Raises:
            ValueError: no such file, not TOML, a table in it, or a key that is not a setting (named, with its neighbours).
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"There is no configuration file at {str(path)!r}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}. Expected lines such as lr = 1e-4.") from error
        return cls.from_dict({**values, **overrides}, stage, str(path))

    @classmethod
    def from_dict(cls, values, stage=None, source="The configuration"):
        """Settings of a dict over the defaults of `stage`; `source` begins the errors.

        Raises:
            ValueError: a key that is not a setting, a value out of range, or settings of another stage.
            TypeError: a value of another type.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            near = {name: get_close_matches(name, known, 1) for name in unknown}
            named = ", ".join(
                f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in unknown
            )
            raise ValueError(
                f"{source} has unknown settings: {named}. kosmos-g train align --help lists all of them."
            )
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

    def save(self, path):
        """Write the settings as JSON, atomically."""
        with written_atomically(path) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; ValueError if it is something else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} holds no settings of a run ({error}). Is it another program's?"
            ) from error
        return cls.from_dict(values, source=str(path))

    def check_resumes(self, earlier, folder):
        """Raise ValueError if a run with the settings `earlier` in `folder` must not be resumed with these."""
        changed = [
            f"{entry.name} (was {getattr(earlier, entry.name)!r}, now {getattr(self, entry.name)!r})"
            for entry in fields(self)
            if entry.metadata["fixed"] and getattr(self, entry.name) != getattr(earlier, entry.name)
        ]
        if changed:
            raise ValueError(
                f"The run in {folder} has other settings: {', '.join(changed)}. Continue with the settings it was begun "
                "with, or give a new run another --output."
            )

    def replace(self, **changes):
        """A copy with some settings changed."""
        return replace(self, **changes)


# kosmos-g.md's table of the paper; what a stage does not name is the default above
STAGE_DEFAULTS = {
    "pretrain": {"lr": 2e-4, "steps": 300_000},
    "align": {"lr": 1e-3, "steps": 300_000, "batch_size": 56},
    "instruct": {"lr": 1e-3, "steps": 200_000, "batch_size": 16},
}


# Headings of the flags in --help, by the first setting under each
GROUPS = {
    "model": "model and data",
    "steps": "what is learned",
    "mixed_precision": "how it runs",
}


def add_arguments(parser, stage=None):
    """Give an argparse parser a flag for each setting; those not given are absent from its result.

    Args:
        parser: argparse.ArgumentParser.
        stage: name whose defaults the help shows; there is no flag for the stage itself.
    """
    defaults = TrainConfig(**STAGE_DEFAULTS.get(stage, {}))
    group = parser
    for entry in fields(TrainConfig):
        if entry.name == "stage":
            continue
        if entry.name in GROUPS:
            group = parser.add_argument_group(GROUPS[entry.name])
        flag, text = "--" + entry.name.replace("_", "-"), entry.metadata["help"]
        default, choices = getattr(defaults, entry.name), entry.metadata["choices"]
        if default not in ("", (), 0, False) and "(default:" not in text:
            text += f" (default: {default:g})" if entry.type is float else f" (default: {default})"
        options = {"dest": entry.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if entry.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif entry.type in (tuple[str, ...], tuple[float, ...]):
            (inner, _), metavar = entry.type.__args__, entry.metadata["value"]
            group.add_argument(flag, nargs="+", type=inner, metavar=metavar, **options)
        elif choices:
            named = "|".join(choice for choice in choices if choice)
            group.add_argument(flag, choices=choices, metavar=named, **options)
        else:
            metavar = entry.metadata["value"] or {int: "N", float: "NUMBER"}[entry.type]
            group.add_argument(flag, type=entry.type, metavar=metavar, **options)


def _check_type(entry, value):
    """The value, a list as a tuple and an int for a float as a float; TypeError if it is of another type."""
    if entry.type in (tuple[str, ...], tuple[float, ...]):
        inner = entry.type.__args__[0]
        if isinstance(value, (list, tuple)):
            return tuple(_check_value(entry, item, inner) for item in value)
        raise TypeError(f"{entry.name} is {value!r}. Expected a list of {inner.__name__} values.")
    return _check_value(entry, value, entry.type)


def _check_value(entry, value, kind):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(
            f"{entry.name} is {value!r} ({type(value).__name__}). Expected {kind.__name__}, such as "
            f"{entry.name} = {json.dumps(entry.default) if entry.default not in ('', ()) else repr('...')}."
        )
    return value
