"""Mamba2's Triton kernels against torch's ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton_mamba2_cases as cases
from mamba2_cases import SIZES, make_batch

from nanovllm.ops.triton_ops import TritonOps
from nanovllm.triton_kernels.mamba2_plan import CELL, STRETCH, plan_mamba2

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)


def those(mark: pytest.MarkDecorator, *dtypes: torch.dtype) -> list:
    """Every variant in these dtypes."""
    return [pytest.param(variant, dtype, marks=mark) for variant in cases.MORE for dtype in dtypes]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *(("groups", torch.float32), ("odd", torch.float32), ("wide", torch.float16)),
        *(pytest.param(v, torch.float32, marks=pytest.mark.slow) for v in ("plain", "limited", "no-history", "wide")),
        *(pytest.param(v, torch.float16, marks=pytest.mark.slow) for v in cases.VARIANTS),
        *those(pytest.mark.slow, torch.bfloat16),
        *those(pytest.mark.gpu, torch.float16, torch.float32),
    ],
)
def test_mixed_steps_are_those_of_torch(device, variant, dtype):
    cases.check_mixed_steps(device, dtype, variant)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("plain", torch.float16),
        *those(pytest.mark.slow, torch.float32),
        *those(pytest.mark.gpu, torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_a_cut_between_cells_changes_no_bit(device, variant, dtype):
    cases.check_cuts_change_no_bit(device, dtype, variant)


@DTYPES
def test_padded_rows_harm_nobody(device, dtype):
    cases.check_padding(device, dtype)


@DTYPES
def test_an_infinite_sequence_spoils_only_itself(device, dtype):
    cases.check_infinite_sequence(device, dtype)


@DTYPES
def test_a_norm_over_several_ranks(device, dtype):
    cases.check_several_ranks(device, dtype)


@pytest.mark.parametrize(("dt_bias", "A_log"), [(40.0, 5.0), (-30.0, -8.0), (60.0, -8.0), (-3.0, 5.0)])
def test_extreme_decays(device, dt_bias, A_log):
    cases.check_extreme_decays(device, dt_bias, A_log)


@pytest.mark.gpu
def test_a_decoding_step_can_be_captured_and_replayed():
    cases.check_capture()


def test_the_state_is_torchs_with_a_grid_of_cells():
    spec = TritonOps().mamba2_states(SIZES, torch.bfloat16)
    assert spec.shapes == ((3, 6 * 8 + 2 * 16), (6, 8, 16))
    assert spec.dtypes == (torch.bfloat16, torch.float32)
    assert spec.grid == CELL


def test_a_decoding_step_has_no_tables():
    assert plan_mamba2(make_batch([(1, 4, 1), (2, 0, 1)])).prompts is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from([1, 1, 2, 31, 33, 128, 300])), min_size=1, max_size=8))
def test_every_token_is_in_one_stretch_and_in_its_cell_or_alone(parts):
    """Of a prompt and of decodes, wherever chunks begin; tables are long enough and marked behind their ends."""
    parts = [*parts, (0, 2)]
    batch = make_batch([(1, first, count) for first, count in parts])
    prompts = plan_mamba2(batch).prompts
    begins = batch.query_start.tolist()
    convolved: list[int] = []
    for sequence, start in prompts.stretches.tolist():
        if sequence >= 0:
            count = parts[sequence][1]
            convolved += range(begins[sequence] + start, begins[sequence] + min(start + STRETCH, count))
    assert sorted(convolved) == list(range(begins[-1]))
    scanned: list[int] = []
    starts = prompts.cell_starts.tolist()
    for sequence, (first, count) in enumerate(parts):
        for row, begin, end in prompts.cells[starts[sequence] : starts[sequence + 1]].tolist():
            lanes = range(begin, end)
            assert lanes and first + row - begins[sequence] == (first + row + begin - begins[sequence]) // CELL * CELL
            scanned += (row + lane for lane in lanes)
        if count == 1 or (first + count) % CELL == 1:
            scanned.append(begins[sequence + 1] - 1)
    assert scanned == list(range(begins[-1]))
    assert (prompts.cells[starts[-1] :, 1:] == 0).all()
