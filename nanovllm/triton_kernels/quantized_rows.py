"""Rows of a quantised weight, widened: tokens looked up in a head, or a whole weight for a product with many rows."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.packed_codes import LAYOUTS, CodeLayout, PackedCodes, chunk_columns, chunk_words, widened
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_ROWS, _WARPS = 32, 4  # of a program


@triton.jit(do_not_specialize=["count", "first", "rows"])
def rows_kernel(
    weight,
    ids,  # [count], or None for the rows in their order
    out,  # [count, SIZE_K]
    count,
    first,
    rows,
    HALF: tl.constexpr,  # rows of the gate, or 0 where there is none
    SIZE_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    E4M3: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (blocks of rows, chunks)."""
    CHUNK: tl.constexpr = chunk_columns(BITS)
    CHUNKS: tl.constexpr = (SIZE_K + CHUNK - 1) // CHUNK
    WORDS: tl.constexpr = chunk_words(BITS, GROUP, SCALE, LEAST)
    mine = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = mine if ids is None else tl.load(ids + mine, mine < count, -1).to(tl.int64) - first
    there = (mine < count) & (row >= 0) & (row < rows)
    if HALF > 0:
        panel = tl.where(row < HALF, row, row - HALF)
        row = panel // 16 * 32 + tl.where(row < HALF, 0, 16) + panel % 16
    k = tl.arange(0, 32)
    chunk = weight + (row // 32 * CHUNKS + tl.program_id(1)) * WORDS
    words = tl.load((chunk + row % 32 * 32)[:, None] + k[None, :], there[:, None], 0)
    for part in tl.static_range(CHUNK // 32):
        value = widened(words, chunk + 1024 + row % 32, there, part, BITS, GROUP, SCALE, LEAST, E4M3)
        column = tl.program_id(1) * CHUNK + part * 32 + k
        places = out + mine[:, None] * SIZE_K + column[None, :]
        tl.store(places, value.to(out.dtype.element_ty), (mine < count)[:, None] & (column < SIZE_K)[None, :])


def gather_rows(
    weight: PackedCodes, shape: tuple[int, int], ids: torch.Tensor, first: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows ids [T] of a weight of this shape, whose first row is number `first` -> [T, K]; zeros for a row that it has
    not."""
    out = torch.empty(len(ids), shape[1], dtype=dtype, device=ids.device)
    _rows(weight, shape[0], ids.contiguous(), first, 0, out)
    return out


def dequantize(weight: PackedCodes, out: torch.Tensor, *, gated: bool = False) -> None:
    """The whole weight into out [N, K]; where gated, the gate's rows before the others."""
    _rows(weight, len(out), None, 0, len(out) // 2 if gated else 0, out)


def _rows(weight: PackedCodes, rows: int, ids: torch.Tensor | None, first: int, half: int, out: torch.Tensor) -> None:
    count, size = out.shape
    assert out.is_contiguous()
    if count:
        rows_kernel[(triton.cdiv(count, _ROWS), triton.cdiv(size, weight.layout.chunk))](
            *(weight.data, ids, out, count, first, rows),
            **_constants(weight.layout, half, size),
            **launch_options(_WARPS),
        )


def _constants(layout: CodeLayout, half: int, size: int) -> dict[str, int | bool]:
    return {"HALF": half, "SIZE_K": size, "ROWS": _ROWS, **layout.constants()}


def variants() -> list[Variant]:
    """Each layout in either dtype for each chip; what is asked for and sizes take turns with them."""
    takes = itertools.cycle(((0, True, 4096), (14336, False, 4096), (0, False, 577), (0, True, 577), (192, False, 577)))
    made = []
    for turn, layout in enumerate(LAYOUTS):
        for dtype, chips in (("bf16", AMPERE_ON), ("fp16", CHIPS), *([] if turn else [("fp32", (90,))])):
            half, some, size = next(takes)
            types = {"weight": "*i32:16", "out": f"*{dtype}:16", **dict.fromkeys(("count", "first", "rows"), "i32")}
            types |= {"ids": "*i64:16"} if some else {}
            constants = {**_constants(layout, half, size), **({} if some else {"ids": None})}
            made.append(Variant(rows_kernel, types, constants, _WARPS, chips=chips))
    return made
