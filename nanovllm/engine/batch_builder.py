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
    counts = np.array([len(s.token_ids) for s in sequences], dtype=np.int32)
    starts = np.array([s.start for s in sequences], dtype=np.int32)
    query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    seq_lens = starts + counts
    tables = _pad([s.block_table for s in sequences])
    owner = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(query_start[-1]) - query_start[owner] + starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    samples = np.array([s.sample is not None for s in sequences])

    def on_device(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device, dtype)

    batch = Batch(
        input_ids=on_device(np.concatenate([s.token_ids for s in sequences]), torch.int64),
        positions=on_device(positions, torch.int64),
        query_start=on_device(query_start, torch.int32),
        seq_lens=on_device(seq_lens, torch.int32),
        slot_mapping=on_device(slots, torch.int64),
        block_tables=on_device(tables, torch.int32),
        state_slots=on_device(np.array([s.state_slot for s in sequences]), torch.int32) if with_states else None,
        logits_rows=on_device(query_start[1:][samples] - 1, torch.int64),
        max_query_len=int(counts.max()),
        max_seq_len=int(seq_lens.max()),
    )
    return dataclasses.replace(batch, attention=backend.prepare(batch, block_size))


def _pad(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of several lengths under one another, int32, zeros behind the short ones."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), dtype=np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return padded
