"""The GPU's ops against torch's, on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import sampling_cases as sampling
import triton_cases as cases

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("size", [*cases.SIZES, 4096, 16384])
def test_norms(dtype, size):
    cases.check_norms("cuda", dtype, size)


def test_norms_with_fp32_weights():
    cases.check_fp32_weights("cuda", torch.bfloat16)


@DTYPES
@pytest.mark.parametrize(("size", "half"), cases.HEADS)
def test_rotation(dtype, size, half):
    cases.check_rotation("cuda", dtype, size, half)
    cases.check_norm_and_rotation("cuda", dtype, size, half)


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_activations(dtype, act):
    cases.check_activation("cuda", dtype, act)


@DTYPES
def test_rows_of_tables(dtype):
    cases.check_gather("cuda", dtype)


@DTYPES
def test_a_residual_is_added(dtype):
    cases.check_residual("cuda", dtype)


@pytest.mark.parametrize("cut", sampling.CUTS, ids=str)
@pytest.mark.parametrize("size", [1, 67, 5000, 50257, 151936])
def test_the_same_tokens_as_torch(size, cut):
    sampling.check_tokens("cuda", size, cut)


@pytest.mark.parametrize("size", [1, 300, 50257])
def test_rows_with_parameters_of_their_own(size):
    sampling.check_mixed_rows("cuda", size)


@pytest.mark.parametrize("cut", sampling.CUTS, ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_is_its_own(cut, broken):
    sampling.check_rows_are_their_own("cuda", 50257, cut, broken)


@pytest.mark.parametrize("size", [10_000, 151936])
def test_flat_rows(size):
    sampling.check_flat_rows("cuda", size)


@pytest.mark.parametrize("params", sampling.PENALTIES, ids=str)
def test_penalties(params):
    sampling.check_penalties("cuda", params)


def test_logprobs():
    sampling.check_logprobs("cuda")
