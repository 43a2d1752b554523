"""Plans that have crossed a pipe are what they were."""

import dataclasses
import pickle
from collections.abc import Mapping

import numpy as np
import pytest
from helpers import MockExecutor, mock_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.executors.plan_wire import PlanReader, PlanWriter
from nanovllm.engine.step import PlannedSequence, fill_in
from nanovllm.sample_row import SampleRow


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (PlannedSequence, SampleRow)):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and isinstance(b, Mapping) == isinstance(a, Mapping)


class OverAWire:
    """Two readers, as ranks are; nothing of a plan reaches the mock but through the wire."""

    def __init__(self, mock: MockExecutor):
        self.mock, self.capacity = mock, mock.capacity
        self.writer, self.readers = PlanWriter(), (PlanReader(), PlanReader())
        self.in_full = 0

    def submit(self, plan):
        wire = self.writer.write(plan)
        self.in_full += len(wire.samples)
        message = pickle.dumps(wire)
        on_gpu, on_cpu = (reader.read(pickle.loads(message)) for reader in self.readers)
        assert same(plan.sequences, on_gpu.sequences)  # where pending tokens are never filled in
        assert same(plan.sequences, on_cpu.sequences)
        fill_in(on_cpu, self.mock.sampled)
        return self.mock.submit(on_cpu)

    def close(self):
        self.mock.close()


def wired_engine(**options):
    engine, mock = mock_engine(**options)
    engine._executor = OverAWire(mock)
    return engine, mock


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20),
    min_tokens=st.sampled_from([0, 1]),
    seed=st.integers(0, 9),
    n=st.integers(1, 2),
    prompt_logprobs=st.sampled_from([None, 2]),
    logit_bias=st.sampled_from([None, {3: 1.0}]),
    stop_token_ids=st.sampled_from([None, [5]]),
)


@settings(max_examples=60, deadline=None)
@given(
    operations=st.lists(
        st.one_of(
            st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=40), PARAMS),
            st.sampled_from(["step", "step", "step", "abort", "interrupt"]),
        ),
        max_size=40,
    ),
    num_blocks=st.integers(9, 24),
    num_slots=st.sampled_from([0, 4]),
    budget=st.integers(6, 40),
    ahead=st.booleans(),
)
def test_every_plan_of_any_engine_arrives(operations, num_blocks, num_slots, budget, ahead):
    engine, mock = wired_engine(
        num_blocks=num_blocks,
        num_slots=num_slots,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        async_scheduling=ahead,
    )
    added = []
    for operation in operations:
        if isinstance(operation, tuple):
            added.append(engine.prepare(*operation))
            engine.add(added[-1])
        elif operation == "abort" and added:
            engine.abort(added.pop().request_id)
        elif operation == "interrupt" and engine.has_unfinished:
            mock.fail_next = RuntimeError("interrupted")
            try:
                engine.step()
            except RuntimeError:
                continue
        elif engine.has_unfinished:
            engine.step()
    while engine.has_unfinished:
        engine.step()


@pytest.mark.parametrize("ahead", [False, True])
def test_parameters_and_history_cross_once(ahead):
    engine, _ = wired_engine(num_blocks=200, async_scheduling=ahead)
    for i in range(8):
        params = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={i: 1.0})
        engine.add(engine.prepare([i + 1] * 50, params))
    while engine.has_unfinished:
        engine.step()
    assert engine._executor.in_full == 8
