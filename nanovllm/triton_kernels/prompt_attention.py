"""Attention of sequences with several queries in a step: chunks of prompts, whole or with history in the cache.

Designed against the floor of the tensor cores: each tile of keys is loaded once for 128 rows of queries, two
tiles ahead of its use. Not measured yet.
"""

from __future__ import annotations

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
    head_slopes,
    is_hopper,
    no_keys,
    settings,
)
from nanovllm.triton_kernels.kv_codes import scales_begin
from nanovllm.triton_kernels.variant import Variant

# (Hopper, bytes of a number, head dimension as a power of two): the largest that neither spill registers nor take more
# shared memory than a block has, by Triton 3.6 and 3.9. float32 is multiplied in three parts on tensor cores, which
# takes many registers.
_TILES = {
    (True, 2, 64): Tile(128, 64, 8, 3),
    (True, 2, 128): Tile(128, 64, 8, 3),
    (True, 2, 256): Tile(128, 32, 8, 3),
    (False, 2, 64): Tile(64, 64, 4, 3),
    (False, 2, 128): Tile(128, 32, 8, 3),
    (False, 2, 256): Tile(64, 32, 8, 2),
    **{(hopper, 4, 64): Tile(32, 32, 8, 2) for hopper in (False, True)},
    **{(hopper, 4, 128): Tile(16, 64, 8, 2) for hopper in (False, True)},
    **{(hopper, 4, 256): Tile(16, 16, 8, 3, 255) for hopper in (False, True)},
}
# Those of prompts and decodes alike: 64 rows, as a decode fills few of them.
_INVARIANT_TILES = {
    **_TILES,
    (True, 2, 64): Tile(64, 64, 4, 3),
    (True, 2, 256): Tile(64, 32, 8, 2),
    **{(hopper, 2, 128): Tile(64, 32, 4, 3, 255) for hopper in (False, True)},
    **{(hopper, 4, 64): Tile(16, 32, 8, 2) for hopper in (False, True)},
}
# To decode them takes registers.
_CODE_TILES = {
    (False, 2, 128): Tile(64, 32, 8, 3),
    (False, 2, 256): Tile(64, 16, 8, 3),
    (True, 2, 128): Tile(128, 32, 8, 3),
    (True, 2, 256): Tile(64, 16, 8, 2),
}
_INVARIANT_CODE_TILES = {
    **_CODE_TILES,
    (True, 2, 128): _INVARIANT_TILES[True, 2, 128],
    (True, 2, 256): Tile(32, 32, 8, 2, 255),
}


def _tile(hopper: bool, itemsize: int, head_dim: int, *, invariant: bool, codes: bool) -> Tile:
    kind = hopper, itemsize, max(64, triton.next_power_of_2(head_dim))
    if codes and kind in _CODE_TILES:
        return (_INVARIANT_CODE_TILES if invariant else _CODE_TILES)[kind]
    return (_INVARIANT_TILES if invariant else _TILES)[kind]


class QueryTiles:
    """Which sequence each tile of queries is of; found on the device, once a step for each size of tile."""

    def __init__(self, batch: Batch, *, invariant: bool = False) -> None:
        """invariant: every query gets the same bits in any chunk and company, so that sequences with one query have
        tiles too: one kernel, one size of tile, one order of keys, undivided."""
        self._batch = batch
        self.invariant = invariant
        self._made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, rows: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [N] sequences (B behind the last tile) and int32 [B + 1] first tiles, for tiles of so many rows.

        N is what the host knows to be enough. Sequences with one query have no tiles, unless `invariant`.
        """
        if (rows, group) not in self._made:
            batch = self._batch
            counts = batch.query_start.diff()
            tiles = (counts * group + rows - 1) // rows
            if not self.invariant:
                tiles = torch.where(counts > 1, tiles, 0)
            starts = torch.zeros_like(batch.query_start)
            starts[1:] = tiles.cumsum(0)
            most = min(
                len(counts) * triton.cdiv(batch.max_query_len * group, rows),
                len(batch.positions) * group // rows + len(counts),
            )
            numbers = torch.arange(most, dtype=torch.int32, device=starts.device)
            sequences = torch.searchsorted(starts[1:], numbers, right=True, out_int32=True)
            self._made[rows, group] = sequences, starts
        return self._made[rows, group]


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def prompt_kernel(
    q,  # [T, H, D]
    kv,  # as in `cache_arguments`
    out,  # [T, H, D], contiguous
    tile_sequences,  # whose queries a tile has; num_sequences behind the last
    tile_starts,  # [B + 1] first tile of each sequence
    num_sequences,
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
    INVARIANT: tl.constexpr,
):
    """Grid: (KH, tiles). INVARIANT: keys are masked from the first on, as the chunk decides which ones all see."""
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tile_sequences + tile)
    if sequence >= num_sequences:
        return
    # a prompt's last tiles have the most keys: they go first
    begin = (tl.load(tile_starts + sequence + 1) - 1 - tile) * BLOCK_M
    token = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - token
    context = tl.load(seq_lens + sequence) - queries
    rows = begin + tl.arange(0, BLOCK_M)
    positions = context + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, WIDTH)[None, :]
    there = (rows < queries * GROUP)[:, None] & (columns < HEAD_DIM)
    # what is far is one number: each row's own would take registers
    first_query = begin // GROUP
    behind = rows // GROUP - first_query
    far = (token + first_query).to(tl.int64)
    places = q + far * q_token_stride + (behind * q_token_stride + heads * q_head_stride)[:, None] + columns
    queried = tl.load(places, mask=there, other=0.0)

    end = context + tl.minimum(queries, (begin + BLOCK_M - 1) // GROUP + 1)
    lowest = context + begin // GROUP
    slope = head_slopes(slopes, heads, factor, BIAS)
    table = tables + sequence.to(tl.int64) * table_stride
    here, scales_here = kv + kv_head * HEAD_DIM, kv
    if CODES != "none":
        scales_here = scales + scales_begin(kv_heads, BLOCK_SIZE, HEAD_DIM) + kv_head
    state = no_keys(BLOCK_M, WIDTH)
    seen_from = lowest - window + 1
    if WINDOWED:
        masked_from = tl.maximum(seen_from, 0) // BLOCK_N * BLOCK_N
    elif INVARIANT:
        masked_from = 0
    else:
        masked_from = (lowest + 1) // BLOCK_N * BLOCK_N
        state = attend(
            state, queried, positions, slope, here, scales_here, half_stride, page_stride, kv_heads, table,
            0, masked_from, end, 0, window, scale, factor, False, WINDOWED, BIAS, BLOCK_SIZE, HEAD_DIM, WIDTH, BLOCK_N,
            CODES,
        )  # fmt: skip
    sums, totals, _ = attend(
        state, queried, positions, slope, here, scales_here, half_stride, page_stride, kv_heads, table,
        masked_from, end, end, seen_from, window, scale, factor, True, WINDOWED, BIAS, BLOCK_SIZE, HEAD_DIM, WIDTH,
        BLOCK_N, CODES, INVARIANT,
    )  # fmt: skip
    token_size = kv_heads * GROUP * HEAD_DIM
    places = out + far * token_size + (behind * token_size + heads * HEAD_DIM)[:, None] + columns
    tl.store(places, (sums / tl.maximum(totals, 1e-30)[:, None]).to(out.dtype.element_ty), mask=there)


def prompt_attention(
    q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, batch: Batch, tiles: QueryTiles, scoring: Scoring
) -> None:
    """Rows of `out` [T, H, D], contiguous, of the sequences that have tiles. q, kv: as in `arguments`."""
    kv_heads, head_dim = kv.shape[3], q.shape[2]
    codes = kv.dtype != q.dtype
    tile = _tile(is_hopper(q.device), q.itemsize, head_dim, invariant=tiles.invariant, codes=codes)
    sequences, starts = tiles.of(tile.rows, q.shape[1] // kv_heads)
    prompt_kernel[(kv_heads, len(sequences))](
        out=out,
        tile_sequences=sequences,
        tile_starts=starts,
        num_sequences=len(batch.seq_lens),
        INVARIANT=tiles.invariant,
        **arguments(q, kv, batch, scoring, tile),
        **tile.options(),
    )


def variant(case: Case, chip: int, invariant: bool) -> Variant:
    tile = _tile(chip == 90, case.itemsize, case.head_dim, invariant=invariant, codes=case.codes)
    types = {"out": f"*{case.dtype}:16", "num_sequences": "i32"}
    types |= dict.fromkeys(("tile_sequences", "tile_starts"), "*i32:16")
    return case.variant(prompt_kernel, tile, chip, types, {"INVARIANT": invariant})


def variants() -> list[Variant]:
    return [variant(*setting) for setting in settings()]
