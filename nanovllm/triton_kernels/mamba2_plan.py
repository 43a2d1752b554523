"""Which tokens of a step the Mamba2 kernels compute together; made once for all layers, on the device.

A sequence's positions are divided into cells of CELL tokens, from position 0 on and whatever the chunks in which
they come, so that a prompt that is cut between two cells is computed in the same sums as a whole one. A last cell
of one token is not worth a cell: it takes the way of decoding sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanovllm.batch import Batch
from nanovllm.triton_kernels.variant import Variant, launch_options

CELL = 128
STRETCH = 32  # tokens that a program of the convolution takes
_LANES = 128


@dataclass(frozen=True, slots=True)
class Prompts:
    """What there is to know where sequences have several tokens. Tables are as long as the host must assume.

    stretches: [N, 2] int32, the sequence and the first of up to STRETCH tokens of its chunk; sequence -1 behind the
        last.
    cells: [M, 3] int32, the row of the batch in which lane 0 of a cell would be, and the lanes from which and before
        which it has tokens; none behind the last cell.
    cell_starts: [B + 1] int32 first cell of each sequence.
    """

    stretches: torch.Tensor
    cells: torch.Tensor
    cell_starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Mamba2Plan:
    """The batch's query_start [B + 1], seq_lens [B] and slots [B]; no prompts where each sequence has one token."""

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    prompts: Prompts | None


def plan_mamba2(batch: Batch) -> Mamba2Plan:
    """Nothing is read from the device. Every sequence has a token."""
    assert batch.state_slots is not None
    prompts = None if batch.max_query_len == 1 else _plan_prompts(batch)
    return Mamba2Plan(batch.query_start, batch.seq_lens, batch.state_slots, prompts)


def _plan_prompts(batch: Batch) -> Prompts:
    tokens, count = len(batch.positions), len(batch.seq_lens)
    num_stretches = tokens // STRETCH + count
    num_cells = most_cells(tokens, count, batch.max_query_len)
    stretches = torch.empty(num_stretches, 2, dtype=torch.int32, device=batch.positions.device)
    cells = stretches.new_empty(num_cells, 3)
    cell_starts = stretches.new_empty(count + 1)
    plan_kernel[(count + 1,)](
        *(batch.query_start, batch.seq_lens, stretches, cells, cell_starts, count, num_stretches, num_cells),
        **_CONSTANTS,
        **launch_options(num_warps=1),
    )
    return Prompts(stretches, cells, cell_starts)


def most_cells(tokens: int, sequences: int, longest: int) -> int:
    """Cells that `sequences` of together so many tokens, one of them with `longest`, can have: where all others but
    one have a single token, this is one more than enough."""
    several = min(sequences, tokens - sequences - longest + 2)
    return tokens // CELL + 2 * several


@triton.jit
def chunk(query_start, seq_lens, sequence, known):
    """A sequence's tokens in this step: the first one's row, how many they are, and where the first stands."""
    begin = tl.load(query_start + sequence, known, 0)
    count = tl.load(query_start + sequence + 1, known, 0) - begin
    return begin, count, tl.load(seq_lens + sequence, known, 0) - count


@triton.jit
def in_cells(count, first, CELL: tl.constexpr):
    """How many of a chunk's tokens go through cells."""
    alone = (count == 1) | ((first + count) % CELL == 1)
    return tl.where(alone, count - 1, count)


@triton.jit
def _num_cells(count, first, CELL: tl.constexpr):
    tokens = in_cells(count, first, CELL)
    return tl.where(tokens > 0, (first + tokens - 1) // CELL - first // CELL + 1, 0)


@triton.jit(do_not_specialize=["batch", "num_stretches", "num_cells"])
def plan_kernel(
    query_start,
    seq_lens,
    stretches,
    cells,
    cell_starts,
    batch,
    num_stretches,
    num_cells,
    STRETCH: tl.constexpr,
    CELL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid: (B + 1,). The last program marks what is left of the tables."""
    me = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    stretch, cell = 0, 0  # of the sequences before
    for start in range(0, me, LANES):
        others = start + lanes
        _, count, first = chunk(query_start, seq_lens, others, others < me)
        stretch += tl.sum(tl.cdiv(count, STRETCH), 0)
        cell += tl.sum(_num_cells(count, first, CELL), 0)
    tl.store(cell_starts + me, cell)
    if me == batch:
        for start in range(stretch, num_stretches, LANES):
            place = start + lanes
            tl.store(stretches + 2 * place, tl.full([LANES], -1, tl.int32), place < num_stretches)
        for start in range(cell, num_cells, LANES):
            place = start + lanes
            tl.store(cells + 3 * place + 1, tl.full([LANES], 0, tl.int32), place < num_cells)
            tl.store(cells + 3 * place + 2, tl.full([LANES], 0, tl.int32), place < num_cells)
    else:
        begin, count, first = chunk(query_start, seq_lens, me, me >= 0)
        number = tl.cdiv(count, STRETCH)
        for start in range(0, number, LANES):
            mine = start + lanes
            tl.store(stretches + 2 * (stretch + mine), tl.full([LANES], 0, tl.int32) + me, mine < number)
            tl.store(stretches + 2 * (stretch + mine) + 1, mine * STRETCH, mine < number)
        number = _num_cells(count, first, CELL)
        tokens = in_cells(count, first, CELL)
        for start in range(0, number, LANES):
            mine = start + lanes
            origin = (first // CELL + mine) * CELL - first  # of lane 0 in the chunk
            place = cells + 3 * (cell + mine)
            tl.store(place, begin + origin, mine < number)
            tl.store(place + 1, tl.maximum(-origin, 0), mine < number)
            tl.store(place + 2, tl.minimum(tokens - origin, CELL), mine < number)


_CONSTANTS = {"STRETCH": STRETCH, "CELL": CELL, "LANES": _LANES}


def variants() -> list[Variant]:
    tensors = ("query_start", "seq_lens", "stretches", "cells", "cell_starts")
    numbers = ("batch", "num_stretches", "num_cells")
    types = {**dict.fromkeys(tensors, "*i32:16"), **dict.fromkeys(numbers, "i32")}
    return [Variant(plan_kernel, types, _CONSTANTS, num_warps=1)]
