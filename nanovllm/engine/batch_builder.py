"""From a StepPlan to the Batch of device tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.engine.step import StepPlan


def build_batch(
    plan: StepPlan, *, block_size: int, device: torch.device, backend: AttentionBackend, with_states: bool
) -> Batch:
    """Lay the planned sequences' tokens end to end."""
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

    def on_device(array: np.ndarray, dtype: type[np.integer] = np.int64) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype, copy=False)).to(device)

    batch = Batch(
        input_ids=on_device(np.concatenate([s.token_ids for s in sequences])),
        positions=on_device(positions),
        query_start=on_device(np.concatenate(([0], ends)), np.int32),
        seq_lens=on_device(seq_lens, np.int32),
        slot_mapping=on_device(tables[owner, pages] * np.int64(block_size) + offsets),
        block_tables=on_device(tables, np.int32),
        state_slots=on_device(np.array([s.state_slot for s in sequences]), np.int32) if with_states else None,
        logits_rows=on_device(ends[samples] - 1),
        max_query_len=max(counts),
        max_seq_len=int(seq_lens.max()),
    )
    prepared = backend.prepare(batch, block_size)
    return batch if prepared is None else dataclasses.replace(batch, attention=prepared)


def fill_tables(tables: np.ndarray, rows: list[np.ndarray]) -> None:
    """Put rows of several lengths under one another, into int32 that is left as it is behind them."""
    lengths = [len(row) for row in rows]
    columns = np.arange(max(lengths))
    tables[:, : len(columns)][columns < np.array(lengths)[:, None]] = np.concatenate(rows)
