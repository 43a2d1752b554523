"""The tensors of steps of any kind, which stay where recorded calls read them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.engine.runner.batch_builder import lay_out
from nanovllm.engine.runner.decode_batch import DecodeBatch, decodes
from nanovllm.engine.step import StepPlan
from nanovllm.ops.graph import StepSizes


class StepBatch(DecodeBatch):
    """What any step writes. sizes: the largest, each another number."""

    def __init__(self, *, max_num_batched_tokens: int, max_num_seqs: int, max_pages: int, block_size: int) -> None:
        self.sizes = StepSizes(max(max_num_batched_tokens, max_num_seqs + 2), max_num_seqs, max_num_seqs + 1)
        super().__init__(
            max_num_seqs=max_num_seqs,
            max_pages=max_pages,
            block_size=block_size,
            max_num_batched_tokens=self.sizes.tokens,
        )
        self._decodes = True

    def write_step(self, plan: StepPlan) -> StepSizes:
        """Put the step into the first rows."""
        sequences = plan.sequences
        count = len(sequences)
        if decodes(plan):
            if not self._decodes:
                self._starts[:], self._rows[:] = np.arange(len(self._starts)), np.arange(len(self._rows))
                self._decodes = True
            self.write(sequences)
            return StepSizes(count, count, count)
        self._decodes = False
        self._write_tables(sequences)
        fields = lay_out(sequences, self._tables[:count], self._block_size)
        targets: dict[str, np.ndarray] = {
            "input_ids": self._ids,
            "positions": self._positions,
            "query_start": self._starts,
            "seq_lens": self._seq_lens,
            "slot_mapping": self._slots,
            "state_slots": self._state_slots,
            "logits_rows": self._rows,
        }
        for name, values in fields.items():
            targets[name][: len(values)] = values
        return StepSizes(len(fields["input_ids"]), count, len(fields["logits_rows"]))

    def largest(self) -> Batch:
        """All rows, whatever is written to them; for attention that prepares nothing."""
        return dataclasses.replace(
            self.view(self.max_num_seqs),
            input_ids=torch.from_numpy(self._ids),
            positions=torch.from_numpy(self._positions),
            slot_mapping=torch.from_numpy(self._slots),
            logits_rows=torch.from_numpy(self._rows),
            max_query_len=self.sizes.tokens,
        )
