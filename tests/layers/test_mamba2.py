"""Mamba2 against a recurrence of a token at a time in float64, by both makers of ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from kernels import normal
from mamba2_cases import (
    SIZES,
    VARIANTS,
    context,
    make_layer,
    naive,
    only_the_recurrence,
    run_steps,
    schedules,
    step,
    width,
)

from nanovllm.distributed.group import TPGroup
from nanovllm.layers.mamba2 import Mamba2
from nanovllm.ops.library import Library, library_or_reason
from nanovllm.ops.native import NativeOps
from nanovllm.ops.torch_ops import TorchOps

LIBRARY = library_or_reason()
MAKERS = {"torch": TorchOps()} | ({"native": NativeOps(LIBRARY)} if isinstance(LIBRARY, Library) else {})
both_makers = pytest.mark.parametrize("ops", MAKERS.values(), ids=MAKERS)


@both_makers
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(schedule=schedules())
def test_any_mix_of_chunks_resumes_exactly(ops, variant, schedule):
    lengths, steps = schedule
    layer = make_layer(VARIANTS[variant], ops, scale=0.7)
    inputs = {slot: normal(length, 20, seed=slot) for slot, length in lengths.items()}
    outputs = run_steps(layer, inputs, steps)
    for slot, x in inputs.items():
        torch.testing.assert_close(outputs[slot], naive(layer, x).float(), rtol=2e-4, atol=2e-4)


@both_makers
@pytest.mark.parametrize(("dt_bias", "A_log"), [(40.0, 5.0), (-30.0, -8.0), (60.0, -8.0), (-3.0, 5.0)])
def test_extreme_decays_neither_overflow_nor_lose_what_is_remembered(ops, dt_bias, A_log):
    """exp(sum_i) / exp(sum_j) overflows within a few tokens; exp(sum_i - sum_j) loses small
    differences of large sums once a single step has forgotten everything."""
    layer = make_layer(SIZES, ops, scale=0.7, A_log=A_log, dt_bias=dt_bias)
    x = normal(150, 20)
    x[40] *= 100  # one large step of time among small ones, for some heads
    [out] = step(layer, [(1, 0, x)])
    assert out.isfinite().all()
    torch.testing.assert_close(out, naive(layer, x).float(), rtol=2e-4, atol=2e-4)


@both_makers
def test_an_infinite_sequence_spoils_only_itself(ops):
    """Places of a cell that hold no token stood for another sequence's: zero times infinity."""
    layer = only_the_recurrence(make_layer(SIZES, ops))
    spoilt, sound = normal(70, width(SIZES)), normal(70, width(SIZES), seed=1)
    [alone] = step(layer, [(1, 0, sound)])
    spoilt[30:] = float("inf")
    for chunks in ([(2, 0, spoilt), (1, 0, sound)], [(1, 0, sound), (2, 0, spoilt)]):
        out = step(layer, chunks)[[slot for slot, _, _ in chunks].index(1)]
        assert torch.equal(out, alone)


def test_the_state_is_declared_as_each_maker_wants_it():
    """torch's with the grid on which it may be cut; the native one, which has none, in strips of 32 channels."""
    spec = TorchOps().mamba2_states(SIZES, torch.bfloat16)
    assert spec.shapes == ((3, 6 * 8 + 2 * 16), (6, 8, 16))
    assert spec.dtypes == (torch.bfloat16, torch.float32)
    assert spec.grid == 64
    if "native" in MAKERS:
        spec = Mamba2(VARIANTS["groups"], context(MAKERS["native"], torch.bfloat16)).cache_spec
        assert spec.shapes == ((3, 6 * 8 + 2 * 3 * 16), (3, 16, 32))
        assert spec.dtypes == (torch.float32, torch.float32)
        assert spec.grid == 1


def test_more_than_one_rank_is_not_admitted():
    with pytest.raises(AssertionError, match="one rank"):
        Mamba2(SIZES, context(TorchOps(), tp=TPGroup(0, 2)))
