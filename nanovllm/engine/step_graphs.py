"""Steps that are recorded before they run; those that decode are kept, one for each number of sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.ops.graph import Graph, Recorder


class StepGraphs:
    """forward: from a batch to the logits of its `logits_rows`. max_pages: of a sequence.

    A step that gives each sequence one token and samples the next is copied into tensors that stay, from
    which the recorded calls read. Every other step is recorded for itself: this takes no longer than to
    make its calls one by one, and they then run without waiting for Python, in memory that is used again.
    """

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        recorder: Recorder,
        backend: AttentionBackend,
        *,
        max_num_seqs: int,
        block_size: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        self._forward, self._recorder, self._backend = forward, recorder, backend
        self._block_size = block_size
        self._ids, self._positions, self._slots = torch.zeros(3, max_num_seqs, dtype=torch.int64, device=device)
        self._seq_lens, self._state_slots = torch.zeros(2, max_num_seqs, dtype=torch.int32, device=device)
        self._tables = torch.zeros(max_num_seqs, max_pages, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_num_seqs, device=device)
        self._kept: dict[int, tuple[torch.Tensor, Graph]] = {}

    def logits(self, batch: Batch) -> torch.Tensor:
        """fp32 [R, vocabulary], to be used before the next step overwrites it. CannotRecord if the model
        does what cannot be recorded; nothing has happened then."""
        count = len(batch.input_ids)
        if count == len(batch.seq_lens) == len(batch.logits_rows):
            batch = self._copied(batch, count)
            if count not in self._kept:
                self._kept[count] = self._record(batch)
            logits, graph = self._kept[count]
        else:
            logits, graph = self._record(batch)
        graph.replay()
        return logits

    def _record(self, batch: Batch) -> tuple[torch.Tensor, Graph]:
        return self._recorder.record(lambda: self._forward(batch))

    def _copied(self, batch: Batch, count: int) -> Batch:
        self._ids[:count] = batch.input_ids
        self._positions[:count] = batch.positions
        self._slots[:count] = batch.slot_mapping
        self._seq_lens[:count] = batch.seq_lens
        self._tables[:count, : batch.block_tables.shape[1]] = batch.block_tables
        if batch.state_slots is not None:
            self._state_slots[:count] = batch.state_slots
        copied = Batch(
            input_ids=self._ids[:count],
            positions=self._positions[:count],
            query_start=self._starts[: count + 1],
            seq_lens=self._seq_lens[:count],
            slot_mapping=self._slots[:count],
            block_tables=self._tables[:count],
            state_slots=None if batch.state_slots is None else self._state_slots[:count],
            logits_rows=self._rows[:count],
            max_query_len=1,
            max_seq_len=self._tables.shape[1] * self._block_size,
        )
        return dataclasses.replace(copied, attention=self._backend.prepare(copied, self._block_size))
