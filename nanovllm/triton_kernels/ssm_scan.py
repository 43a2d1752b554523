"""The state space recurrence of Mamba2 over prompts, in cells of tokens (Dao and Gu 2024).

Every head has a state S [P, N]. A token with input x [P], step size dt, and vectors B and C [N], which the heads of a
group share, makes of it

    S <- exp(dt A) S + dt x B^T,    y = S C + D x        (A < 0)

`walk_kernel` takes a sequence's states from cell to cell, in registers, and writes down each cell's first.
`cells_kernel` has all cells at once: within a cell each token attends to those before it, and what came before the
cell is in the state. Matrices are multiplied in the model's dtype and added up in fp32; states stay in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.mamba2_plan import CELL, Mamba2Plan, Prompts, chunk, in_cells
from nanovllm.triton_kernels.ssm_steps import time_steps
from nanovllm.triton_kernels.variant import AMPERE_ON, CHIPS, Variant, launch_options, multiplies_fast


@triton.jit
def walk_kernel(
    mixed,  # [T, CHANNELS], x | B | C
    cell_starts,
    steps,
    sums,
    query_start,
    seq_lens,
    slots,
    states,  # [slots, HEADS, HEAD_DIM, STATE]
    entries,  # [cells, HEADS, HEAD_DIM, STATE]: the state before each cell
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (heads and blocks of a state, B). A state's elements do not know of one another: any number of programs
    may share it."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM + 2 * GROUPS * STATE
    ACROSS: tl.constexpr = (STATE + BLOCK_S - 1) // BLOCK_S
    BLOCKS: tl.constexpr = ACROSS * ((HEAD_DIM + BLOCK_P - 1) // BLOCK_P)
    sequence = tl.program_id(1)
    cell, last = tl.load(cell_starts + sequence), tl.load(cell_starts + sequence + 1)
    if cell == last:
        return
    head, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    p = block // ACROSS * BLOCK_P + tl.arange(0, BLOCK_P)
    s = block % ACROSS * BLOCK_S + tl.arange(0, BLOCK_S)
    held = (p < HEAD_DIM)[:, None] & (s < STATE)[None, :]
    xs = mixed + head * HEAD_DIM + p[None, :]
    Bs = mixed + HEADS * HEAD_DIM + head // (HEADS // GROUPS) * STATE + s[None, :]
    inside = p[:, None] * STATE + s[None, :]
    slot = tl.load(slots + sequence).to(tl.int64)
    state_places = states + (slot * HEADS + head) * (HEAD_DIM * STATE) + inside
    begin, count, first = chunk(query_start, seq_lens, sequence, sequence >= 0)
    end = begin + in_cells(count, first, CELL)
    known = tl.where(first > 0, HEAD_DIM, 0)  # what a new sequence finds in its slot is another's
    state = tl.load(state_places, held & (p < known)[:, None], 0.0)
    at = cell.to(tl.int64) * HEADS + head
    row = begin - first % CELL  # of lane 0
    for _ in range(cell, last):
        tl.store(entries + at * (HEAD_DIM * STATE) + inside, state.to(entries.dtype.element_ty), held)
        whole = tl.load(sums + at * CELL + CELL - 1)
        state *= tl.exp2(whole)
        for start in tl.static_range(0, CELL, BLOCK_T):
            lane = start + tl.arange(0, BLOCK_T)
            filled = ((row + lane >= begin) & (row + lane < end))[:, None]
            rows = (row + lane).to(tl.int64)[:, None] * CHANNELS
            x = tl.load(xs + rows, filled & (p < HEAD_DIM)[None, :], 0.0)
            B = tl.load(Bs + rows, filled & (s < STATE)[None, :], 0.0)
            left = tl.load(steps + at * CELL + lane) * tl.exp2(whole - tl.load(sums + at * CELL + lane))
            added = (x * left[:, None]).to(x.dtype)  # what of x is left at the cell's end
            state = tl.dot(tl.trans(added), B, state, input_precision="ieee")
        at += HEADS
        row += CELL
    tl.store(state_places, state, held)


@triton.jit
def cells_kernel(
    mixed,  # [T, CHANNELS], x | B | C
    cells,
    steps,
    sums,
    entries,
    D,  # [HEADS]
    y,  # [T, HEADS * HEAD_DIM]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (heads, blocks of P and of a cell's tokens; cells)."""
    INNER: tl.constexpr = HEADS * HEAD_DIM
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * STATE
    ACROSS: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    PARTS: tl.constexpr = CELL // BLOCK_T
    cell = tl.program_id(1)
    row, begin, end = tl.load(cells + 3 * cell), tl.load(cells + 3 * cell + 1), tl.load(cells + 3 * cell + 2)
    part = PARTS - 1 - tl.program_id(0) % PARTS  # those with the most to do go first
    lane = part * BLOCK_T + tl.arange(0, BLOCK_T)
    if (part * BLOCK_T >= end) | (part * BLOCK_T + BLOCK_T <= begin):
        return
    head = tl.program_id(0) // PARTS // ACROSS
    p = tl.program_id(0) // PARTS % ACROSS * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.arange(0, BLOCK_S)
    has_p = (p < HEAD_DIM)[None, :]
    filled = ((lane >= begin) & (lane < end))[:, None]
    at = cell.to(tl.int64) * HEADS + head
    row = row.to(tl.int64)
    xs = mixed + head * HEAD_DIM + p[None, :]
    Bs = mixed + INNER + head // (HEADS // GROUPS) * STATE
    Cs = Bs + GROUPS * STATE + (row + lane)[:, None] * CHANNELS
    sum_here = tl.load(sums + at * CELL + lane)

    total = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for start in tl.static_range(0, STATE, BLOCK_S):
        C = tl.load(Cs + (start + s)[None, :], filled & (start + s < STATE)[None, :], 0.0)
        places = (at * HEAD_DIM + p[None, :]) * STATE + (start + s)[:, None]
        entry = tl.load(entries + places, has_p & (start + s < STATE)[:, None], 0.0)
        total = tl.dot(C, entry, total, input_precision="ieee")
    total *= tl.exp2(sum_here)[:, None]
    for first in range(0, part * BLOCK_T + 1, BLOCK_T):
        other = first + tl.arange(0, BLOCK_T)
        there = (other >= begin) & (other < end)
        rows = (row + other) * CHANNELS
        scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for start in tl.static_range(0, STATE, BLOCK_S):
            has_s = start + s < STATE
            C = tl.load(Cs + (start + s)[None, :], filled & has_s[None, :], 0.0)
            B = tl.load(Bs + rows[None, :] + (start + s)[:, None], there[None, :] & has_s[:, None], 0.0)
            scores = tl.dot(C, B, scores, input_precision="ieee")
        decay = tl.exp2(tl.minimum(sum_here[:, None] - tl.load(sums + at * CELL + other)[None, :], 0.0))
        weights = scores * decay * tl.load(steps + at * CELL + other)[None, :]
        weights = tl.where(lane[:, None] >= other[None, :], weights, 0.0)
        x = tl.load(xs + rows[:, None], there[:, None] & has_p, 0.0)
        total = tl.dot(weights.to(x.dtype), x, total, input_precision="ieee")
    x = tl.load(xs + (row + lane)[:, None] * CHANNELS, filled & has_p, 0.0)
    total += tl.load(D + head) * x
    tl.store(y + (row + lane)[:, None] * INNER + head * HEAD_DIM + p[None, :], total, filled & has_p)


def scan(
    projected: torch.Tensor,
    mixed: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    limits: tuple[float, float],
    groups: int,
    states: torch.Tensor,
    y: torch.Tensor,
    plan: Mamba2Plan,
    prompts: Prompts,
) -> None:
    """The tokens of `prompts`: their rows of y fp32 [T, H * P], and the states of their slots.

    projected: [T, ... | H step sizes]. mixed: [T, x | B | C] of `groups` groups, convolved. A, D, dt_bias: fp32 [H].
    states: fp32 [slots, H, P, N].
    Meant to be small beside the projections: for Granite 4.0 H 1B it multiplies 1.7 million pairs of numbers a token
    and layer, where the matrices of a layer multiply 33 million, and moves 12 KiB of states. Not measured yet.
    """
    _, heads, head_dim, size = states.shape
    num_cells, device, wide = len(prompts.cells), mixed.device, multiplies_fast(mixed)
    steps, sums = time_steps(projected, A, dt_bias, limits, prompts)
    entries = torch.empty(num_cells, heads, head_dim, size, dtype=mixed.dtype, device=device)
    shape = _shape(heads, head_dim, groups, size)
    constants = _walk_constants(head_dim, size, wide)
    blocks = triton.cdiv(head_dim, constants["BLOCK_P"]) * triton.cdiv(size, constants["BLOCK_S"])
    walk_kernel[(heads * blocks, len(plan.slots))](
        *(mixed, prompts.cell_starts, steps, sums),
        *(plan.query_start, plan.seq_lens, plan.slots, states, entries),
        **shape,
        **constants,
        **launch_options(num_warps=4, num_stages=2),
    )
    constants = _cell_constants(head_dim, size, wide)
    blocks = triton.cdiv(head_dim, constants["BLOCK_P"]) * (CELL // constants["BLOCK_T"])
    cells_kernel[(heads * blocks, num_cells)](
        *(mixed, prompts.cells, steps, sums, entries, D, y),
        **shape,
        **constants,
        **launch_options(num_warps=4, num_stages=2),
    )


def _shape(heads: int, head_dim: int, groups: int, size: int) -> dict[str, int]:
    return {"HEADS": heads, "HEAD_DIM": head_dim, "GROUPS": groups, "STATE": size, "CELL": CELL}


def _block(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


def _walk_constants(head_dim: int, size: int, wide: bool) -> dict[str, int]:
    most = 64 if wide else 16
    return {"BLOCK_T": CELL if wide else 32, "BLOCK_P": _block(head_dim, most), "BLOCK_S": _block(size, most)}


def _cell_constants(head_dim: int, size: int, wide: bool) -> dict[str, int]:
    return {
        "BLOCK_T": 64 if wide else 32,
        "BLOCK_P": _block(head_dim, 64 if wide else 32),
        "BLOCK_S": _block(size, 128 if wide else 16),
    }


def variants() -> list[Variant]:
    made = []
    for dtype, wide, chips in (
        *(("bf16", True, AMPERE_ON), ("fp16", True, AMPERE_ON)),
        *(("fp16", False, (75,)), ("fp32", False, CHIPS)),
    ):
        for heads, head_dim, groups, size in ((48, 64, 1, 128), (48, 32, 1, 128), (128, 64, 8, 256)):
            shape = _shape(heads, head_dim, groups, size)
            model, fp32 = f"*{dtype}:16", "*fp32:16"
            tables = dict.fromkeys(("cell_starts", "query_start", "seq_lens", "slots"), "*i32:16")
            common = {"mixed": model, "steps": fp32, "sums": fp32, "entries": model}
            constants = {**shape, **_walk_constants(head_dim, size, wide)}
            made.append(Variant(walk_kernel, {**common, **tables, "states": fp32}, constants, 4, 2, chips))
            constants = {**shape, **_cell_constants(head_dim, size, wide)}
            types = {**common, "cells": "*i32:16", "D": fp32, "y": fp32}
            made.append(Variant(cells_kernel, types, constants, 4, 2, chips))
    return made
