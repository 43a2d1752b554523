"""Rows of a table by their numbers: embeddings, rotations of positions, the rows that are sampled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

_WARPS = 4


@triton.jit(do_not_specialize=["first", "rows"])
def gather_kernel(table, ids, out, first, rows, stride, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place).to(tl.int64) - first
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.where((row >= 0) & (row < rows), size, 0)
    values = tl.load(table + row * stride + column, column < found, 0.0)
    tl.store(out + place * size + column, values, column < size)


def gather(table: torch.Tensor, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Rows ids [T] of table [N, size], whose first row is number `first` -> [T, size]; zeros for a row that the
    table has not."""
    rows, size = table.shape
    out = torch.empty(len(ids), size, dtype=table.dtype, device=table.device)
    if len(ids) and size:
        table = table if table.stride(1) == 1 else table.contiguous()
        block = _block(size)
        grid = len(ids), triton.cdiv(size, block)
        numbers = first, rows, table.stride(0), size
        gather_kernel[grid](table, ids.contiguous(), out, *numbers, BLOCK=block, **launch_options(_WARPS))
    return out


def _block(size: int) -> int:
    """Eight numbers a thread, fewer in short rows."""
    return min(triton.next_power_of_2(size), 1024)


def variants() -> list[Variant]:
    return [
        Variant(
            gather_kernel,
            {
                **dict.fromkeys(("table", "out"), f"*{dtype}:16"),
                "ids": "*i64:16",
                **dict.fromkeys(("first", "rows"), "i32"),
                **dict.fromkeys(("stride", "size"), "i32:16" if size % 16 == 0 else "i32"),
            },
            {"BLOCK": _block(size)},
            num_warps=_WARPS,
            chips=chips,
        )
        for dtype, chips in (("fp32", CHIPS), ("bf16", AMPERE_ON), ("fp16", CHIPS))
        for size in (4096, 1031, 64)
    ]
