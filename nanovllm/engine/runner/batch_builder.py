"""From a StepPlan to the Batch of device tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.engine.step import StepPlan
from nanovllm.transfer import to_device


def build_batch(
    plan: StepPlan,
    *,
    block_size: int,
    device: torch.device,
    backend: AttentionBackend,
    with_states: bool,
    sampled: torch.Tensor | None = None,
) -> Batch:
    """Lay the planned sequences' tokens end to end.

    sampled: int64 [R] on the device, by the step before, for tokens that the plan does not know; None if it
        knows all.
    """
    sequences = plan.sequences
    counts = [len(s.token_ids) for s in sequences]
    ends = np.array(counts).cumsum()
    starts = np.array([s.start for s in sequences])
    seq_lens = starts + counts
    tables = np.zeros((len(sequences), max([len(s.block_table) for s in sequences])), dtype=np.int32)
    fill_tables(tables, [s.block_table for s in sequences])
    owner = np.arange(len(sequences)).repeat(counts)
    positions = np.arange(len(owner)) + (seq_lens - ends)[owner]
    pages, offsets = np.divmod(positions, block_size)
    samples = np.array([s.sample is not None for s in sequences])
    follows = np.array([s.follows for s in sequences])
    pending = np.flatnonzero(follows >= 0) if sampled is not None else follows[:0]
    fields = {
        "input_ids": np.concatenate([s.token_ids for s in sequences]).astype(np.int64),
        "positions": positions,
        "query_start": np.concatenate(([0], ends)).astype(np.int32),
        "seq_lens": seq_lens.astype(np.int32),
        "slot_mapping": tables[owner, pages] * np.int64(block_size) + offsets,
        "block_tables": tables,
        "logits_rows": ends[samples] - 1,
    }
    if with_states:
        fields["state_slots"] = np.array([s.state_slot for s in sequences], dtype=np.int32)
    *tensors, rows, sources = to_device([*fields.values(), ends[pending] - 1, follows[pending]], device)
    found = dict(zip(fields, tensors, strict=True))
    if sampled is not None and len(pending):
        found["input_ids"][rows] = sampled[sources]
    batch = Batch(**found, max_query_len=max(counts), max_seq_len=int(seq_lens.max()))
    prepared = backend.prepare(batch, block_size)
    return batch if prepared is None else dataclasses.replace(batch, attention=prepared)


def fill_tables(tables: np.ndarray, rows: list[np.ndarray]) -> None:
    """Put rows of several lengths under one another, into int32 that is left as it is behind them."""
    lengths = [len(row) for row in rows]
    columns = np.arange(max(lengths))
    tables[:, : len(columns)][columns < np.array(lengths)[:, None]] = np.concatenate(rows)
