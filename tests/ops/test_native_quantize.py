"""The search for scales: native kernels find the bits of torch, at every level and with any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import at_level, native_library, normal

from nanovllm.ops.formats import Q4, Q8_FINE, Codes
from nanovllm.ops.library import LEVELS
from nanovllm.ops.native import NativeOps
from nanovllm.ops.torch_ops import TorchOps

OPS, TORCH = NativeOps(native_library()), TorchOps()
EACH_FORM = pytest.mark.parametrize("form", [Q4, Q8_FINE], ids=["int4", "int8"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same(found: Codes, expected: Codes) -> None:
    for name in ("codes", "scales", "least", "outer"):
        mine, wanted = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
            bits = (x.contiguous().view(torch.uint8) for x in (mine, wanted))
            assert torch.equal(*bits), name


@EACH_FORM
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    size=st.sampled_from([1.0, 0.02, 1e-5, 1e-8, 1e-30, 1e-42, 6e4, 1e9, 1e37]),
    power=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 99),
)
def test_bits_are_those_of_torch(form, rows, cols, size, power, dtype, level, seed):
    """Odd shapes, subnormal numbers, and such as half-precision scales do not reach."""
    weight = ((normal(rows, cols, seed=seed) / 8) ** power * size).to(dtype).nan_to_num()
    with at_level(level) as supported:
        assert_same(OPS.quantize(weight, form), TORCH.quantize(weight, form))
    assert supported or level != "generic"


@EACH_FORM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_without_spread_and_at_the_ends(level, form, dtype):
    limit = torch.finfo(dtype)
    zeros = torch.tensor([0.0, -0.0]).repeat(48)
    rows = [zeros, -zeros, zeros + 1.5, zeros - 1e-4, zeros * 0 + limit.tiny, zeros + limit.smallest_normal / 2]
    rows += [torch.full((96,), limit.max), torch.tensor([limit.max, limit.min] * 48), torch.arange(96) - 48.0]
    rows += [torch.tensor([1.0, *[0.0] * 31, *[limit.max] * 31, limit.min, *[65504.0] * 32])]
    weight = torch.stack(rows).to(dtype)
    assert_same(OPS.quantize(weight, form), TORCH.quantize(weight, form))


@EACH_FORM
def test_rows_may_have_gaps_and_columns_may_be_rows(level, form):
    wide = normal(70, 131).bfloat16()
    for weight in (wide[:, 3:100], wide.t(), wide[5:6]):
        assert_same(OPS.quantize(weight, form), TORCH.quantize(weight, form))


@EACH_FORM
def test_threads_find_what_one_finds(threads, form):
    weight = normal(333, 257).bfloat16()
    threads(1)
    alone = OPS.quantize(weight, form)
    for count in (2, 3):
        threads(count)
        assert_same(OPS.quantize(weight, form), alone)


@EACH_FORM
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_hidden(level, form, broken):
    """A group of int4, a row of int8, and no other weight."""
    weight = normal(20, 96).bfloat16()
    whole = TORCH.quantize(weight, form).dequantize()
    weight[7, 40] = broken
    lost = torch.zeros(20, 96, dtype=torch.bool)
    lost[7, slice(32, 64) if form is Q4 else slice(None)] = True
    for ops in (OPS, TORCH):
        found = ops.quantize(weight, form).dequantize()
        assert torch.equal(found.isnan(), lost) and torch.equal(found[~lost], whole[~lost])
