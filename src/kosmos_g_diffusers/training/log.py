"""What a run says while it trains: log.jsonl, the progress bar's numbers, and a tracker such as tensorboard."""

import json
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from accelerate.utils import is_tensorboard_available, is_wandb_available

from ..files import write_text, written_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainConfig

WANDB_ID = "wandb-id.txt"


def check_tracker(tracker: str) -> None:
    """ImportError if the tracker of this name is not installed; "" is none."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if tracker and not available[tracker]():  # accelerate would log nothing and say nothing
        raise ImportError(
            f"The tracker {tracker} is not installed. Install it: pip install {tracker}. Or leave --tracker out: "
            "log.jsonl in the run's folder has the same numbers."
        )


class Log:
    """log.jsonl of the main process, without the lines of steps that a resumed run makes again; and the tracker."""

    path: Path
    accelerator: "Accelerator"
    samples: int
    step: int
    time: float

    def __init__(self, config: "TrainConfig", step: int, accelerator: "Accelerator"):
        self.path, self.accelerator = Path(config.output) / "log.jsonl", accelerator
        self.samples = config.batch_size * config.accumulation * accelerator.num_processes
        self.step, self.time = step, time.perf_counter()
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            # the last line may have been cut off
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
            with written_atomically(self.path) as file:
                file.write(b"".join(kept))
        if config.tracker:
            settings = {name: _plain(value) for name, value in asdict(config).items()}
            # what an earlier part of the run logged of steps that are made again is hidden
            options = {"tensorboard": {"purge_step": step + 1}}
            if config.tracker == "wandb" and accelerator.is_main_process:
                # of one id W&B makes one run, and takes a step once
                options["wandb"] = {"id": _wandb_id(self.path.parent), "resume": "allow"}
                options["wandb"] |= {"dir": config.output, "name": Path(config.output).name}
            accelerator.init_trackers("kosmos-g", settings, options)

    def write(
        self,
        step: int,
        losses: Mapping[str, torch.Tensor],
        lr: float,
        grad_norm: torch.Tensor,
        left_out: Mapping[str, int],
        passed_over: int = 0,
    ) -> dict[str, str]:
        """Log the means over processes; returns what the progress bar shows.

        Args:
            left_out: cause -> number of samples that were left out up to here.
            passed_over: steps up to here whose gradients overflowed float16.
        """
        names = sorted(losses)
        means = self.accelerator.reduce(torch.stack([losses[name] for name in names]), "mean")
        losses = dict(zip(names, means.tolist(), strict=True))
        now = time.perf_counter()
        rate = (step - self.step) * self.samples / (now - self.time)
        self.step, self.time = step, now
        values = {
            **losses,
            "lr": lr,
            "grad_norm": float(grad_norm or 0),
            "samples_per_second": round(rate, 3),
        }
        self.accelerator.log({**values, "left_out": sum(left_out.values())}, step=step)
        if self.accelerator.is_main_process:
            # JSON knows no number that is not finite
            line = {name: value if math.isfinite(value) else None for name, value in values.items()}
            line |= {"left_out": dict(left_out)} if left_out else {}
            line |= {"passed_over": passed_over} if passed_over else {}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        return {name: f"{value:.4f}" for name, value in losses.items()} | {"samples/s": f"{rate:.1f}"}

    def show(self, step: int, path: Path) -> None:
        """Give an image to the tracker as well."""
        for tracker in self.accelerator.trackers:
            image = PIL.Image.open(path).convert("RGB")
            if tracker.name == "tensorboard":
                image = np.asarray(image)[None]
                tracker.log_images({"samples": image}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": [image]}, step=step)


def _wandb_id(run):
    """The id of a run at W&B, which its folder keeps."""
    path = run / WANDB_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _plain(value):
    """A setting as the trackers take it."""
    return value if isinstance(value, (bool, int, float, str)) else " ".join(map(str, value))
