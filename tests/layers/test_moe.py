"""The mixture of experts against a loop over tokens, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import normal
from test_layers import context
from torch import nn

from nanovllm.errors import ModelNotSupported
from nanovllm.layers.moe import SparseMoE
from nanovllm.ops.base import select_ops
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.weights.loader import fill_dummy_weights

HIDDEN, INNER = 12, 7
TORCH = TorchOps()
MAKERS = pytest.mark.parametrize(
    "ops", [TORCH, select_ops("auto", torch.device("cpu"), torch.float32)], ids=lambda ops: ops.name
)


def build(num_experts: int, top_k: int, normalise=True, dtype=torch.float32, ops=TORCH, **options):
    ctx = dataclasses.replace(context(dtype), ops=ops)
    moe = SparseMoE(HIDDEN, INNER, num_experts, top_k, ctx, normalise=normalise, **options)
    fill_dummy_weights(moe)
    return moe


def by_token(moe: SparseMoE, normalise: bool, x: torch.Tensor) -> torch.Tensor:
    """One token, one expert at a time. moe: with weights that are not packed."""
    rows = []
    for token in x.double():
        scores = moe.gate.weight.double() @ token
        order = scores.argsort(descending=True)[: moe._top_k].tolist()
        weights = {e: (scores[e].exp() / scores.exp().sum()).item() for e in order}
        if normalise:
            weights = {e: w / sum(weights.values()) for e, w in weights.items()}
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for e in order:
            gate, up = (moe.experts[e].gate_up_proj.weight.double() @ token).chunk(2)
            row += weights[e] * (moe.experts[e].down_proj.weight.double() @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@MAKERS
@pytest.mark.parametrize("normalise", [False, True])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_moe_is_the_weighted_sum_of_the_chosen_experts(ops, normalise, data):
    num_experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    x = normal(data.draw(st.integers(1, 13)), HIDDEN, seed=data.draw(st.integers(0, 99)))
    plain, moe = (build(num_experts, top_k, normalise, ops=o) for o in (TORCH, ops))
    for parameter in (*plain.parameters(), *moe.parameters()):
        parameter.data.mul_(50)
    torch.testing.assert_close(moe(x).double(), by_token(plain, normalise, x), rtol=1e-4, atol=1e-4)


def test_each_active_expert_runs_once_on_its_own_rows():
    moe = build(16, 2)
    ran: dict[int, int] = {}
    for e, expert in enumerate(moe.experts):
        expert.register_forward_pre_hook(lambda _, args, e=e: ran.update({e: ran.get(e, 0) + 1000 + len(args[0])}))
    x = normal(5, HIDDEN)
    moe(x)
    chosen = TORCH.route(moe.gate(x), 2, normalise=True)[1].flatten().bincount(minlength=16)
    assert ran == {e: 1000 + count for e, count in enumerate(chosen.tolist()) if count}


class Elementwise(nn.Module):
    """An expert whose bits cannot depend on the number of rows."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class FirstColumns(nn.Module):
    """A router of the same kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :11].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalise", [False, True])
def test_bits_of_a_token_do_not_depend_on_the_others(normalise, dtype):
    """Weights and the sum over a token's experts, whose order is that of its choices."""
    moe = build(11, 7, normalise, dtype)
    moe.gate, moe.experts = FirstColumns(), nn.ModuleList(Elementwise(0.1 + e / 3) for e in range(11))
    x = normal(40, HIDDEN).to(dtype)
    together = moe(x)
    for rows in (slice(0, 1), slice(39, 40), slice(7, 20)):
        assert torch.equal(moe(x[rows]), together[rows])


def test_the_sum_is_in_fp32():
    """Seven numbers in bfloat16: rounded once, not after each addition."""
    moe = build(7, 7, dtype=torch.bfloat16)
    moe.experts = nn.ModuleList(Elementwise(1.0) for _ in range(7))
    x = normal(5, HIDDEN).bfloat16()
    torch.testing.assert_close(moe(x), x, rtol=0, atol=0)  # the weights sum to one


def test_activation_and_router_precision():
    moe = build(3, 1, dtype=torch.bfloat16, act="gelu")
    assert moe.gate(normal(2, HIDDEN).bfloat16()).dtype == torch.float32
    assert moe.experts[0].gate_up_proj.act == "gelu"


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_choices_than_experts_are_refused(top_k):
    with pytest.raises(ModelNotSupported, match=f"{top_k} experts a token of 4"):
        build(4, top_k)


def test_native_experts_lie_in_one_tensor_and_bring_none_along():
    """Each expert's packed weight is a place in it, and no second copy."""
    moe = build(6, 2, dtype=torch.bfloat16, ops=select_ops("auto", torch.device("cpu"), torch.bfloat16))
    if moe._stacks is None:
        pytest.skip("no native kernels")
    for stack, name in zip([s.weight for s in moe._stacks], ("gate_up_proj", "down_proj"), strict=True):
        weights = [expert.get_submodule(name).weight for expert in moe.experts]
        assert [w.data_ptr() for w in weights] == [place.data_ptr() for place in stack]
        assert sum(w.nbytes for w in weights) == stack.nbytes


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_recorded_mixture_routes_anew_when_replayed(tokens):
    ops = select_ops("auto", torch.device("cpu"), torch.bfloat16)
    if (recorder := ops.recorder()) is None:
        pytest.skip("no native kernels")
    moe = build(9, 3, dtype=torch.bfloat16, ops=ops)
    x, other = normal(tokens, HIDDEN), normal(tokens, HIDDEN, seed=1)
    out, graph = recorder.record(lambda: moe(x))
    for values in (x.clone(), other):
        x.copy_(values)
        graph.replay()
        assert torch.equal(out, moe(values))
