"""A sparse mixture of experts: which experts a token goes to, and what they make of it.

Pairs are a token and one of its choices: pair t * k + i is token t's i-th. They are put into tiles of one expert each,
go through two grouped linear layers, and are summed for each token in the order of its choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.activation import KINDS
from nanovllm.triton_kernels.expert_tiles import group
from nanovllm.triton_kernels.grouped_linear import experts_linear, rows_of_tile
from nanovllm.triton_kernels.packed_codes import PackedCodes
from nanovllm.triton_kernels.quantized_experts import MOST_ROWS, quantized_experts
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_TOKENS = 8  # of a program that routes
_COLUMNS = 1024  # of a row, that a program sums


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    scores,  # [tokens, EXPERTS]
    weights,  # [tokens, K]
    chosen,
    tokens,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert, choice = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    there = (token < tokens)[:, None]
    score = tl.load(scores + token[:, None] * EXPERTS + expert, there & (expert < EXPERTS), float("-inf"))
    score = tl.where(score == score, score, float("-inf"))  # a NaN would never be chosen, nor leave a best one
    left = (expert < EXPERTS) & (token >= 0)[:, None]
    best = tl.full([TOKENS, BLOCK_K], float("-inf"), tl.float32)
    winners = tl.zeros([TOKENS, BLOCK_K], tl.int32)
    for i in range(K):
        highest = tl.max(tl.where(left, score, float("-inf")), 1)[:, None]
        winner = tl.min(tl.where(left & (score == highest), expert, BLOCK_E), 1)[:, None]
        left = left & (expert != winner)
        best = tl.where(choice == i, highest, best)
        winners = tl.where(choice == i, winner, winners)
    highest = tl.max(best, 1)[:, None]
    weight = tl.where(choice < K, tl.exp(best - highest), 0.0)
    total = tl.sum(weight, 1)
    if not NORMALISE:
        total = tl.sum(tl.where(expert < EXPERTS, tl.exp(score - highest), 0.0), 1)
    places = token[:, None] * K + choice
    tl.store(weights + places, weight / total[:, None], there & (choice < K))
    tl.store(chosen + places, winners, there & (choice < K))


@triton.jit(do_not_specialize=["first"])
def sum_kernel(
    results,  # [tokens * K, SIZE]
    weights,  # [tokens, K]
    chosen,
    out,  # [tokens, SIZE]
    first,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(K):
        pair = token * K + i
        expert = tl.load(chosen + pair) - first
        end = tl.where((expert >= 0) & (expert < EXPERTS), SIZE, 0)  # no result of an expert that is elsewhere
        result = tl.load(results + pair * SIZE + column, column < end, 0.0)
        total += tl.load(weights + pair) * result.to(tl.float32)
    tl.store(out + token * SIZE + column, total.to(out.dtype.element_ty), column < SIZE)


def route(scores: torch.Tensor, k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.route`."""
    tokens, experts = scores.shape
    weights = torch.empty(tokens, k, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
    if tokens:
        route_kernel[(triton.cdiv(tokens, _TOKENS),)](
            *(scores.float().contiguous(), weights, chosen, tokens),
            **_route_constants(experts, k, normalise),
            **launch_options(num_warps=4),
        )
    return weights, chosen


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor | PackedCodes,
    down: torch.Tensor | PackedCodes,
    inner: int,
    act: str,
    first: int = 0,
    rows: int | None = None,
) -> torch.Tensor:
    """As `Ops.mixture`; gate_up: [E, 2 * inner, H], down: [E, H, inner], in x's dtype, or packed as codes.

    rows: of a tile; default by the number of pairs, of which a token's bits then know.

    What an expert makes of a token is rounded to this dtype, the sum of them is in fp32.
    """
    (tokens, hidden), k = x.shape, chosen.shape[1]
    experts = len(down.data if isinstance(down, PackedCodes) else down)
    out = x.new_empty(tokens, hidden)
    if not tokens:
        return out
    rows = rows or rows_of_tile(tokens * k, experts)
    if isinstance(gate_up, PackedCodes) or isinstance(down, PackedCodes):
        rows = min(rows, MOST_ROWS)
    pairs, tiles = group(chosen, experts, first, rows)
    fed, results = x.new_empty(tokens * k, inner), x.new_empty(tokens * k, hidden)
    _experts(x, gate_up, pairs, tiles, fed, KINDS[act])
    _experts(fed, down, pairs, tiles, results)
    sum_kernel[(tokens, triton.cdiv(hidden, _COLUMNS))](
        *(results, weights, chosen, out, first),
        **_sum_constants(experts, k, hidden),
        **launch_options(num_warps=4),
    )
    return out


def _experts(
    x: torch.Tensor,
    weight: torch.Tensor | PackedCodes,
    pairs: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    kind: str = "none",
) -> None:
    if isinstance(weight, PackedCodes):
        quantized_experts(x, weight, pairs, tiles, out, kind)
    else:
        experts_linear(x, weight, pairs, tiles, out, kind)


def _route_constants(experts: int, k: int, normalise: bool) -> dict[str, int]:
    sizes = {"EXPERTS": experts, "K": k, "NORMALISE": normalise, "TOKENS": _TOKENS}
    return {**sizes, "BLOCK_E": triton.next_power_of_2(experts), "BLOCK_K": triton.next_power_of_2(k)}


def _sum_constants(experts: int, k: int, size: int) -> dict[str, int]:
    return {"EXPERTS": experts, "K": k, "SIZE": size, "BLOCK": min(_COLUMNS, triton.next_power_of_2(size))}


def variants() -> list[Variant]:
    made = []
    for experts, k in ((128, 8), (8, 2), (62, 6)):
        tables = dict.fromkeys(("scores", "weights"), "*fp32:16") | {"chosen": "*i32:16", "tokens": "i32"}
        made += [Variant(route_kernel, tables, _route_constants(experts, k, whether)) for whether in (True, False)]
        for dtype in ("fp32", "bf16", "fp16"):
            tables = {"results": f"*{dtype}:16", "weights": "*fp32:16", "chosen": "*i32:16"}
            tables |= {"out": f"*{dtype}:16", "first": "i32"}
            chips = AMPERE_ON if dtype == "bf16" else CHIPS
            made.append(Variant(sum_kernel, tables, _sum_constants(experts, k, 2048), chips=chips))
    return made
