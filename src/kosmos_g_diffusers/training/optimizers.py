"""The optimizers that a run can have: AdamW, and AdamW whose moments take 8 bits instead of 32."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .config import TrainConfig

MOMENT_BYTES = {
    "adamw": 8,
    "adamw8bit": 2,
}  # of both moments of a weight, by the names of TrainConfig.optimizer


def build_optimizer(config: "TrainConfig", parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a TrainConfig names, over some weights.

    Raises:
        ImportError: it is not installed.
    """
    options = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "optimizer = adamw8bit needs the package torchao: pip install -U torchao"
        ) from error

    class EightBit(AdamW8bit):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            device = self.param_groups[0]["params"][0].device
            if device.type != "cpu":
                return super().step(closure)
            with torch.compiler.set_stance("force_eager"):  # a CPU may have no compiler, and gains little
                return super().step(closure)

    return EightBit(list(parameters), **options)
