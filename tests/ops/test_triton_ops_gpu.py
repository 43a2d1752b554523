"""The GPU's ops against torch's, on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

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
