"""Tables of decoding sequences are written when they change, and always hold what they should."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.page_table import PageTable
from nanovllm.engine.runner.decode_batch import DecodeBatch
from nanovllm.engine.step import PlannedSequence
from nanovllm.sample_row import SampleRow

NO_TOKENS = np.zeros(0, np.int32)


def part(table: PageTable) -> PlannedSequence:
    row = SampleRow(SamplingParams(), 0, 0, NO_TOKENS, NO_TOKENS)
    return PlannedSequence(0, np.array([7], np.int32), 4 * len(table) - 1, table.pages, 0, row)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_hold_the_tables_of_every_step(data):
    """Sequences that come, go, change places, get pages and give pages back, and padding in between."""
    decoding = DecodeBatch(max_num_seqs=4, max_pages=8, block_size=4)
    tables = [PageTable([i + 1]) for i in range(4)]
    for page in range(5, 20):
        chosen = data.draw(st.permutations(tables))[: data.draw(st.integers(1, 4))]
        decoding.write([part(table) for table in chosen])
        batch = decoding.view(4)
        for i, table in enumerate(chosen):
            assert batch.block_tables[i, : len(table)].tolist() == table.pages.tolist()
            assert batch.slot_mapping[i] == 4 * table.pages[-1] + 3
        decoding.pad(len(chosen), data.draw(st.integers(len(chosen), 4)))
        changed = data.draw(st.integers(0, 3))
        if data.draw(st.booleans()) and len(tables[changed]) < 8:
            tables[changed].extend([page])
        if data.draw(st.booleans()) and len(tables[changed]) > 1:
            tables[changed].release(0, len(tables[changed]) - 1)
