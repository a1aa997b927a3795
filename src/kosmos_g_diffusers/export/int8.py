"""Weights in 8 bits for graphs: a scale for each row, products in the dtype of the states."""

import torch
from torch import nn


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 and a scale for each output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.scale = (nn.Buffer(one) for one in _rounded(linear.weight))
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(states, self.weight.to(states.dtype) * self.scale, self.bias)


class Int8Embedding(nn.Module):
    """A table whose rows are int8 and a scale for each of them."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight, self.scale = (nn.Buffer(one) for one in _rounded(embedding.weight))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., width)."""
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids]


def _rounded(weight):
    """(rows, columns) -> int8 and the (rows, 1) that they are multiplied with."""
    weight = weight.detach()
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().to(torch.int8), scale


def to_int8(module: nn.Module) -> None:
    """Replace all linear layers and embeddings below a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, Int8Embedding(child))
        else:
            to_int8(child)
