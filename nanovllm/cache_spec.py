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

    window: tokens a query sees including itself; None sees all.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None

    def block_bytes(self, block_size: int) -> int:
        return 2 * block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Recurrent state of fixed size (convolution, SSM): one slot a sequence."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def slot_bytes(self) -> int:
        return sum(math.prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))


CacheSpec = PagedKVSpec | StateSpec


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Pages and state slots of one engine, the write sinks (page 0, slot 0) among them."""

    num_blocks: int
    num_slots: int
    num_bytes: int


def plan_cache(
    specs: Sequence[CacheSpec],
    memory: int,
    *,
    block_size: int,
    max_num_seqs: int,
    max_blocks: int,
    num_blocks: int | None = None,
) -> CachePlan:
    """Divide `memory` bytes: slots for every running sequence first, then pages.

    max_blocks: as many as could ever be used at once; more would be waste.
    num_blocks: a number the user fixed; ConfigError if it does not fit the memory.
    """
    slot_bytes = sum(s.slot_bytes for s in specs if isinstance(s, StateSpec))
    block_bytes = sum(s.block_bytes(block_size) for s in specs if isinstance(s, PagedKVSpec))
    num_slots = max_num_seqs + 1 if slot_bytes else 0
    left = memory - num_slots * slot_bytes
    wanted = (max_blocks if num_blocks is None else num_blocks) + 1
    fits = wanted if left >= 0 else 0  # of pages that cost nothing
    if block_bytes:
        fits = max(0, left) // block_bytes
    if num_blocks is not None and wanted > fits and block_bytes:
        raise ConfigError(
            f"num_kvcache_blocks={num_blocks} needs {wanted * block_bytes:,} bytes, but "
            f"{max(0, left):,} are free: lower it, or max_num_seqs, or free memory"
        )
    blocks = min(fits, wanted)
    if blocks < 2:
        raise ConfigError(
            f"{memory:,} bytes of cache memory hold no page: {num_slots} state slots take "
            f"{num_slots * slot_bytes:,}, a page {block_bytes:,} and page 0 is reserved; "
            "give more memory or lower max_num_seqs"
        )
    return CachePlan(blocks, num_slots, blocks * block_bytes + num_slots * slot_bytes)
