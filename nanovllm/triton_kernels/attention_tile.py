"""What the attention kernels share: a tile of queries that walks over the keys in a sequence's pages.

The queries of all heads that share a KV head are the rows of a tile: row r is query r // GROUP of a sequence and
head r % GROUP of the KV head, so that any number of heads fills tiles. Softmax is that of FlashAttention-2 (Dao
2023): relative to the highest score so far, in powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.batch import Batch
from nanovllm.triton_kernels.kv_codes import cache_arguments, decode, head_sizes, load_scales
from nanovllm.triton_kernels.variant import AMPERE_ON, Variant, launch_options

NOT_SPECIALISED = ["table_stride", "window", "num_splits", "span", "num_sequences"]  # they change from step to step


@dataclass(frozen=True)
class Scoring:
    """How scores come of products: scale, and tokens that a query sees.

    slopes: [H] fp32 of ALiBi, with the way that its bias is rounded: "none", "distance" or "rounded" as Alibi
    says; times factor.
    """

    scale: float
    window: int | None = None
    slopes: torch.Tensor | None = None
    bias: str = "none"
    factor: float = 1.0


@dataclass(frozen=True)
class Tile:
    """rows: of queries and heads. keys: that are multiplied at once. maxnreg: as in `launch_options`."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """Of a launch."""
        return launch_options(self.num_warps, self.num_stages, self.maxnreg)


def is_hopper(device: torch.device) -> bool:
    """Whether tiles may have the shared memory and the matrix products of the H100."""
    return device.type == "cuda" and 90 <= 10 * torch.cuda.get_device_capability(device)[0] < 120


def arguments(q: torch.Tensor, kv: torch.Tensor, batch: Batch, scoring: Scoring, tile: Tile) -> dict[str, Any]:
    """Of both kernels. q: [T, H, D], last dimension contiguous. kv: as in `cache_arguments`."""
    return {
        "q": q,
        "q_token_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "query_start": batch.query_start,
        "seq_lens": batch.seq_lens,
        "tables": batch.block_tables,
        "table_stride": batch.block_tables.stride(0),
        "slopes": scoring.slopes,
        "window": scoring.window or 0,
        "scale": scoring.scale * math.log2(math.e),
        "factor": scoring.factor * math.log2(math.e),
        **cache_arguments(kv),
        **_sizes(q.shape[1] // kv.shape[3], scoring.window is not None, scoring.bias, tile),
    }


def _sizes(group: int, windowed: bool, bias: str, tile: Tile) -> dict[str, Any]:
    return {"GROUP": group, "WINDOWED": windowed, "BIAS": bias, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}


@dataclass(frozen=True)
class Case:
    """A model's attention, for `variants()`: what a kernel is compiled for beside its tile."""

    dtype: str
    head_dim: int
    group: int = 2
    windowed: bool = False
    bias: str = "none"
    block_size: int = 16
    codes: bool = False

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    def variant(self, kernel: Any, tile: Tile, chip: int, types: dict[str, str], sizes: dict[str, Any]) -> Variant:
        """types, sizes: of the kernel's own arguments."""
        common = {
            **dict.fromkeys(("q", "kv"), f"*{self.dtype}:16"),
            **({"kv": "*u8:16", "scales": "*fp32:16"} if self.codes else {}),
            **dict.fromkeys(("q_token_stride", "q_head_stride", "page_stride"), "i32:16"),
            **dict.fromkeys(("query_start", "seq_lens", "tables"), "*i32:16"),
            **dict.fromkeys(("kv_heads", "table_stride", "window"), "i32"),
            **dict.fromkeys(("scale", "factor"), "fp32"),
            "half_stride": "i64:16",
        }
        if self.bias != "none":
            common["slopes"] = "*fp32:16"
        constants = {
            **{name: None for name in ("slopes", "scales") if name not in common},
            "CODES": "none" if not self.codes else "converted" if chip == 90 else "computed",
            "BLOCK_SIZE": self.block_size,
            **head_sizes(self.head_dim),
            **_sizes(self.group, self.windowed, self.bias, tile),
        }
        given = {**common, **types}
        options = tile.num_warps, tile.num_stages, (chip,), tile.maxnreg
        return Variant(kernel, given, {**constants, **sizes}, *options)


def cases() -> list[Case]:
    """Head dimensions that fill a tile or not, numbers of heads, and each way to score; the usual first. float16, whose
    tiles are bfloat16's, and float32 meet each tile, and what takes the most registers."""
    dtype = "bf16"
    found = [Case(dtype, head_dim) for head_dim in (128, 64, 96, 80)]
    found += [Case(dtype, 64, 29), Case(dtype, 64, 71), Case(dtype, 64, 71, bias="rounded")]
    found += [Case(dtype, 128, 8, windowed=True), Case(dtype, 128, 1, True, "distance", 64)]
    found += [Case(dtype, 128, 16, block_size=256), Case(dtype, 256, 4), Case(dtype, 192, 4)]
    found += [Case(dtype, 256, 4, True, "rounded"), Case(dtype, 64, 8, True, "distance", 64, codes=True)]
    found += [Case(dtype, 80, codes=True), Case(dtype, 64, 71, codes=True)]
    found += [Case(dtype, 128, 4, codes=True), Case(dtype, 256, 4, codes=True)]
    dtype = "fp16"
    found += [Case(dtype, 64, 29), Case(dtype, 64, 71, bias="rounded")]
    found += [Case(dtype, 128, 48), Case(dtype, 128, 20, True, "distance", 64)]
    found += [Case(dtype, 256, 40, block_size=256), Case(dtype, 256, 4, True, "rounded")]
    found += [Case(dtype, 64, 71, True, "distance", 64, codes=True), Case(dtype, 128, 20, codes=True)]
    found += [Case(dtype, 256, 40, True, block_size=256, codes=True), Case(dtype, 256, 20, codes=True)]
    found += [Case(dtype, 256, 3, True, "distance", 256), Case(dtype, 256, 12, bias="distance", codes=True)]
    found += [Case(dtype, 80, 48, True, "distance"), Case(dtype, 80, 48, True, codes=True)]
    dtype = "fp32"
    found += [Case(dtype, 64, 71, bias="rounded"), Case(dtype, 128, 1, True, "distance", 64)]
    found += [Case(dtype, 192, 4, block_size=256), Case(dtype, 256, 12, True, block_size=256)]
    found += [Case(dtype, 256, 4, True, "rounded")]
    found += [Case(dtype, 128, 4, codes=True), Case(dtype, 64, 71, True, "distance", 64, codes=True)]
    found += [Case(dtype, 128, 8, True, "rounded", 256, codes=True)]
    return found


def settings() -> Iterator[tuple[Case, int, bool]]:
    """Each case with each chip and a flag of the kernel's own: both ways in bfloat16, in other dtypes one way on one
    chip and the other way on the other, in turn."""
    for turn, case in enumerate(cases()):
        for place, chip in enumerate(AMPERE_ON):
            yield from (
                (case, chip, flag) for flag in (False, True) if case.dtype == "bf16" or flag == (turn + place) % 2
            )


@triton.jit
def _bf16(x):
    """fp32 rounded to the nearest bfloat16, ties to even; of finite numbers, on every chip."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pages(table, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of keys start..start + BLOCK_N, one for each unless all are in one; page 0 from `end` on."""
    if BLOCK_SIZE < BLOCK_N:
        keys = start + tl.arange(0, BLOCK_N)
        pages = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
    else:
        pages = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    return pages


@triton.jit
def attend(
    state,  # sums [M, WIDTH] not yet divided by their weights' total [M], which stand relative to a peak [M]
    q,  # [M, WIDTH]
    positions,  # [M] of the queries
    slopes,  # [M] of their heads; times log2(e), or rounded
    kv,  # at this KV head
    scales,  # at this KV head
    half_stride,
    page_stride,
    kv_heads,
    table,
    first,  # a multiple of BLOCK_N
    end,
    last,
    seen_from,  # the first key that any query sees, if WINDOWED: in the place of pages before it there is page 0
    window,
    scale,  # times log2(e)
    factor,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CODES: tl.constexpr,
    INVARIANT: tl.constexpr = False,
):
    """Walk over keys first..end; without MASKED all queries see all of them, and end is a multiple too.

    INVARIANT: keys that are there for a row's company alone leave its state as it is, to the bit.
    """
    # of float32: three products on tensor cores, but for queries so wide that their parts would fill all registers
    precision: tl.constexpr = "tf32x3" if WIDTH <= 128 else "ieee"
    sums, totals, peaks = state
    columns = tl.arange(0, WIDTH)[None, :]
    pages = _pages(table, first, last, BLOCK_SIZE, BLOCK_N)
    if CODES != "none":
        key_units, value_units = load_scales(
            scales, half_stride, page_stride, kv_heads, pages, first, last, seen_from, WINDOWED, BLOCK_SIZE, BLOCK_N,
            CODES,
        )  # fmt: skip
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        slots = pages.to(tl.int64) * page_stride + keys % BLOCK_SIZE * (kv_heads * HEAD_DIM)
        places = kv + slots[:, None] + columns
        # a tile ahead, for else keys would wait for their page's number
        following = _pages(table, start + BLOCK_N, last, BLOCK_SIZE, BLOCK_N)
        # what lies behind the last key, or in page 0, may be no number
        if MASKED:
            there = keys < end
            if WINDOWED:
                there &= keys >= seen_from
            there = there[:, None] & (columns < HEAD_DIM)
            k = tl.load(places, mask=there, other=0.0)
        elif WIDTH == HEAD_DIM:
            k = tl.load(places)
        else:
            k = tl.load(places, mask=columns < HEAD_DIM, other=0.0)
        if CODES != "none":
            k = decode(k, q.dtype, CODES)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=precision)
        if CODES != "none":
            scores *= key_units[None, :]
        unit = scale
        if BIAS == "distance":
            scores = scores * scale + slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
            unit = 1.0
        elif BIAS == "rounded":
            scores = scores * scale + factor * _bf16(slopes[:, None] * _bf16(keys.to(tl.float32))[None, :])
            unit = 1.0
        if MASKED:
            seen = keys[None, :] <= positions[:, None]
            if WINDOWED:
                seen &= keys[None, :] > positions[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peaks, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit - higher[:, None])
        fade = tl.exp2(peaks - higher)
        peaks = higher
        totals = totals * fade + tl.sum(weights, 1)
        if MASKED:
            v = tl.load(places + half_stride, mask=there, other=0.0)
        elif WIDTH == HEAD_DIM:
            v = tl.load(places + half_stride)
        else:
            v = tl.load(places + half_stride, mask=columns < HEAD_DIM, other=0.0)
        if CODES != "none":
            v = decode(v, q.dtype, CODES)
            weights *= value_units[None, :]
            key_units, value_units = load_scales(
                scales, half_stride, page_stride, kv_heads, following, start + BLOCK_N, last, seen_from, WINDOWED,
                BLOCK_SIZE, BLOCK_N, CODES,
            )  # fmt: skip
        pages = following
        more = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * fade[:, None], input_precision=precision)
        if INVARIANT:
            met = start <= positions
            if WINDOWED:
                met &= start + BLOCK_N > positions - window + 1
            sums = tl.where(met[:, None], more, sums)
        else:
            sums = more
    return sums, totals, peaks


@triton.jit
def no_keys(M: tl.constexpr, WIDTH: tl.constexpr):
    """No keys yet; the peak is finite, so that rows which see none give no NaN."""
    return tl.zeros([M, WIDTH], tl.float32), tl.zeros([M], tl.float32), tl.full([M], -1e30, tl.float32)


@triton.jit
def head_slopes(slopes, heads, factor, BIAS: tl.constexpr):
    if BIAS == "distance":
        found = tl.load(slopes + heads) * factor
    elif BIAS == "rounded":
        found = _bf16(tl.load(slopes + heads))
    else:
        found = heads.to(tl.float32)
    return found
