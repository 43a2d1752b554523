"""Decoding steps that are recorded once for each number of sequences, and then replayed."""

from __future__ import annotations

import dataclasses

import torch

from nanovllm.attention.base import AttentionBackend
from nanovllm.batch import Batch
from nanovllm.models.base import CausalLM
from nanovllm.ops.base import Graph, Recorder

# With more rows than these a step is long beside what its calls cost (docs/benchmarks.md).
_MAX_ROWS = 256


class StepGraphs:
    """Each step is copied into tensors that stay, from which the recorded calls read.

    max_pages: of a sequence.
    """

    def __init__(
        self,
        model: CausalLM,
        recorder: Recorder,
        backend: AttentionBackend,
        *,
        max_num_seqs: int,
        block_size: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        self._model, self._recorder, self._backend = model, recorder, backend
        self._block_size = block_size
        rows = self._max_rows = min(max_num_seqs, _MAX_ROWS)
        self._ids, self._positions, self._slots = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._seq_lens, self._state_slots = torch.zeros(2, rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(rows, max_pages, dtype=torch.int32, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._all_rows = torch.arange(rows, device=device)
        self._seen: set[int] = set()
        self._graphs: dict[int, tuple[torch.Tensor, Graph]] = {}
        self._usable = True

    def takes(self, batch: Batch) -> bool:
        """A token for each sequence, and for each of them the next one is sampled."""
        rows = len(batch.input_ids)
        return self._usable and len(batch.seq_lens) == len(batch.logits_rows) == rows <= self._max_rows

    def logits(self, batch: Batch) -> torch.Tensor:
        """fp32 [B, vocabulary], to be used before the next step overwrites it."""
        count = len(batch.input_ids)
        if count not in self._seen:  # a number that comes once is not worth recording
            self._seen.add(count)
            return self._model.compute_logits(self._model(batch))
        static = self._fill(batch, count)
        if count in self._graphs:
            logits, graph = self._graphs[count]
            graph.replay()
            return logits
        logits, recorded = self._recorder.record(lambda: self._model.compute_logits(self._model(static)))
        if recorded is None:
            self._usable = False
        else:
            self._graphs[count] = logits, recorded
        return logits

    def _fill(self, batch: Batch, count: int) -> Batch:
        pages = batch.block_tables.shape[1]
        self._ids[:count] = batch.input_ids
        self._positions[:count] = batch.positions
        self._slots[:count] = batch.slot_mapping
        self._seq_lens[:count] = batch.seq_lens
        self._tables[:count, :pages] = batch.block_tables
        if batch.state_slots is not None:
            self._state_slots[:count] = batch.state_slots
        static = Batch(
            input_ids=self._ids[:count],
            positions=self._positions[:count],
            query_start=self._starts[: count + 1],
            seq_lens=self._seq_lens[:count],
            slot_mapping=self._slots[:count],
            block_tables=self._tables[:count],
            state_slots=None if batch.state_slots is None else self._state_slots[:count],
            logits_rows=self._all_rows[:count],
            max_query_len=1,
            max_seq_len=self._tables.shape[1] * self._block_size,
        )
        return dataclasses.replace(static, attention=self._backend.prepare(static, self._block_size))
