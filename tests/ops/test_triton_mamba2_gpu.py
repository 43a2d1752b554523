"""Mamba2's Triton kernels against torch's ops, on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton_mamba2_cases as cases

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("variant", cases.MORE)
def test_mixed_steps_are_those_of_torch(variant, dtype):
    cases.check_mixed_steps("cuda", dtype, variant)


@DTYPES
@pytest.mark.parametrize("variant", cases.MORE)
def test_a_cut_between_cells_changes_no_bit(variant, dtype):
    cases.check_cuts_change_no_bit("cuda", dtype, variant)


@DTYPES
def test_padded_rows_harm_nobody(dtype):
    cases.check_padding("cuda", dtype)


@DTYPES
def test_an_infinite_sequence_spoils_only_itself(dtype):
    cases.check_infinite_sequence("cuda", dtype)


@DTYPES
def test_a_norm_over_several_ranks(dtype):
    cases.check_several_ranks("cuda", dtype)


@pytest.mark.parametrize(("dt_bias", "A_log"), [(40.0, 5.0), (-30.0, -8.0), (60.0, -8.0), (-3.0, 5.0)])
def test_extreme_decays(dt_bias, A_log):
    cases.check_extreme_decays("cuda", dt_bias, A_log)


def test_a_decoding_step_can_be_captured_and_replayed():
    cases.check_capture()
