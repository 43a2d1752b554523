"""Where two models part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanovllm.cli.trace import Divergence, first_divergence, num_settled, recording


def modules(*rows: tuple[str, float, float]) -> list[Divergence]:
    return [Divergence(*row) for row in rows]


OK, BAD = 1e-7, 0.5


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([("l.0.mlp", OK, OK), ("l.0", OK, OK), ("l.1.mlp", OK, OK), ("l.1", OK, OK)], None),
        ([("l.0.mlp.up", OK, OK), ("l.0.mlp.down", OK, BAD), ("l.0.mlp", OK, BAD), ("l.0", OK, BAD)], "l.0.mlp.down"),
        # between up and down, where there is no module
        ([("l.0.mlp.up", OK, OK), ("l.0.mlp.down", BAD, BAD), ("l.0.mlp", OK, BAD), ("l.0", OK, BAD)], "l.0.mlp"),
        # what ends elsewhere in the reference, and harms nobody
        ([("embed", 0, BAD), ("l.0.mlp", OK, BAD), ("l.0", OK, OK), ("l.1.mlp", OK, BAD), ("l.1", OK, BAD)], "l.1.mlp"),
        ([("embed", 0, BAD), ("l.0.mlp", OK, BAD), ("l.0", OK, BAD)], "l.0.mlp"),
        ([("embed", 0, BAD), ("l.0.mlp", BAD, BAD), ("l.0", BAD, BAD)], "embed"),
        ([("l.0", OK, OK), ("norm", OK, OK), ("head", OK, BAD)], "head"),
        ([("l.0", OK, float("nan")), ("l.1", float("nan"), float("nan"))], "l.0"),
        ([("l.0", 2e-3, BAD)], "l.0"),
    ],
)  # fmt: skip
def test_the_module_at_fault(found, expected):
    first = first_divergence(modules(*found), 1e-3)
    assert (first and first.module) == expected


def test_what_a_block_that_agrees_has_settled():
    found = modules(("embed", 0, BAD), ("l.0.mlp", OK, BAD), ("l.0", OK, OK), ("l.1.mlp", OK, BAD), ("l.1", OK, BAD))
    assert num_settled(found, 1e-3) == 3


def test_recording_keeps_the_first_call_of_modules_with_parameters_by_order_of_their_ends():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)
            self.act = nn.ReLU()

        def forward(self, ids: torch.Tensor, *, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            self.inner(x * 2)
            out = self.act(self.inner(x))
            out.zero_()  # what was recorded is a copy
            return self.inner(x), None

    model = nn.Sequential()
    model.block = Block()
    model.forward = lambda ids, x: model.block(ids, x=x)
    x = torch.ones(1, 4, 2)
    with recording(model, 4) as trace:
        model(torch.zeros(1, 4, dtype=torch.int64), x)
    assert list(trace) == ["block.inner", "block"]
    assert torch.equal(trace["block.inner"].given, 2 * x[0])
    assert torch.equal(trace["block"].given, x[0])
    assert torch.equal(trace["block"].output, model.block.inner(x)[0])
    model(torch.zeros(1, 4, dtype=torch.int64), x * 5)
    assert torch.equal(trace["block"].given, x[0])  # the hooks are gone


def test_heads_may_come_before_tokens():
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.randn(1, 5, 3, 2)
    with recording(model, 3) as trace:
        model(x)
    assert torch.equal(trace["0"].given, x[0].transpose(0, 1).reshape(3, 10))


def test_what_has_no_row_for_each_token_is_not_compared():
    model = nn.Sequential(nn.Linear(2, 2))
    with recording(model, 3) as trace:
        model(torch.ones(4, 2))
    assert trace["0"].given is None and trace["0"].output is None
