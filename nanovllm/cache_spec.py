"""What a layer keeps between steps, and how memory is divided among all that layers keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanovllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PagedKVSpec:
    """Keys and values of an attention layer: one entry a token, in shared pages.

    dtype: of keys and values as the layer makes them.
    window: tokens a query sees including itself; None sees all.
    alibi: whether scores have its bias, which not every attention backend can add.
    codes: what they are quantised to in pages, beside an fp32 scale of each token and head; None: not at all.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None
    alibi: bool = False
    codes: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        """Of the numbers in pages."""
        return self.codes or self.dtype

    @property
    def row(self) -> int:
        """Numbers that the keys, or the values, of a token and head take, with room for a scale where there is one."""
        return self.head_dim if self.codes is None else self.head_dim + torch.float32.itemsize // self.codes.itemsize

    def block_bytes(self, block_size: int) -> int:
        return 2 * block_size * self.num_kv_heads * self.row * self.stored.itemsize


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Recurrent state of fixed size (convolution, SSM): one slot a sequence.

    grid: tokens between the positions, counted from a sequence's start, at which a prompt may be
        cut without changing a bit of the result.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    grid: int = 1

    @property
    def slot_bytes(self) -> int:
        return sum(math.prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))


CacheSpec = PagedKVSpec | StateSpec


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Pages and state slots of one engine, the write sinks (page 0, slot 0) among them.

    window: tokens that any layer looks back, if all attention is windowed; pages wholly behind
        it are given back.
    state_grid: states are captured at multiples of this many tokens.
    chunk_grid: prompts are cut at multiples of this many tokens.
    snapshot_interval: tokens whose keys and values cost as much memory as one captured state.
    """

    num_blocks: int
    num_slots: int
    num_bytes: int
    window: int | None = None
    state_grid: int = 1
    chunk_grid: int = 1
    snapshot_interval: int = 4096

    def longest_sequence(self, block_size: int, max_num_batched_tokens: int) -> int | None:
        """Tokens of the longest sequence that fits when it is alone; None if any does."""
        tokens = (self.num_blocks - 1) * block_size
        # beside the window and a chunk: both may begin and end within a page
        if self.window is not None and tokens >= self.window + max_num_batched_tokens + 2 * block_size:
            return None
        return tokens


def plan_cache(
    specs: Sequence[CacheSpec],
    memory: int,
    *,
    block_size: int,
    max_num_seqs: int,
    max_blocks: int,
    num_blocks: int | None = None,
    snapshots: bool = False,
) -> CachePlan:
    """Divide `memory` bytes between state slots and pages.

    Slots are for the running sequences and, with `snapshots`, for as many captured prefixes;
    they take half of the memory at most, and then fewer sequences run at once.
    max_blocks: as many as could ever be used at once; more would be waste.
    num_blocks: a number the user fixed; ConfigError if it does not fit the memory.
    """
    states = [s for s in specs if isinstance(s, StateSpec)]
    paged = [s for s in specs if isinstance(s, PagedKVSpec)]
    slot_bytes = sum(s.slot_bytes for s in states)
    block_bytes = sum(s.block_bytes(block_size) for s in paged)
    wanted = (max_blocks if num_blocks is None else num_blocks) + 1
    if num_blocks is not None and wanted * block_bytes > memory:
        raise ConfigError(
            f"num_kvcache_blocks={num_blocks} needs {wanted * block_bytes:,} bytes, but "
            f"{max(0, memory):,} are free: lower it, or free memory"
        )
    num_slots = 0
    if slot_bytes:
        room = memory // 2 if block_bytes and num_blocks is None else memory - wanted * block_bytes
        num_slots = min((1 + snapshots) * max_num_seqs + 1, room // slot_bytes)
        if num_slots < 2:
            raise ConfigError(
                f"{room:,} bytes for recurrent states hold no sequence: a state takes {slot_bytes:,}, and slot 0 "
                "is reserved; give more memory"
            )
    left = memory - num_slots * slot_bytes
    blocks = min(left // block_bytes, wanted) if block_bytes else wanted
    if blocks < 2:
        raise ConfigError(
            f"{memory:,} bytes of cache memory hold no page: {num_slots} state slots take "
            f"{num_slots * slot_bytes:,}, a page {block_bytes:,} and page 0 is reserved; give more memory"
        )
    chunk_grid = math.lcm(*(s.grid for s in states))
    grid = math.lcm(block_size, chunk_grid)
    windows = [s.window for s in paged]
    return CachePlan(
        blocks,
        num_slots,
        blocks * block_bytes + num_slots * slot_bytes,
        window=max(w for w in windows if w is not None) if windows and None not in windows else None,
        state_grid=grid,
        chunk_grid=chunk_grid,
        snapshot_interval=max(1, slot_bytes * block_size // block_bytes // grid) * grid if block_bytes else 64 * grid,
    )
