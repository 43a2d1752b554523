"""The tensors of steps that decode, which stay where recorded calls read them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.transfer import to_device


def decodes(plan: StepPlan) -> bool:
    """Whether every sequence computes one token and samples the next."""
    return all(len(s.token_ids) == 1 and s.sample is not None for s in plan.sequences)


class DecodeBatch:
    """What the steps of up to `max_num_seqs` decoding sequences write, in the host's memory."""

    def __init__(
        self, *, max_num_seqs: int, max_pages: int, block_size: int, max_num_batched_tokens: int | None = None
    ) -> None:
        """max_pages: of a sequence. max_num_batched_tokens: where there are more than decode."""
        self.max_num_seqs = max_num_seqs
        self._block_size = block_size
        self._longs = np.zeros((3, max_num_batched_tokens or max_num_seqs), dtype=np.int64)
        self._ints = np.zeros((2, max_num_seqs), dtype=np.int32)
        self._ids, self._positions, self._slots = self._longs
        self._seq_lens, self._state_slots = self._ints
        self._tables = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self._written: list[np.ndarray | None] = [None] * max_num_seqs  # what the tables' rows were copied from
        self._rows = np.arange(max_num_seqs + 1)
        self._starts = np.arange(max_num_seqs + 1, dtype=np.int32)

    def write(self, sequences: list[PlannedSequence]) -> None:
        """Put the sequences in the first rows; tables keep what earlier steps left behind a sequence's pages.

        A row of tables is written only for another block_table than the last: those that change are new objects.
        There are few calls of numpy, as each takes 20 to 40 us once a model's weights have gone through the caches.
        """
        count, size = len(sequences), self._block_size
        self._write_tables(sequences)
        starts = [s.start for s in sequences]
        self._longs[:, :count] = [
            [s.token_ids.item(0) for s in sequences],
            starts,
            [s.block_table.item(s.start // size) * size + s.start % size for s in sequences],
        ]
        self._ints[:, :count] = [[start + 1 for start in starts], [s.state_slot for s in sequences]]

    def _write_tables(self, sequences: list[PlannedSequence]) -> None:
        for i, (s, written) in enumerate(zip(sequences, self._written, strict=False)):
            if s.block_table is not written:
                self._tables[i, : len(s.block_table)] = self._written[i] = s.block_table

    def view(self, count: int) -> Batch:
        """The first `count` rows, whatever is written to them; for attention that prepares nothing."""
        return Batch(
            input_ids=torch.from_numpy(self._ids[:count]),
            positions=torch.from_numpy(self._positions[:count]),
            query_start=torch.from_numpy(self._starts[: count + 1]),
            seq_lens=torch.from_numpy(self._seq_lens[:count]),
            slot_mapping=torch.from_numpy(self._slots[:count]),
            block_tables=torch.from_numpy(self._tables[:count]),
            state_slots=torch.from_numpy(self._state_slots[:count]),
            logits_rows=torch.from_numpy(self._rows[:count]),
            max_query_len=1,
            max_seq_len=self._tables.shape[1] * self._block_size,
        )

    def pad(self, first: int, end: int) -> None:
        """Make rows that write to page 0 and slot 0, whose single token sees nothing else."""
        for array in (self._ids, self._positions, self._slots, self._state_slots, self._tables):
            array[first:end] = 0
        self._seq_lens[first:end] = 1
        self._written[first:end] = [None] * (end - first)

    def arrays(self, count: int, pages: int) -> list[np.ndarray]:
        """What lies in the first `count` rows, of tables in the first columns: ids, positions, slots, sequences'
        lengths, state slots, tables."""
        vectors = (self._ids, self._positions, self._slots, self._seq_lens, self._state_slots)
        return [*(vector[:count] for vector in vectors), self._tables[:count, :pages]]


class DeviceDecodeBatch:
    """The same on a GPU, with room for padding, and for tokens that the host does not know yet."""

    def __init__(self, sampled: torch.Tensor, *, max_num_seqs: int, max_pages: int, block_size: int) -> None:
        """sampled: int64 [max_num_seqs] on the device, where the tokens of the step before lie."""
        self._sampled, self._device = sampled, sampled.device
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self._host = DecodeBatch(max_num_seqs=max_num_seqs, max_pages=max_pages, block_size=block_size)
        self._host.pad(0, max_num_seqs)
        host_view = self._host.view(max_num_seqs)
        self._whole = dataclasses.replace(
            host_view,
            **{
                field.name: getattr(host_view, field.name).to(self._device, copy=True)
                for field in dataclasses.fields(host_view)
                if isinstance(getattr(host_view, field.name), torch.Tensor)
            },
        )
        self._follows = torch.full((max_num_seqs,), -1, device=self._device)

    def write(self, sequences: list[PlannedSequence], size: int) -> None:
        """Put the sequences in the first rows and padding in those behind, up to `size`. The host waits for nothing."""
        count, pages = len(sequences), max([len(s.block_table) for s in sequences], default=1)
        if sequences:
            self._host.write(sequences)
        self._host.pad(count, size)
        follows = np.full(size, -1)
        follows[:count] = [s.follows for s in sequences]
        *vectors, tables, follow = to_device([*self._host.arrays(size, pages), follows], self._device)
        whole = self._whole
        assert whole.state_slots is not None
        targets = (whole.input_ids, whole.positions, whole.slot_mapping, whole.seq_lens, whole.state_slots)
        for target, vector in zip((*targets, self._follows), (*vectors, follow), strict=True):
            target[:size].copy_(vector)
        whole.block_tables[:size, :pages].copy_(tables)

    def view(self, size: int) -> Batch:
        """The first `size` rows, for attention that prepares nothing. Called by what is recorded, as it looks up
        the tokens that were sampled in the step before."""
        whole, follows = self._whole, self._follows[:size]
        assert whole.state_slots is not None
        return dataclasses.replace(
            whole,
            input_ids=torch.where(follows < 0, whole.input_ids[:size], self._sampled[follows.clamp(min=0)]),
            positions=whole.positions[:size],
            query_start=whole.query_start[: size + 1],
            seq_lens=whole.seq_lens[:size],
            slot_mapping=whole.slot_mapping[:size],
            block_tables=whole.block_tables[:size],
            state_slots=whole.state_slots[:size],
            logits_rows=whole.logits_rows[:size],
        )
