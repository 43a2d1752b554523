"""From a StepPlan to the Batch of device tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.engine.step import PlannedSequence, StepPlan
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
    tables = np.zeros((len(sequences), max([len(s.block_table) for s in sequences])), dtype=np.int32)
    fill_tables(tables, [s.block_table for s in sequences])
    fields = {**lay_out(sequences, tables, block_size), "block_tables": tables}
    if not with_states:
        del fields["state_slots"]
    follows = np.array([s.follows for s in sequences])
    pending = np.flatnonzero(follows >= 0) if sampled is not None else follows[:0]
    ends, seq_lens = fields["query_start"][1:].astype(np.int64), fields["seq_lens"]
    *tensors, rows, sources = to_device([*fields.values(), ends[pending] - 1, follows[pending]], device)
    found = dict(zip(fields, tensors, strict=True))
    if sampled is not None and len(pending):
        found["input_ids"][rows] = sampled[sources]
    longest = max([s.num_tokens for s in sequences])
    batch = Batch(**found, max_query_len=longest, max_seq_len=int(seq_lens.max()))
    prepared = backend.prepare(batch, block_size)
    return batch if prepared is None else dataclasses.replace(batch, attention=prepared)


def lay_out(sequences: list[PlannedSequence], tables: np.ndarray, block_size: int) -> dict[str, np.ndarray]:
    """What a Batch has of sequences with these block tables [B, M], but the tables."""
    counts = [len(s.token_ids) for s in sequences]
    ends = np.array(counts).cumsum()
    seq_lens = np.array([s.start for s in sequences]) + counts
    owner = np.arange(len(sequences)).repeat(counts)
    positions = np.arange(len(owner)) + (seq_lens - ends)[owner]
    pages, offsets = np.divmod(positions, block_size)
    samples = np.array([s.sample is not None for s in sequences])
    return {
        "input_ids": np.concatenate([s.token_ids for s in sequences]).astype(np.int64),
        "positions": positions,
        "query_start": np.concatenate(([0], ends)).astype(np.int32),
        "seq_lens": seq_lens.astype(np.int32),
        "slot_mapping": tables[owner, pages] * np.int64(block_size) + offsets,
        "state_slots": np.array([s.state_slot for s in sequences], dtype=np.int32),
        "logits_rows": ends[samples] - 1,
    }


def fill_tables(tables: np.ndarray, rows: list[np.ndarray]) -> None:
    """Put rows of several lengths under one another, into int32 that is left as it is behind them."""
    lengths = [len(row) for row in rows]
    columns = np.arange(max(lengths))
    tables[:, : len(columns)][columns < np.array(lengths)[:, None]] = np.concatenate(rows)
