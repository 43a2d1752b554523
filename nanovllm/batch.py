"""Batch: everything the device needs to know about one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Device tensors of one step: T tokens of B sequences, ragged, in sequence order.

    Prefill, decode and mixed steps differ only in `query_start`; there is no mode flag.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, absolute
    query_start: torch.Tensor  # [B+1] int32: tokens query_start[b]..query_start[b+1] are sequence b's
    seq_lens: torch.Tensor  # [B] int32: tokens of b in the cache after this step
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset, where a token's KV goes
    block_tables: torch.Tensor  # [B, M] int32: pages of each sequence, 0 beyond its last
    logits_rows: torch.Tensor  # [R] int64: rows of T whose next token is sampled
    max_query_len: int
    max_seq_len: int
    state_slots: torch.Tensor | None = None  # [B] int32, for layers with recurrent state
    attention: Any = None  # what AttentionBackend.prepare made of this batch, once for all layers
