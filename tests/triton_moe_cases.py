"""What Triton's mixture of experts has to give: that of torch. For an interpreter on the CPU and for GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels import normal

from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_ops import TritonOps
from nanovllm.triton_kernels.expert_tiles import group
from nanovllm.triton_kernels.grouped_linear import rows_of_tile

TORCH, TRITON = TorchOps(), TritonOps()
UNIT = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding, and of fp32's sums
# tokens, experts, k, hidden, inner: one of everything; no multiples of a tile; many rows for few experts
SHAPES = [(1, 1, 1, 1, 1), (13, 9, 4, 33, 17), (40, 62, 6, 96, 64), (70, 2, 1, 130, 100)]
MANY_ROWS = (1100, 4, 1, 24, 16)  # more tiles of rows than take a weight's columns together


def check_route(device: str, tokens: int, experts: int, k: int) -> None:
    """Scores of which many are equal."""
    scores = normal(tokens, experts).round(decimals=1).to(device)
    for normalise in (False, True):
        weights, chosen = TRITON.route(scores, k, normalise=normalise)
        wanted = TORCH.route(scores, k, normalise=normalise)
        assert torch.equal(chosen, wanted[1]) and chosen.dtype == torch.int32
        torch.testing.assert_close(weights, wanted[0], rtol=1e-5, atol=1e-7)


def check_odd_scores(device: str) -> None:
    """NaN and infinity: experts that exist, none of them twice; other rows as they are."""
    scores = normal(6, 5).to(device)
    odd = scores.clone()
    odd[1], odd[3], odd[4, 2] = float("nan"), float("-inf"), float("nan")
    _, chosen = TRITON.route(odd, 4, normalise=True)
    assert [len(set(row)) for row in chosen.tolist()] == [4] * 6
    assert chosen.min() >= 0 and chosen.max() < 5 and 2 not in chosen[4].tolist()
    healthy = [0, 2, 5]
    assert torch.equal(chosen[healthy], TRITON.route(scores, 4, normalise=True)[1][healthy])
    assert TRITON.route(scores[:0], 2, normalise=True)[0].shape == (0, 2)


class Experts:
    """Random weights; like tokens, numbers of the dtype."""

    def __init__(self, device: str, dtype: torch.dtype, experts: int, hidden: int, inner: int) -> None:
        self.gate_up = (normal(experts, 2 * inner, hidden, seed=1) / hidden**0.5).to(device, dtype)
        self.down = (normal(experts, hidden, inner, seed=2) / inner**0.5).to(device, dtype)

    def mixture(self, x, weights, chosen, act="silu", here=slice(None)):
        down = self.down[here]
        first = here.start or 0
        return TRITON.mixture(x, weights, chosen, self.gate_up[here], down, down.shape[2], act, first)

    def by_token(self, x, weights, chosen, act="silu") -> torch.Tensor:
        """In fp32 but for what is rounded between the layers."""
        sums = []
        for token, row, own in zip(x, chosen.tolist(), weights, strict=True):
            total = token.new_zeros(self.down.shape[1], dtype=torch.float32)
            for expert, weight in zip(row, own, strict=True):
                fed = TORCH.activate(F.linear(token.float(), self.gate_up[expert].float())[None], act, gated=True)
                made = F.linear(fed.to(x.dtype).float(), self.down[expert].float())[0]
                total += weight * made.to(x.dtype).float()
            sums.append(total)
        return torch.stack(sums)


def routed(device: str, tokens: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return TORCH.route(normal(tokens, experts, seed=3).to(device), k, normalise=True)


def check_mixture(device: str, dtype: torch.dtype, shape: tuple[int, ...], act: str = "silu") -> None:
    tokens, count, k, hidden, inner = shape
    experts = Experts(device, dtype, count, hidden, inner)
    x, (weights, chosen) = normal(tokens, hidden).to(device, dtype), routed(device, tokens, count, k)
    found = experts.mixture(x, weights, chosen, act)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), experts.by_token(x, weights, chosen, act), rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype]
    )
    assert experts.mixture(x[:0], weights[:0], chosen[:0]).shape == (0, hidden)


def check_few_experts_chosen(device: str, dtype: torch.dtype) -> None:
    """All tokens go to the same two; the weights of the others are no numbers."""
    experts = Experts(device, dtype, 9, 40, 24)
    x = normal(30, 40).to(device, dtype)
    weights, chosen = torch.full((30, 2), 0.5, device=device), torch.tensor([[7, 2]] * 30, device=device).int()
    expected = experts.mixture(x, weights, chosen)
    others = [0, 1, 3, 4, 5, 6, 8]
    experts.gate_up[others] = experts.down[others] = float("nan")
    assert torch.equal(experts.mixture(x, weights, chosen), expected) and expected.isfinite().all()


def check_experts_elsewhere(device: str, dtype: torch.dtype) -> None:
    experts = Experts(device, dtype, 12, 77, 45)
    x, (weights, chosen) = normal(31, 77).to(device, dtype), routed(device, 31, 12, 8)
    for here in (slice(0, 5), slice(5, 9), slice(9, 12)):
        is_here = (chosen >= here.start) & (chosen < here.stop)
        found = experts.mixture(x, weights, chosen, here=here)
        unit = 4 * UNIT[dtype]
        wanted = experts.by_token(x, weights * is_here, chosen)
        torch.testing.assert_close(found.float(), wanted, rtol=unit, atol=unit)


def check_company(device: str, dtype: torch.dtype) -> None:
    """A token's bits are the same in another order, beside a token of NaN, and as a row of wider rows."""
    experts = Experts(device, dtype, 5, 48, 32)
    wide, (weights, chosen) = normal(37, 100).to(device, dtype), routed(device, 37, 5, 2)
    x = wide[:, 30:78]
    expected = experts.mixture(x.contiguous(), weights, chosen)
    assert torch.equal(experts.mixture(x, weights, chosen), expected)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
    found = experts.mixture(x[order], weights[order], chosen[order])
    if device == "cpu":  # the interpreter's products are numpy's, where a row's bits depend on its place
        torch.testing.assert_close(found, expected[order])
    else:
        assert torch.equal(found, expected[order])
    x = x.clone()
    x[7] = float("nan")
    out = experts.mixture(x, weights, chosen)
    healthy = [t for t in range(37) if t != 7]
    assert torch.equal(out[healthy], expected[healthy]) and out[7].isnan().all()


def check_groups(device: str, tokens: int, experts: int, k: int, here: slice) -> None:
    """Every pair of an expert that is here is in one of its tiles, in their order; tiles are no more than allowed."""
    chosen = routed(device, tokens, experts, k)[1]
    count = here.stop - here.start
    rows = rows_of_tile(tokens * k, count)
    pairs, tiles = (table.cpu() for table in group(chosen, count, here.start, rows))
    assert len(pairs) == len(tiles) * rows
    found: dict[int, list[int]] = {e: [] for e in range(count)}
    for i, (expert, filled) in enumerate(tiles.tolist()):
        assert 0 <= filled <= rows
        found[expert] += pairs[i * rows : i * rows + filled].tolist()
    owners = chosen.flatten().tolist()
    assert found == {e: [i for i, owner in enumerate(owners) if owner == here.start + e] for e in range(count)}


def check_capture() -> None:
    """A captured mixture routes anew when it is replayed."""
    experts = Experts("cuda", torch.bfloat16, 16, 64, 32)
    gate = normal(16, 64, seed=5).to("cuda", torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return experts.mixture(x, *TRITON.route(F.linear(x, gate).float(), 4, normalise=True))

    x, static = (normal(20, 64, seed=seed).to("cuda", torch.bfloat16) for seed in (6, 7))
    wanted = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(out, wanted)
