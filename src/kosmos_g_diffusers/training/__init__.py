"""Training of Kosmos-G: the three stages of the paper, their data, and one loop. docs/training.md shows how.

The names below are imported when they are first used: the loop needs accelerate, and what merely reads weights does not.
"""

from importlib import import_module

_MODULES = {
    "TrainConfig": ".config",
    "build_run": ".run",
    "run_stage": ".run",
    "train": ".loop",
    "TrainingStopped": ".loop",
    "PretrainStage": ".stages",
    "AlignStage": ".stages",
    "InstructStage": ".stages",
    "AlignerNetN": "..modeling_aligner_n",
    "load_target": "..conversion.target",
    "load_adapter": ".adapters",
    "merge_adapter": ".adapters",
    "remove_adapter": ".adapters",
}
__all__ = sorted(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__():
    return [*globals(), *__all__]
