"""Routing and mixtures of experts: the bits of plain linear layers, whatever the company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import at_level, normal
from test_native import DTYPES, GATES, OPS

from nanovllm.ops.library import LEVELS
from nanovllm.ops.torch_ops import TorchOps

MAKERS = pytest.mark.parametrize("ops", [TorchOps(), OPS], ids=lambda ops: ops.name)


# --- routing -----------------------------------------------------------------------------------


@MAKERS
@pytest.mark.parametrize("normalise", [False, True])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_largest_scores_and_the_lower_of_equal_ones(ops, normalise, data):
    experts = data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, min(experts, 20)))
    few = st.sampled_from([-50.0, -1.0, -0.0, 0.0, 0.5, 0.75, 3.0])
    rows = data.draw(st.lists(st.lists(few, min_size=experts, max_size=experts), min_size=1, max_size=5))
    weights, chosen = ops.route(torch.tensor(rows), k, normalise=normalise)
    assert weights.dtype == torch.float32 and chosen.dtype == torch.int32
    wanted = [sorted(range(experts), key=lambda e, row=row: -row[e])[:k] for row in rows]
    assert chosen.tolist() == wanted
    exact = torch.tensor(rows, dtype=torch.float64).exp()
    best = exact.gather(1, torch.tensor(wanted))
    total = (best if normalise else exact).sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights.double(), best / total, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 2), (32, 8), (61, 7), (128, 8)])
def test_a_routed_row_has_the_same_bits_in_any_batch(level, threads, normalise, experts, k):
    scores = normal(300, experts) * 3
    threads(1)
    rows = [OPS.route(row[None], k, normalise=normalise) for row in scores]
    weights, chosen = (torch.cat(parts) for parts in zip(*rows, strict=True))
    reference = TorchOps().route(scores, k, normalise=normalise)
    assert torch.equal(chosen, reference[1])
    torch.testing.assert_close(weights, reference[0], rtol=2e-6, atol=1e-9)
    for count in (1, 2):
        threads(count)
        for rows in (2, 17, 300):
            together = OPS.route(scores[:rows], k, normalise=normalise)
            assert torch.equal(together[0], weights[:rows]) and torch.equal(together[1], chosen[:rows])


def test_scores_that_are_not_numbers_choose_some_experts_once(level):
    scores = normal(40, 16)
    scores[::2, ::3] = float("nan")
    scores[1] = float("nan")
    _, chosen = OPS.route(scores, 5, normalise=True)
    assert all(len(set(row)) == 5 and set(row) <= set(range(16)) for row in chosen.tolist())


# --- experts -------------------------------------------------------------------------------------


class Experts:
    """Weights of experts, each as a linear layer has it, and all of them as a mixture has them."""

    def __init__(self, experts: int, hidden: int, inner: int, dtype: torch.dtype, act: str = "silu") -> None:
        self.hidden, self.inner, self.act, self.count = hidden, inner, act, experts
        first = normal(experts, 2 * inner, hidden, seed=1) / hidden**0.5
        second = normal(experts, hidden, inner, seed=2) / inner**0.5
        self.gate_up = torch.stack([OPS.pack(weight.to(dtype), gated=True).flatten() for weight in first])
        self.down = torch.stack([OPS.pack(weight.to(dtype), gated=False).flatten() for weight in second])

    def mixture(self, x, weights, chosen):
        return OPS.mixture(x, weights, chosen, self.gate_up, self.down, self.inner, self.act)

    def one(self, x, expert: int):
        """By the kernels of plain linear layers."""
        fed = OPS.gated_linear(x, self.gate_up[expert], 2 * self.inner, None, self.act)
        return OPS.linear(fed, self.down[expert], self.hidden, None)


def routed(tokens: int, experts: int, k: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return OPS.route(normal(tokens, experts, seed=seed), k, normalise=True)


SIZES = [(1, 1, 1), (33, 17, 3), (64, 96, 8), (131, 40, 64)]  # hidden, inner, experts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "inner", "count"), SIZES)
def test_an_expert_gives_the_bits_of_its_linear_layers(level, threads, dtype, hidden, inner, count):
    threads(2)
    experts = Experts(count, hidden, inner, dtype)
    for tokens in (1, 2, 13, 90, 300):
        x = normal(tokens, hidden)
        chosen = torch.randint(count, (tokens, 1), generator=torch.Generator().manual_seed(tokens)).int()
        out = experts.mixture(x, torch.ones(tokens, 1), chosen)
        for e in chosen.unique().tolist():
            mine = chosen[:, 0] == e
            assert torch.equal(out[mine], experts.one(x[mine], e))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choices_are_summed_by_their_weights(level, threads, dtype, gate):
    threads(2)
    experts = Experts(12, 77, 45, dtype, gate)
    x, (weights, chosen) = normal(31, 77), routed(31, 12, 8)
    each = torch.stack([experts.one(x, e) for e in range(12)], dim=1)  # [T, E, H]
    terms = weights[..., None].double() * each[torch.arange(31)[:, None], chosen.long()].double()
    allowed = 9 * 2.0**-23 * terms.abs().sum(1) + 1e-30
    assert ((experts.mixture(x, weights, chosen).double() - terms.sum(1)).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_that_are_elsewhere_give_nothing(level, threads, dtype):
    threads(2)
    experts = Experts(12, 77, 45, dtype)
    x, (weights, chosen) = normal(31, 77), routed(31, 12, 8)
    for here in (slice(0, 5), slice(5, 9), slice(9, 12)):
        gate_up, down = experts.gate_up[here], experts.down[here]
        found = OPS.mixture(x, weights, chosen, gate_up, down, 45, "silu", here.start)
        is_here = (chosen >= here.start) & (chosen < here.stop)
        assert torch.equal(found, experts.mixture(x, weights * is_here, chosen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_token_has_the_same_bits_in_any_company(threads, dtype, data):
    """Alone, in a batch, in another order, with one thread and with two."""
    hidden, inner, count = (data.draw(st.integers(1, most)) for most in (90, 70, 64))
    tokens, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, min(8, count)))
    name = data.draw(st.sampled_from(LEVELS))
    with at_level(name) as supported:
        experts = Experts(count, hidden, inner, dtype)
        x, (weights, chosen) = normal(tokens, hidden), routed(tokens, count, k)
        threads(2)
        together = experts.mixture(x, weights, chosen)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(experts.mixture(x[order], weights[order], chosen[order]), together[order])
        threads(1)
        assert torch.equal(experts.mixture(x, weights, chosen), together)
        for t in {0, tokens // 3, tokens - 1}:
            assert torch.equal(experts.mixture(x[t : t + 1], weights[t : t + 1], chosen[t : t + 1])[0], together[t])
    assert supported or name != "generic"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_only_chosen_experts_count(level, threads, dtype, tokens):
    """All tokens go to the same two; the weights of the others are not numbers."""
    threads(2)
    experts = Experts(9, 70, 50, dtype)
    x = normal(tokens, 70)
    weights, chosen = torch.full((tokens, 2), 0.5), torch.tensor([[7, 2]] * tokens).int()
    expected = experts.mixture(x, weights, chosen)
    others = [0, 1, 3, 4, 5, 6, 8]
    experts.gate_up[others] = experts.down[others] = float("nan")
    assert torch.equal(experts.mixture(x, weights, chosen), expected)
    assert expected.isfinite().all()


def test_tokens_that_are_not_numbers_change_no_others(level):
    experts = Experts(4, 40, 24, torch.bfloat16)
    x, (weights, chosen) = normal(20, 40), routed(20, 4, 2)
    expected = experts.mixture(x, weights, chosen)
    x[7] = float("nan")
    out = experts.mixture(x, weights, chosen)
    healthy = [t for t in range(20) if t != 7]
    assert torch.equal(out[healthy], expected[healthy]) and out[7].isnan().all()


def test_rows_of_wider_rows_and_no_rows(level):
    experts = Experts(4, 40, 24, torch.bfloat16)
    wide, (weights, chosen) = normal(20, 100), routed(20, 4, 2)
    expected = experts.mixture(wide[:, 30:70].contiguous(), weights, chosen)
    assert torch.equal(experts.mixture(wide[:, 30:70], weights, chosen), expected)
    assert experts.mixture(wide[:0, :40], weights[:0], chosen[:0]).shape == (0, 40)
    assert OPS.route(normal(0, 4), 2, normalise=True)[0].shape == (0, 2)
