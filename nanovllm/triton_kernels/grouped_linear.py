"""Linear layers of many experts in one launch: each expert's rows by its own weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.activation import activated
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options, multiplies_fast

_TOGETHER = 8  # tiles of rows that take the same columns of the weight one after the other, while they are in L2


@triton.jit(do_not_specialize=["num_tiles"])
def experts_kernel(
    x,  # [rows, SIZE_K]
    x_stride,
    weight,  # [experts, SIZE_N, SIZE_K], or where gated [experts, 2 * SIZE_N, SIZE_K]
    out,  # [pairs, SIZE_N]
    pairs,  # [num_tiles * BLOCK_M] numbers of pairs
    tiles,  # [num_tiles, 2] a tile's expert, and how many pairs it has
    num_tiles,
    SHARE: tl.constexpr,
    SIZE_N: tl.constexpr,
    SIZE_K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Grid: (num_tiles * blocks of columns,). Row i of the result is of row i // SHARE of x. KIND: the activation of
    a gate, or "none" where there is no gate."""
    COLUMNS: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    GATED: tl.constexpr = KIND != "none"
    group = tl.program_id(0) // (TOGETHER * COLUMNS)
    inside = tl.program_id(0) % (TOGETHER * COLUMNS)
    members = tl.minimum(num_tiles - group * TOGETHER, TOGETHER)
    tile = group * TOGETHER + inside % members
    expert, count = tl.load(tiles + 2 * tile).to(tl.int64), tl.load(tiles + 2 * tile + 1)
    if count == 0:
        return
    lane = tl.arange(0, BLOCK_M)
    filled = (lane < count)[:, None]
    pair = tl.load(pairs + tile * BLOCK_M + lane, lane < count, 0).to(tl.int64)
    n = inside // members * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    held = (n < SIZE_N)[None, :]
    x_places = x + (pair // SHARE)[:, None] * x_stride + k[None, :]
    w_places = weight + (expert * ((1 + GATED) * SIZE_N) + n)[None, :] * SIZE_K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SIZE_K, BLOCK_K):
        if SIZE_K % BLOCK_K == 0:
            rows = tl.load(x_places + start, filled, 0.0)
            columns = tl.load(w_places + start, held, 0.0)
        else:
            rows = tl.load(x_places + start, filled & (start + k < SIZE_K)[None, :], 0.0)
            columns = tl.load(w_places + start, held & (start + k < SIZE_K)[:, None], 0.0)
        total = tl.dot(rows, columns, total, input_precision="ieee")
        if GATED:
            if SIZE_K % BLOCK_K == 0:
                columns = tl.load(w_places + SIZE_N * SIZE_K + start, held, 0.0)
            else:
                columns = tl.load(w_places + SIZE_N * SIZE_K + start, held & (start + k < SIZE_K)[:, None], 0.0)
            other = tl.dot(rows, columns, other, input_precision="ieee")
    if GATED:
        total = activated(total, KIND) * other
    tl.store(out + pair[:, None] * SIZE_N + n[None, :], total.to(out.dtype.element_ty), filled & held)


def rows_of_tile(pairs: int, experts: int) -> int:
    """Of tiles in which `pairs` rows, about evenly divided, leave little room."""
    each = pairs // experts
    return 16 if each <= 16 else 64 if each <= 128 else 128


def experts_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    pairs: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    kind: str = "none",
) -> None:
    """Rows of out [P, N], those of the pairs that are in a tile.

    x: [P / share, K], each row of which is for `share` pairs. weight: [experts, N, K], or for a gate of this kind
    [experts, 2 * N, K]: kind(gate) * the other half. pairs: int32 [tiles * rows]. tiles: int32 [tiles, 2].
    With few rows it is bounded by reading the chosen experts' weights, once each.
    """
    assert x.stride(1) == 1 and weight.is_contiguous() and out.is_contiguous()
    num_tiles, (count, size) = len(tiles), out.shape
    constants, num_warps, num_stages = _choice(len(pairs) // num_tiles, kind != "none", multiplies_fast(x))
    experts_kernel[(num_tiles * triton.cdiv(size, constants["BLOCK_N"]),)](
        *(x, x.stride(0), weight, out, pairs, tiles, num_tiles),
        SHARE=count // len(x),
        SIZE_N=size,
        SIZE_K=x.shape[1],
        KIND=kind,
        **constants,
        **launch_options(num_warps, num_stages),
    )


def _choice(rows: int, gated: bool, fast: bool) -> tuple[dict[str, int], int, int]:
    """Constants, warps and stages. A gate's two halves together are as wide as one weight without a gate; stages take
    96 KiB of shared memory, which every chip from Ampere on has."""
    wide, deep, num_stages = (128, 64, 4 if rows < 128 else 3) if fast else (32, 32, 2)
    blocks = {"BLOCK_M": rows, "BLOCK_N": wide // 2 if gated else wide, "BLOCK_K": deep}
    return {**blocks, "TOGETHER": _TOGETHER}, 8 if rows > (64 if fast else 16) else 4, num_stages


def variants() -> list[Variant]:
    made = []
    for dtype, fast, chips in (
        *(("bf16", True, AMPERE_ON), ("fp16", True, AMPERE_ON)),
        *(("fp16", False, (75,)), ("fp32", False, CHIPS)),
    ):
        for rows, hidden, inner, act in (
            (128, 2048, 768, "silu"),
            (64, 2000, 720, "gelu_tanh"),
            (16, 2048, 768, "silu"),
        ):
            for share, n, k, kind in ((8, inner, hidden, act), (1, hidden, inner, "none")):
                blocks, num_warps, num_stages = _choice(rows, kind != "none", fast)
                types = dict.fromkeys(("x", "weight", "out"), f"*{dtype}:16")
                types |= {"x_stride": "i32:16", "pairs": "*i32:16", "tiles": "*i32:16", "num_tiles": "i32"}
                constants = {"SHARE": share, "SIZE_N": n, "SIZE_K": k, "KIND": kind, **blocks}
                made.append(Variant(experts_kernel, types, constants, num_warps, num_stages, chips))
    return made
