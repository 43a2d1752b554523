"""A linear layer whose rows have the same bits in any batch, which cuBLAS does not promise: it chooses tiles, and how
to divide K, by the number of rows.

Here a row's sum walks over K in one order, through one instruction, in one program: the tile is chosen by the weight,
the dtype and the chip, never by the number of rows. All programs run the same code, and rows that are missing from a
tile are zeros. K is not divided.

Designed against the floor of decoding, which is reading the weight once: columns are few in a program where the weight
has few, so that many programs read, each with some 24 to 48 KiB under way. Prompts pay for it: their tiles are smaller
than cuBLAS would take, and are fed from L2. Not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options, multiplies_fast

_TOGETHER = 8  # tiles of rows that take the same columns of the weight one after the other, while they are in L2
_ALIGNMENT = 16  # bytes


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # [rows, SIZE_K]
    weight,  # [SIZE_N, SIZE_K]
    bias,  # [SIZE_N], or None
    residual,  # [rows, SIZE_N], or None; may be `out`
    out,
    rows,
    SIZE_N: tl.constexpr,
    SIZE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Grid: (tiles of rows * blocks of columns,)."""
    COLUMNS: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (TOGETHER * COLUMNS)
    inside = tl.program_id(0) % (TOGETHER * COLUMNS)
    members = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * TOGETHER, TOGETHER)
    row = ((group * TOGETHER + inside % members) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (inside // members * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    filled, held = (row < rows)[:, None], (n < SIZE_N)[None, :]
    x_places = x + row[:, None] * SIZE_K + k[None, :]
    w_places = weight + n[None, :] * SIZE_K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SIZE_K, BLOCK_K):
        if SIZE_K % BLOCK_K == 0:
            mine = tl.load(x_places + start, filled, 0.0)
            columns = tl.load(w_places + start, held, 0.0)
        else:
            mine = tl.load(x_places + start, filled & (start + k < SIZE_K)[None, :], 0.0)
            columns = tl.load(w_places + start, held & (start + k < SIZE_K)[:, None], 0.0)
        total = tl.dot(mine, columns, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + n, n < SIZE_N, 0.0).to(tl.float32)[None, :]
    places = row[:, None] * SIZE_N + n[None, :]
    if residual is not None:
        total += tl.load(residual + places, filled & held, 0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), filled & held)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K] @ weight [N, K].T + bias [N] + residual [T, N] -> [T, N]: in fp32, rounded once to x's dtype. The
    residual's memory becomes the result's."""
    assert weight.is_contiguous() and x.dtype == weight.dtype
    (rows, size_k), size_n = x.shape, len(weight)
    out = x.new_empty(rows, size_n) if residual is None else aligned(residual)
    tile = _tile(size_n, multiplies_fast(x))
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(size_n, tile.columns)
    if blocks:
        linear_kernel[(blocks,)](
            *(aligned(x), weight, bias, None if residual is None else out, out, rows),
            **tile.constants(size_n, size_k),
            **launch_options(tile.num_warps, tile.num_stages),
        )
    return out


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Rows side by side, from a place that Triton compiles no other code for."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


@dataclass(frozen=True)
class _Tile:
    """rows, columns: of a program. depth: of K at once."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def constants(self, size_n: int, size_k: int) -> dict[str, int]:
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth, "TOGETHER": _TOGETHER}
        return {"SIZE_N": size_n, "SIZE_K": size_k, **blocks}


def _tile(size_n: int, fast: bool) -> _Tile:
    """64 rows are what Hopper's instruction takes at least: with less, Triton would take another one. Stages take
    96 KiB of shared memory, which every chip from Ampere on has."""
    if not fast:
        return _Tile(32, 32, 32, 4, 2)
    if size_n < 6144:
        return _Tile(64, 32, 128, 4, 4)
    return _Tile(64, 64, 128, 4, 3) if size_n < 12288 else _Tile(64, 128, 64, 4, 4)


def variants() -> list[Variant]:
    made = []
    for dtype in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(("x", "weight", "bias", "residual", "out"), f"*{dtype}:16") | {"rows": "i32"}
        for size_n, size_k, without in (
            *((151936, 1024, ("bias", "residual")), (6144, 1000, ("residual",))),
            *((4096, 12288, ()), (1024, 3072, ("bias",))),
        ):
            tile = _tile(size_n, dtype != "fp32")
            given = {name: kind for name, kind in types.items() if name not in without}
            constants = {**tile.constants(size_n, size_k), **dict.fromkeys(without)}
            made.append(Variant(linear_kernel, given, constants, tile.num_warps, tile.num_stages, AMPERE_ON))
    return made
