"""Rows of activations in 8 bits: a row's scale makes its largest number 127, or 448 in float8.

Codes lie as those of weights do within a chunk (packed_codes.py), so that the two can be multiplied as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options

CHUNK = 128  # columns
_BLOCK, _WARPS = 1024, 4  # columns at once


class Activations(NamedTuple):
    """codes: int8 or e4m3 [T, chunks * 128], zeros behind the last column. scales: fp32 [T]."""

    codes: torch.Tensor
    scales: torch.Tensor


@triton.jit
def activations_kernel(
    x,  # [rows, SIZE_K]
    codes,  # [rows, SIZE]
    scales,
    SIZE_K: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,  # that codes can be
    BLOCK: tl.constexpr,
):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE_K, BLOCK):
        value = tl.load(x + row * SIZE_K + start + place, start + place < SIZE_K, 0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(most, 0) + tl.sum(most * 0.0, 0)  # what is no number stays none
    tl.store(scales + row, largest / MOST)
    inverse = tl.where(largest > 0.0, MOST / largest, 0.0)
    for start in range(0, SIZE, BLOCK):
        column = start + place // 128 * 128 + place % 4 * 32 + place % 128 // 4
        scaled = tl.load(x + row * SIZE_K + column, column < SIZE_K, 0.0).to(tl.float32) * inverse
        if MOST == 127:
            scaled = tl.floor(scaled + 0.5)
        tl.store(codes + row * SIZE + start + place, scaled.to(codes.dtype.element_ty), start + place < SIZE)


def quantize_activations(x: torch.Tensor, dtype: torch.dtype) -> Activations:
    """x [T, K]. dtype: torch.int8 or torch.float8_e4m3fn."""
    x = x.contiguous()
    (count, size), most = x.shape, 127 if dtype == torch.int8 else 448
    codes = torch.empty(count, triton.cdiv(size, CHUNK) * CHUNK, dtype=dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        constants = {"SIZE_K": size, "SIZE": codes.shape[1], "MOST": most, "BLOCK": _BLOCK}
        activations_kernel[(count,)](x, codes, scales, **constants, **launch_options(_WARPS))
    return Activations(codes, scales)


def variants() -> list[Variant]:
    made = []
    for kind, most, chips in (("fp8e4nv", 448, (90,)), ("i8", 127, AMPERE_ON)):
        for dtype, size in (("bf16", 4096), ("fp16", 600)):
            types = {"x": f"*{dtype}:16", "codes": f"*{kind}:16", "scales": "*fp32:16"}
            constants = {"SIZE_K": size, "SIZE": triton.cdiv(size, CHUNK) * CHUNK, "MOST": most, "BLOCK": _BLOCK}
            made.append(Variant(activations_kernel, types, constants, _WARPS, chips=chips))
    return made
