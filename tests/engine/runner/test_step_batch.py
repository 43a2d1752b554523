"""Steps of any kind, one after the other in the same tensors, hold what `build_batch` makes of each."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.attention.native import NativeAttention
from nanovllm.engine.page_table import PageTable
from nanovllm.engine.runner.batch_builder import build_batch
from nanovllm.engine.runner.step_batch import StepBatch
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.sample_row import SampleRow

NO_TOKENS = np.zeros(0, np.int32)
BLOCK, SEQUENCES, TOKENS = 4, 3, 40


def part(data: st.DataObject, table: PageTable, slot: int, *, decodes: bool) -> PlannedSequence:
    end = data.draw(st.integers(BLOCK * (len(table) - 1) + 1, BLOCK * len(table)))
    count = 1 if decodes else data.draw(st.integers(1, min(end, TOKENS // SEQUENCES)))
    row = SampleRow(SamplingParams(), 0, 0, NO_TOKENS, NO_TOKENS)
    sample = row if decodes or data.draw(st.booleans()) else None
    ids = data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
    return PlannedSequence(0, np.array(ids, np.int32), end - count, table.pages, slot, sample)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_step_is_what_it_would_be_alone(data):
    batch = StepBatch(max_num_batched_tokens=TOKENS, max_num_seqs=SEQUENCES, max_pages=8, block_size=BLOCK)
    tables = [PageTable([i + 1]) for i in range(SEQUENCES)]
    largest = batch.largest()
    assert [len(largest.input_ids), len(largest.seq_lens), len(largest.logits_rows)] == list(batch.sizes)
    for page in range(5, 15):
        decodes, chosen = data.draw(st.booleans()), data.draw(st.permutations(range(SEQUENCES)))
        chosen = chosen[: data.draw(st.integers(1, SEQUENCES))]
        plan = StepPlan([part(data, tables[i], i + 1, decodes=decodes) for i in chosen])
        sizes = batch.write_step(plan)
        device, backend = torch.device("cpu"), NativeAttention()
        wanted = build_batch(plan, block_size=BLOCK, device=device, backend=backend, with_states=True)
        assert sizes == (len(wanted.input_ids), len(wanted.seq_lens), len(wanted.logits_rows))
        for field in dataclasses.fields(wanted):
            values = getattr(wanted, field.name)
            if field.name == "block_tables":
                for row, i in enumerate(chosen):
                    assert largest.block_tables[row, : len(tables[i])].tolist() == tables[i].pages.tolist()
            elif isinstance(values, torch.Tensor):
                assert torch.equal(getattr(largest, field.name)[: len(values)], values), field.name
        grown = data.draw(st.integers(0, SEQUENCES - 1))
        if len(tables[grown]) < 8:
            tables[grown].extend([page])


def test_sizes_differ_however_few_tokens_a_step_may_have():
    sizes = StepBatch(max_num_batched_tokens=4, max_num_seqs=4, max_pages=2, block_size=BLOCK).sizes
    assert len(set(sizes)) == 3 and min(sizes) >= 4
