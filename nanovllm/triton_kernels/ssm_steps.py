"""Mamba2's step sizes, and the decays that they make."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.mamba2_plan import CELL, Prompts
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + e^x) as max(x, 0) + log(1 + z), z = e^-|x|: an odd series in z / (2 + z), which is a third at most."""
    z = tl.exp(-tl.abs(x))
    w = z / (z + 2)
    square = w * w
    series = square / 15 + 1 / 13
    for term in tl.static_range(6):
        series = series * square + 1 / (11 - 2 * term)
    return tl.maximum(x, 0.0) + 2 * w * series


@triton.jit
def time_step(dt, A, shortest, longest):
    """dt within its limits, and log2 of exp(dt A). What forgets everything is cut where exp2 is zero already, so
    that sums of such numbers keep the digits of the small ones."""
    dt = tl.minimum(tl.maximum(softplus(dt), shortest), longest)
    return dt, tl.maximum(dt * A * LOG2_E, -150.0)


@triton.jit
def steps_kernel(
    projected,  # at the step size of row 0's first head
    stride,
    A,  # [HEADS]
    dt_bias,
    cells,
    steps,  # [cells, HEADS, CELL]: dt, zero where there is no token
    sums,  # the same shape: log2 of the decay from the cell's beginning to after the token
    shortest,
    longest,
    HEADS: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of heads, cells)."""
    cell = tl.program_id(1)
    row, begin, end = tl.load(cells + 3 * cell), tl.load(cells + 3 * cell + 1), tl.load(cells + 3 * cell + 2)
    if end == 0:
        return
    lane = tl.arange(0, CELL)
    head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = head < HEADS
    filled = (lane >= begin) & (lane < end)
    places = projected + (row + lane).to(tl.int64)[:, None] * stride + head[None, :]
    raw = tl.load(places, filled[:, None] & held[None, :], 0.0).to(tl.float32)
    raw += tl.load(dt_bias + head, held, 0.0)[None, :]
    dt, decay = time_step(raw, tl.load(A + head, held, 0.0)[None, :], shortest, longest)
    dt, decay = tl.where(filled[:, None], dt, 0.0), tl.where(filled[:, None], decay, 0.0)
    places = (cell * HEADS + head)[None, :] * CELL + lane[:, None]
    tl.store(steps + places, dt, held[None, :])
    tl.store(sums + places, tl.cumsum(decay, 0), held[None, :])


def time_steps(
    projected: torch.Tensor, A: torch.Tensor, dt_bias: torch.Tensor, limits: tuple[float, float], prompts: Prompts
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each lane of the prompts' cells, fp32 [cells, H, CELL]: dt, zero where there is no token, and log2 of the
    decay from the cell's beginning to after the token. projected: [T, ... | H]. A, dt_bias: fp32 [H]."""
    heads = len(A)
    steps = torch.empty(len(prompts.cells), heads, CELL, dtype=torch.float32, device=projected.device)
    sums = torch.empty_like(steps)
    constants = _constants(heads)
    steps_kernel[(triton.cdiv(heads, constants["BLOCK"]), len(steps))](
        *(projected[:, projected.shape[1] - heads :], projected.stride(0), A, dt_bias, prompts.cells, steps, sums),
        *limits,
        **constants,
        **launch_options(num_warps=4),
    )
    return steps, sums


def _constants(heads: int) -> dict[str, int]:
    return {"HEADS": heads, "CELL": CELL, "BLOCK": min(16, triton.next_power_of_2(heads))}


def variants() -> list[Variant]:
    types = dict.fromkeys(("A", "dt_bias", "steps", "sums"), "*fp32:16") | {"stride": "i32:16", "cells": "*i32:16"}
    types |= dict.fromkeys(("shortest", "longest"), "fp32")
    return [
        Variant(steps_kernel, {**types, "projected": f"*{dtype}:16"}, _constants(heads), chips=chips)
        for dtype, chips in (("fp32", CHIPS), ("bf16", AMPERE_ON), ("fp16", CHIPS))
        for heads in (128, 48)
    ]
