"""`kosmos-g train STAGE --rehearse`: a run is tried before it costs anything, and what it will take is told."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...conversion.target import load_target
from ...data import Source
from ...data.making.show import show
from ...environment import default_device
from ..config import TrainConfig
from ..model_folder import locate_model
from ..run import process_state
from .counting import GIB, SPARE, Cost, Shape, Sizes, count
from .trial import TIMED, machine_memory, run_trial

MOST_PROPOSALS = 3
SHOWN_ON_A_PAGE, READ_FOR_A_PAGE = 50, 500
ADAPTER_RANK = 16


@dataclass(frozen=True)
class Proposal:
    """Settings with which a run fits.

    Attributes:
        changes: name -> value, of TrainConfig.
        counted: bytes by count, what is to be left free included.
        figures: of `run_trial` with them.
    """

    changes: dict[str, Any]
    counted: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found; `report.describe` says it in words.

    Attributes:
        config: TrainConfig of the run.
        figures: of `run_trial`; has `error` alone where the trial failed.
        shape: largest sample, or None.
        cost: by count, for a GPU, of such samples; None where none was asked for.
        operations: of a sample as long as the mean of those that were looked at; None as `cost`.
        for_memory: GiB of the GPU that was asked for, or of the one that is there; None on a CPU, but where a trial took all of
            its memory.
        price: of an hour of a GPU, or None.
        proposals: where memory is short.
    """

    config: TrainConfig
    figures: dict[str, Any]
    shape: Shape | None = None
    cost: Cost | None = None
    for_memory: float | None = None
    price: float | None = None
    operations: float | None = None
    proposals: list[Proposal] = field(default_factory=list)

    @property
    def samples_a_step(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.figures.get("processes", 1)

    @property
    def step_seconds(self) -> float:
        """Of a step: what was measured, or what the readers of data take, if they are slower."""
        reading = 0.0
        if self.config.workers:
            reading = self.figures["read_seconds"] * self.config.accumulation / self.config.workers
        return max(self.figures["step_seconds"], reading)

    @property
    def run_seconds(self) -> float:
        """Of the whole run, checkpoints and sheets included."""
        config, figures = self.config, self.figures
        seconds = config.steps * self.step_seconds
        seconds += config.steps / config.save_every * figures["save_seconds"]
        if config.sample_every and figures["sheet_seconds"] is not None:
            seconds += config.steps / config.sample_every * figures["sheet_seconds"]
        return seconds

    @property
    def counted_bytes(self) -> float:
        """Of a GPU, with what is to be left free."""
        return self.cost.memory(self.config) / (1 - SPARE)

    @property
    def is_short(self) -> bool:
        """Whether memory does not suffice: in the trial, or by count on the GPU that was asked for."""
        if self.figures.get("memory"):
            return True
        return (
            self.for_memory is not None
            and self.cost is not None
            and self.counted_bytes > self.for_memory * GIB
        )


def rehearse(
    name: str,
    config: TrainConfig,
    sources: Sequence[Source] | None = None,
    *,
    for_memory: float | None = None,
    price: float | None = None,
    say: Callable[[str], object] = lambda text: None,
    timed: int = TIMED,
) -> Rehearsal:
    """Try a run without writing into it: its data, its largest batch, some steps, a checkpoint, a sample sheet.

    Args:
        name, config, sources: as `run_stage`. With sources, or on several processes, the trial is made in this process;
            otherwise in one of its own, which may run out of memory.
        for_memory: GiB of a GPU to count for; None takes the one that is there.
        price: of an hour of a GPU.
        say: called with what is being done.
        timed: steps that are timed.

    Raises:
        ValueError, TypeError, OSError: what ends the run itself would.
    """
    config = config.replace(stage=name)
    apart = sources is None and process_state().num_processes == 1
    say("Trying the first steps in a temporary folder ...")
    figures = _try_apart(config) if apart else run_trial(name, config, sources, timed)
    if not figures.get("memory") and "error" in figures:
        raise ValueError(figures["error"])
    if for_memory is None and default_device() == "cuda":
        for_memory = torch.cuda.mem_get_info()[1] / GIB
    if for_memory is None and figures.get("memory"):
        for_memory = machine_memory() / GIB
    if figures.get("memory"):
        shape = _shape_without_trial(config)
    else:
        largest = max(figures["sources"], key=lambda each: each["tokens"])
        shape = Shape(largest["tokens"], largest["images"], _side(config))
    found = Rehearsal(config, figures, shape, None, for_memory, price)
    if for_memory is not None or figures.get("memory"):
        say("Counting what a GPU would need ...")
        sizes = Sizes.of_folder(name, locate_model(config.model), config.target)
        cost = count(config, sizes, shape)
        operations = (
            cost.operations if "error" in figures else _typical_operations(config, figures, sizes, shape)
        )
        found = Rehearsal(config, figures, shape, cost, for_memory, price, operations)
        if found.is_short:
            found.proposals.extend(_propose(found, sizes, sources, apart, say))
    return found


def write_pages(config: TrainConfig, folder: str | Path) -> list[Path]:
    """Write a page for each source of a run into a folder, as `kosmos-g data show` does: its samples as training reads them."""
    model, pages = locate_model(config.model), []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, line in enumerate((*config.data, *config.words)):
        stage = config.stage if number < len(config.data) else "pretrain"
        options = {"model": model, "stage": stage, "resolution": _side(config) or 512, "seed": config.seed}
        if stage == "align":
            options["target_tokenizer"] = load_target(config.target or model)[1]
        page, _ = show(
            line,
            Path(folder) / f"data-{number}.html",
            samples=SHOWN_ON_A_PAGE,
            read=READ_FOR_A_PAGE,
            **options,
        )
        pages.append(page)
    return pages


def _typical_operations(config, figures, sizes, shape):
    """Operations of a sample of the mean length, over the sources as the run draws them."""
    weights = config.data_weights or (1.0,) * len(config.data)
    sources = figures["sources"][: len(weights)] or figures["sources"]
    weights = weights if len(weights) == len(sources) else (1.0,) * len(sources)
    pairs = list(zip(sources, weights, strict=True))
    tokens, images = (
        sum(source[name] * weight for source, weight in pairs) / sum(weights)
        for name in ("mean_tokens", "mean_images")
    )
    return count(config, sizes, Shape(round(tokens), images, shape.side)).operations


def _try_apart(config):
    """What `run_trial` finds in a process of its own; `memory` is True if the system ended it."""
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder) / "settings.json", Path(folder) / "result.json"
        config.save(settings)
        command = [sys.executable, "-m", "kosmos_g_diffusers.training.rehearsal.trial", settings, result]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    if done.returncode in (-9, 137):  # the system's way when memory is gone
        return {"error": "The system ended the trial: main memory is full.", "memory": True}
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"error": f"The trial ended early: {lines[-1]}", "memory": False}


def _propose(found, sizes, sources, apart, say) -> Iterator[Proposal]:
    """Settings that fit by count and were tried, the least different first."""
    config, limit, proposed = found.config, found.for_memory, 0
    for changes in _ways(config):
        changed = config.replace(**changes)
        cost = count(changed, sizes, found.shape)
        while cost.memory(changed) / (1 - SPARE) > limit * GIB and changed.batch_size % 2 == 0:
            halved = {"batch_size": changed.batch_size // 2, "accumulation": changed.accumulation * 2}
            changed = changed.replace(**halved)
        counted = cost.memory(changed) / (1 - SPARE)
        if counted > limit * GIB:
            continue
        before, after = asdict(config), asdict(changed)
        changes = {name: value for name, value in after.items() if value != before[name]}
        say(f"Trying {describe_changes(changes)} ...")
        figures = _try_apart(changed) if apart else run_trial(config.stage, changed, sources, 2)
        if "error" in figures:
            continue
        yield Proposal(changes, counted, figures)
        proposed += 1
        if proposed == MOST_PROPOSALS:
            return


def _ways(config):
    """Changes to try, smaller batches apart, from those that change nothing of what is learned."""
    saving = {} if config.gradient_checkpointing else {"gradient_checkpointing": True}
    eight = {} if config.optimizer == "adamw8bit" else {"optimizer": "adamw8bit"}
    yield {}
    if saving:
        yield saving
    if eight:
        yield {**saving, **eight}
    if config.stage == "instruct" and not config.lora_rank:
        yield {**saving, "lora_rank": ADAPTER_RANK}


def describe_changes(changes: dict[str, Any]) -> str:
    """Settings as flags of the command line."""
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in changes.items()
    ]
    return " ".join(flags) or "the settings as they are"


def _side(config):
    """Side of the images to draw, in pixels, of stage 3; of others it does not matter."""
    if config.resolution:
        return config.resolution
    if config.stage != "instruct":
        return 0
    folder = locate_model(config.model)
    sizes = Sizes.of_folder("instruct", folder)
    return sizes.unet["sample_size"] * 2 ** (len(sizes.vae["block_out_channels"]) - 1)


def _shape_without_trial(config):
    """A sample as large as the stage's limit allows, with two images in stages that have some."""
    limits = {"pretrain": 128, "align": 85, "instruct": 128}
    text, images = config.max_text_tokens or limits[config.stage], 0 if config.stage == "align" else 2
    sizes = Sizes.of_folder("pretrain", locate_model(config.model))
    return Shape(text + images * (sizes.text_encoder.latent_query_num + 2), images, _side(config))
