"""Pairs of tokens and their choices, put into tiles of one expert each.

An expert's last tile may be part empty. All tables are as long as the worst case needs, so that the host knows the
grids, and places follow the order of the pairs, so that they are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.triton_kernels.variant import Variant, launch_options

_ONE_HOT = 4096  # pairs by experts that a program compares at once


@triton.jit
def _experts_of(chosen, pair, end, first):
    """Of pairs, counted from the first expert that is here; negative where there is no pair."""
    return tl.load(chosen + pair, pair < end, first - 1) - first


@triton.jit(do_not_specialize=["num_pairs", "first"])
def count_kernel(
    chosen,
    counts,  # [programs, BLOCK_E] pairs of each expert among the program's
    num_pairs,
    first,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, PAIRS, STEP):
        pair = tl.program_id(0) * PAIRS + start + tl.arange(0, STEP)
        mine = _experts_of(chosen, pair, num_pairs, first)
        total += tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * BLOCK_E + expert, total)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "first"])
def place_kernel(
    chosen,
    counts,
    pairs,  # [num_tiles * ROWS]
    tiles,  # [num_tiles, 2] expert and number of pairs, none behind the last
    num_pairs,
    num_tiles,
    first,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: that of count_kernel."""
    me, programs = tl.program_id(0), tl.num_programs(0)
    expert, lane = tl.arange(0, BLOCK_E), tl.arange(0, STEP)
    total, before = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, programs, STEP):
        program = (start + lane)[:, None]
        count = tl.load(counts + program * BLOCK_E + expert[None, :], program < programs, 0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(program < me, count, 0), 0)
    total = tl.where(expert < EXPERTS, total, 0)  # a choice may be of an expert that is elsewhere
    needed = tl.cdiv(total, ROWS)
    end = tl.cumsum(needed, 0)
    begin = end - needed  # tiles of each expert

    for start in range(me * STEP, num_tiles, programs * STEP):
        tile = (start + lane)[:, None]
        mine = (begin[None, :] <= tile) & (tile < end[None, :])
        rows = tl.minimum(total[None, :] - (tile - begin[None, :]) * ROWS, ROWS)
        place = tiles + 2 * (start + lane)
        tl.store(place, tl.sum(tl.where(mine, expert[None, :], 0), 1), start + lane < num_tiles)
        tl.store(place + 1, tl.sum(tl.where(mine, rows, 0), 1), start + lane < num_tiles)

    free = begin * ROWS + before
    for start in range(0, PAIRS, STEP):
        pair = me * PAIRS + start + lane
        mine = _experts_of(chosen, pair, num_pairs, first)
        one_hot = (mine[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(one_hot, 0) - one_hot
        place = tl.sum(one_hot * (free[None, :] + rank), 1)
        tl.store(pairs + place, pair, (mine >= 0) & (mine < EXPERTS))
        free += tl.sum(one_hot, 0)


def group(chosen: torch.Tensor, experts: int, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen: int32 [T, k]. The pairs in tiles of `rows` of one of `experts` experts, from `first` on, and the tiles,
    as `experts_linear` takes them."""
    num_pairs = chosen.numel()
    busy = min(experts, num_pairs)
    num_tiles = busy + (num_pairs - busy) // rows  # at most
    constants = _constants(experts, num_pairs)
    programs = triton.cdiv(num_pairs, constants["PAIRS"])
    counts = torch.empty(programs, constants["BLOCK_E"], dtype=torch.int32, device=chosen.device)
    pairs, tiles = counts.new_empty(num_tiles * rows), counts.new_empty(num_tiles, 2)
    options = launch_options(num_warps=4)
    count_kernel[(programs,)](chosen, counts, num_pairs, first, **constants, **options)
    place_kernel[(programs,)](
        *(chosen, counts, pairs, tiles, num_pairs, num_tiles, first),
        EXPERTS=experts,
        ROWS=rows,
        **constants,
        **options,
    )
    return pairs, tiles


def _constants(experts: int, num_pairs: int) -> dict[str, int]:
    """Few pairs are shared by many programs; of many pairs each program has more, as all programs read all counts."""
    block = triton.next_power_of_2(experts)
    step = max(1, min(128, _ONE_HOT // block))
    return {"PAIRS": 256 if num_pairs <= 16384 else 1024, "STEP": step, "BLOCK_E": block}


def variants() -> list[Variant]:
    types = {"chosen": "*i32:16", "counts": "*i32:16", "num_pairs": "i32", "first": "i32"}
    more = {**types, "pairs": "*i32:16", "tiles": "*i32:16", "num_tiles": "i32"}
    made = []
    for experts in (128, 62, 8):
        for num_pairs, rows in ((1 << 20, 128), (1024, 16)):
            constants = _constants(experts, num_pairs)
            made.append(Variant(count_kernel, types, constants))
            made.append(Variant(place_kernel, more, {**constants, "EXPERTS": experts, "ROWS": rows}))
    return made
