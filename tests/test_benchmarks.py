# ruff: noqa: F811  fixtures are imported, and used by the names of arguments
"""The benchmark of training steps runs at tiny size, and counts the products that there are."""

import importlib
from pathlib import Path

import pytest
import torch
from support.training_runs import fresh_accelerator  # noqa: F401  a fixture


@pytest.fixture
def training_steps(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("training_steps")


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_steps_are_timed_next_to_their_products_and_a_plain_loop(training_steps, fresh_accelerator, stage):
    torch.manual_seed(0)
    seconds, rest = training_steps.measure(*training_steps.build(stage, 1, tiny=True), rounds=1)
    assert set(seconds) == {"package's loop", "products", "plain loop", "products beside it"}
    assert all(len(values) == 1 and values[0] > 0 for values in seconds.values())
    assert 0 < sum(share for share, _ in rest) <= 1


def test_products_of_a_step_are_counted_and_computed_again(training_steps):
    layer, inputs = torch.nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
    queries = torch.randn(2, 3, 7, 8, requires_grad=True)
    with training_steps.Recorder() as recorder:
        layer(inputs).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(queries, queries, queries).sum().backward()
    counted = {}
    for (function, described), number in recorder.products.items():
        shapes = [value for kind, value, *_ in described if kind == "tensor"]
        left, right = shapes[-2:]
        operations = 2 * torch.Size(left).numel() * right[-1] * number
        name = "attention" if function is torch.ops.aten.bmm.default else "layer"
        counted[name] = counted.get(name, 0) + operations
    # a layer: forward, to its inputs, to its weights; attention: two products forward, five backward
    assert counted == {"layer": 3 * 2 * 5 * 3 * 4, "attention": 7 * 2 * 2 * 3 * 7 * 7 * 8}
    replay = training_steps.make_replay(recorder.products)
    with training_steps.Recorder() as again:
        replay()
    assert sum(again.products.values()) == sum(recorder.products.values())
