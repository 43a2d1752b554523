"""Attention of sequences with one query in a step, which divides long contexts (flash-decoding, Dao et al. 2023).

Designed against the floor of memory: keys and values are read once, two tiles ahead of their use, with some 100 KiB
under way on each multiprocessor of an H200. Not measured yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.batch import Batch
from nanovllm.triton_kernels.attention_tile import (
    NOT_SPECIALISED,
    Case,
    Scoring,
    Tile,
    arguments,
    attend,
    cases,
    head_slopes,
    no_keys,
    settings,
)
from nanovllm.triton_kernels.kv_codes import scales_begin
from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options

_MAX_SPLITS = 64
_TILE_BYTES = 16384  # of keys


def _tile(itemsize: int, head_dim: int, group: int, *, codes: bool) -> Tile:
    rows = min(64, max(16, triton.next_power_of_2(group)))
    width = max(64, triton.next_power_of_2(head_dim))
    if itemsize == 4:  # multiplied in three parts, which takes many registers, or without tensor cores
        return {64: Tile(16, 32, 4, 3), 128: Tile(16, 64, 8, 2), 256: Tile(16, 16, 8, 3, 255)}[width]
    keys, few = _TILE_BYTES // (itemsize * width), rows == 16
    if codes:  # which take registers; of half as many bytes there have to be more tiles under way
        keys = keys if few else min(32, keys // 2)
        return Tile(rows, keys, 8, 3, 168 if few else 255) if width == 256 else Tile(rows, keys, 4, 4, 255)
    if few:
        return Tile(rows, keys, 8, 3, 128) if width == 256 else Tile(rows, keys, 4, 3)
    return Tile(rows, keys, 8 if width == 256 or rows == 64 else 4, 3, 255)


def division(programs: int, max_seq_len: int) -> tuple[int, int]:
    """Into how many parts at most contexts are divided, and of how many keys a multiple each part is.

    programs: that there are without. Enough parts to fill a large chip, and so many that no program reads more than
    2048 keys while others idle, unless that are too many programs for contexts that may be short.
    """
    span = 256 if programs < 512 else 1024
    fill, even, most = (triton.cdiv(*pair) for pair in ((512, programs), (max_seq_len, 2048), (max_seq_len, span)))
    return max(1, min(max(fill, even), most, _MAX_SPLITS, 8192 // programs)), span


@triton.jit
def _parts(seq_len, window, num_splits, span, WINDOWED: tl.constexpr):
    """Where the first part of a context begins, and the length of each: multiples of span."""
    origin = 0
    if WINDOWED:
        origin = tl.maximum(seq_len - window, 0) // span * span
    return origin, tl.cdiv(tl.cdiv(tl.maximum(seq_len - origin, 1), num_splits), span) * span


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def decode_kernel(
    q,  # [T, H, D]
    kv,  # as in `cache_arguments`
    out,  # [T, H, D], or where contexts are divided [B, H, num_splits, D] fp32
    logs,  # [B, H, num_splits] fp32: log2 of the total weight of a part; parts without keys are not written
    num_splits,
    span,
    query_start,
    seq_lens,
    tables,
    table_stride,
    q_token_stride,
    q_head_stride,
    scales,  # of a cache of codes
    half_stride,
    page_stride,
    kv_heads,
    slopes,
    window,
    scale,
    factor,
    GROUP: tl.constexpr,
    WINDOWED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CODES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid: (KH * tiles of a group, B, num_splits). Parts begin at multiples of `span`."""
    tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    sequence, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    token = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    seq_len = tl.load(seq_lens + sequence)
    first = 0
    if WINDOWED:
        first = tl.maximum(seq_len - window, 0) // BLOCK_N * BLOCK_N
    end = seq_len
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + tl.minimum(rows, GROUP - 1)
    if SPLIT:
        origin, part = _parts(seq_len, window, num_splits, span, WINDOWED)
        first = tl.maximum(first, origin + split * part)
        end = tl.minimum(end, origin + split * part + part)
        if first >= end:
            return
    columns = tl.arange(0, WIDTH)[None, :]
    there = (rows < GROUP)[:, None] & (columns < HEAD_DIM)
    place = token.to(tl.int64) * q_token_stride
    queried = tl.load(q + place + (heads * q_head_stride)[:, None] + columns, mask=there, other=0.0)
    positions = tl.full([BLOCK_M], 0, tl.int32) + seq_len - 1
    scales_here = kv
    if CODES != "none":
        scales_here = scales + scales_begin(kv_heads, BLOCK_SIZE, HEAD_DIM) + kv_head
    sums, totals, peaks = attend(
        no_keys(BLOCK_M, WIDTH), queried, positions, head_slopes(slopes, heads, factor, BIAS), kv + kv_head * HEAD_DIM,
        scales_here, half_stride, page_stride, kv_heads, tables + sequence * table_stride, first, end, end,
        seq_len - window, window, scale, factor, True, WINDOWED, BIAS, BLOCK_SIZE, HEAD_DIM, WIDTH, BLOCK_N, CODES,
    )  # fmt: skip
    if SPLIT:
        places = (sequence * kv_heads * GROUP + heads) * num_splits + split
        tl.store(logs + places, peaks + tl.log2(totals), mask=rows < GROUP)
        target = places * HEAD_DIM
    else:
        target = (token.to(tl.int64) * kv_heads * GROUP + heads) * HEAD_DIM
    # a row of a padded batch may have no keys
    result = sums / tl.maximum(totals, 1e-30)[:, None]
    tl.store(out + target[:, None] + columns, result.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def merge_kernel(
    parts,  # [B, H, num_splits, D] fp32
    logs,  # [B, H, num_splits] fp32
    out,  # [T, H, D]
    num_splits,
    span,
    query_start,
    seq_lens,
    window,
    WINDOWED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid: (H, B)."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    token = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    seq_len = tl.load(seq_lens + sequence)
    origin, part = _parts(seq_len, window, num_splits, span, WINDOWED)
    count = tl.cdiv(seq_len - origin, part)
    place = (sequence * num_heads + head) * num_splits
    every = tl.arange(0, MAX_SPLITS)
    peak = tl.max(tl.load(logs + place + every, mask=every < count, other=-1e30), 0)
    columns = tl.arange(0, WIDTH)
    sums, total = tl.zeros([WIDTH], tl.float32), 0.0
    for start in range(0, count, AT_ONCE):
        splits = start + tl.arange(0, AT_ONCE)
        weights = tl.exp2(tl.load(logs + place + splits, mask=splits < count, other=float("-inf")) - peak)
        there = (splits < count)[:, None] & (columns < HEAD_DIM)[None, :]
        values = tl.load(parts + (place + splits)[:, None] * HEAD_DIM + columns[None, :], mask=there, other=0.0)
        sums += tl.sum(weights[:, None] * values, 0)
        total += tl.sum(weights, 0)
    places = out + (token.to(tl.int64) * num_heads + head) * HEAD_DIM + columns
    tl.store(places, (sums / tl.maximum(total, 1e-30)).to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def decode_attention(q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, batch: Batch, scoring: Scoring) -> None:
    """Rows of `out` [T, H, D], contiguous, of the sequences with one query. q, kv: as in `arguments`."""
    kv_heads, (heads, head_dim), count = kv.shape[3], q.shape[1:], len(batch.seq_lens)
    tile = _tile(q.itemsize, head_dim, heads // kv_heads, codes=kv.dtype != q.dtype)
    columns = kv_heads * triton.cdiv(heads // kv_heads, tile.rows)
    seen = batch.max_seq_len if scoring.window is None else min(batch.max_seq_len, scoring.window)
    splits, span = division(columns * count, seen)
    parts, logs = out, None
    if splits > 1:
        parts = torch.empty(count, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        logs = torch.empty(count, heads, splits, dtype=torch.float32, device=q.device)
    decode_kernel[(columns, count, splits)](
        out=parts,
        logs=logs,
        num_splits=splits,
        span=span,
        SPLIT=splits > 1,
        **arguments(q, kv, batch, scoring, tile),
        **tile.options(),
    )
    if splits > 1:
        merge_kernel[(heads, count)](
            *(parts, logs, out, splits, span, batch.query_start, batch.seq_lens, scoring.window or 0),
            **_merge_sizes(head_dim, scoring.window is not None),
            **launch_options(num_warps=4),
        )


def _merge_sizes(head_dim: int, windowed: bool) -> dict[str, int]:
    width = triton.next_power_of_2(head_dim)
    return {
        "WINDOWED": windowed,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "MAX_SPLITS": _MAX_SPLITS,
        "AT_ONCE": 2048 // width,
    }


def variant(case: Case, chip: int, split: bool) -> Variant:
    tile = _tile(case.itemsize, case.head_dim, case.group, codes=case.codes)
    types = {"out": "*fp32:16" if split else f"*{case.dtype}:16", "num_splits": "i32", "span": "i32"}
    types |= {"logs": "*fp32:16"} if split else {}
    sizes: dict[str, Any] = {"SPLIT": split, **({} if split else {"logs": None})}
    return case.variant(decode_kernel, tile, chip, types, sizes)


def variants() -> list[Variant]:
    found = [variant(*setting) for setting in settings()]
    for dtype, head_dim, windowed in dict.fromkeys((case.dtype, case.head_dim, case.windowed) for case in cases()):
        types = {
            **dict.fromkeys(("parts", "logs"), "*fp32:16"),
            **dict.fromkeys(("query_start", "seq_lens"), "*i32:16"),
            **dict.fromkeys(("num_splits", "span", "window"), "i32"),
            "out": f"*{dtype}:16",
        }
        found.append(Variant(merge_kernel, types, _merge_sizes(head_dim, windowed), chips=AMPERE_ON))
    return found
