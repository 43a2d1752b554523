"""DecodeBatch: the tensors of steps that decode, which stay where recorded calls read them."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.engine.batch_builder import fill_tables
from nanovllm.engine.step import PlannedSequence, StepPlan


def decodes(plan: StepPlan) -> bool:
    """Whether every sequence computes one token and samples the next."""
    return all(len(s.token_ids) == 1 and s.sample is not None for s in plan.sequences)


class DecodeBatch:
    """What the steps of up to `max_num_seqs` decoding sequences write, in the host's memory."""

    def __init__(self, *, max_num_seqs: int, max_pages: int, block_size: int) -> None:
        """max_pages: of a sequence."""
        self._block_size = block_size
        self._ids, self._positions, self._slots = np.zeros((3, max_num_seqs), dtype=np.int64)
        self._seq_lens, self._state_slots = np.zeros((2, max_num_seqs), dtype=np.int32)
        self._tables = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self._rows = np.arange(max_num_seqs)
        self._starts = np.arange(max_num_seqs + 1, dtype=np.int32)

    def write(self, sequences: list[PlannedSequence]) -> None:
        """Put the sequences in the first rows; tables keep what earlier steps left behind a sequence's pages."""
        count = len(sequences)
        self._ids[:count] = np.concatenate([s.token_ids for s in sequences])
        positions = np.array([s.start for s in sequences])
        self._positions[:count] = positions
        self._seq_lens[:count] = positions + 1
        fill_tables(self._tables[:count], [s.block_table for s in sequences])
        pages, offsets = np.divmod(positions, self._block_size)
        self._slots[:count] = self._tables[self._rows[:count], pages] * np.int64(self._block_size) + offsets
        self._state_slots[:count] = [s.state_slot for s in sequences]

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
