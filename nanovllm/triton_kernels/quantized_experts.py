"""Linear layers of many experts with quantised weights in one launch, as in grouped_linear.py."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.activation import activated
from nanovllm.triton_kernels.packed_codes import LAYOUTS, PackedCodes
from nanovllm.triton_kernels.quantized_linear import halves, packed_rows, product
from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options, multiplies_fast

MOST_ROWS = 64  # of a tile: tokens' columns of a chunk fill the shared memory then


@triton.jit
def quantized_experts_kernel(
    x,  # [rows, SIZE_K]
    x_stride,
    weight,  # [experts, expert_words]
    expert_words,
    columns,  # [experts, SIZE_K], or None
    out,  # [pairs, SIZE_N]
    pairs,  # [tiles * TOKENS] numbers of pairs
    tiles,  # [tiles, 2] a tile's expert, and how many pairs it has
    SHARE: tl.constexpr,
    SIZE_N: tl.constexpr,
    SIZE_K: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    E4M3: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (blocks of rows of the weight, tiles). Row i of the result is of row i // SHARE of x. KIND: the activation
    of a gate, or "none" where there is no gate."""
    GATED: tl.constexpr = KIND != "none"
    MINE: tl.constexpr = ROWS // 2 if GATED else ROWS
    tile = tl.program_id(1)
    expert, count = tl.load(tiles + 2 * tile).to(tl.int64), tl.load(tiles + 2 * tile + 1)
    if count == 0:
        return
    lane = tl.arange(0, TOKENS)
    filled = lane < count
    pair = tl.load(pairs + tile * TOKENS + lane, filled, 0).to(tl.int64)
    there = packed_rows(tl.program_id(0), SIZE_N, GATED, ROWS)
    x_rows, mine = x + pair // SHARE * x_stride, weight + expert * expert_words
    columns = None if columns is None else columns + expert * SIZE_K
    total = product(
        x_rows, filled, columns, mine, tl.program_id(0), there, ROWS, SIZE_K, BITS, GROUP, SCALE, LEAST, E4M3
    )
    if GATED:
        total, other = halves(total)
        total = activated(total, KIND) * other
    n = tl.program_id(0) * MINE + tl.arange(0, MINE)
    places = pair[None, :] * SIZE_N + n[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), filled[None, :] & (n < SIZE_N)[:, None])


def quantized_experts(
    x: torch.Tensor,
    weight: PackedCodes,
    pairs: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    kind: str = "none",
) -> None:
    """As `experts_linear`; an expert's halves lie as a gated layer's."""
    assert x.stride(1) == 1 and out.is_contiguous()
    num_tiles, (count, size) = len(tiles), out.shape
    rows = size if kind == "none" else 2 * triton.cdiv(size, 16) * 16
    blocks, num_warps, num_stages = _tile(len(pairs) // num_tiles, multiplies_fast(x))
    quantized_experts_kernel[(triton.cdiv(rows, blocks["ROWS"]), num_tiles)](
        *(x, x.stride(0), weight.data, weight.data.stride(0), weight.columns, out, pairs, tiles),
        SHARE=count // len(x),
        SIZE_N=size,
        SIZE_K=x.shape[1],
        KIND=kind,
        **weight.layout.constants(),
        **blocks,
        **launch_options(num_warps, num_stages),
    )


def _tile(tokens: int, fast: bool) -> tuple[dict[str, int], int, int]:
    """Constants, warps and stages, as of a linear layer with many rows: experts that are chosen are many."""
    if not fast:
        return {"TOKENS": tokens, "ROWS": 32}, 8 if tokens == 16 else 16, 2  # with half as many registers are spilled
    return {"TOKENS": tokens, "ROWS": 64}, 4, 4 if tokens == 16 else 3


def variants() -> list[Variant]:
    """Each layout in either dtype for each chip; tiles, sizes and columns take turns with them."""
    takes = itertools.cycle(
        (
            *((64, "silu"), (16, "none"), (64, "gelu_tanh"), (16, "relu")),
            *((16, "silu"), (64, "none"), (16, "gelu")),
        )
    )
    made = []
    for turn, layout in enumerate(LAYOUTS):
        ordered = layout.scale == 32 and not layout.e4m3 and turn % 3 > 0
        numbers = [*itertools.product(("bf16", "fp16"), AMPERE_ON), ("fp16", 75)]
        for dtype, chip in [*numbers, *([] if turn else [("fp32", 90)])]:
            tokens, kind = next(takes)
            blocks, num_warps, num_stages = _tile(tokens, dtype != "fp32" and chip in AMPERE_ON)
            tables = {"weight", "pairs", "tiles"} | ({"columns"} if ordered else set())
            types = dict.fromkeys(("x", "out"), f"*{dtype}:16") | dict.fromkeys(tables, "*i32:16")
            types |= dict.fromkeys(("x_stride", "expert_words"), "i32:16")
            share, size_n, size_k = (1, 2048, 768) if kind == "none" else (8, 768, 2048)
            sizes = {"SHARE": share, "SIZE_N": size_n, "SIZE_K": size_k, "KIND": kind}
            constants = {**sizes, **layout.constants(), **blocks, **({} if ordered else {"columns": None})}
            made.append(Variant(quantized_experts_kernel, types, constants, num_warps, num_stages, (chip,)))
    return made
