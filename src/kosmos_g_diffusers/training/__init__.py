"""Training of Kosmos-G: the three stages of the paper, their data, and one loop. docs/training.md shows how."""

from typing import TYPE_CHECKING

from ..environment import lazy_names

if TYPE_CHECKING:
    from ..conversion.target import load_target
    from ..modeling_aligner_n import AlignerNetN
    from .adapters import load_adapter, merge_adapter, push_adapter, remove_adapter
    from .config import TrainConfig
    from .loop import TrainingStopped, train
    from .run import build_run, run_stage
    from .stages import AlignStage, InstructStage, PretrainStage

__all__ = [
    "AlignStage",
    "AlignerNetN",
    "InstructStage",
    "PretrainStage",
    "TrainConfig",
    "TrainingStopped",
    "build_run",
    "load_adapter",
    "load_target",
    "merge_adapter",
    "push_adapter",
    "remove_adapter",
    "run_stage",
    "train",
]

# the loop needs accelerate, and what merely reads weights does not
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "..conversion.target": "load_target",
        "..modeling_aligner_n": "AlignerNetN",
        ".adapters": "load_adapter merge_adapter push_adapter remove_adapter",
        ".config": "TrainConfig",
        ".loop": "TrainingStopped train",
        ".run": "build_run run_stage",
        ".stages": "AlignStage InstructStage PretrainStage",
    },
)
