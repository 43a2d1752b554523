"""The GPU's ops against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of the interpreter
FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)


@DTYPES
@pytest.mark.parametrize("size", [*cases.SIZES, *(pytest.param(size, marks=pytest.mark.gpu) for size in (4096, 16384))])
def test_norms(device, dtype, size):
    cases.check_norms(device, dtype, size)


@DTYPES
def test_norms_with_fp32_weights(device, dtype):
    cases.check_fp32_weights(device, dtype)


@DTYPES
@pytest.mark.parametrize(("size", "half"), cases.HEADS)
def test_rotation(device, dtype, size, half):
    cases.check_rotation(device, dtype, size, half)
    cases.check_norm_and_rotation(device, dtype, size, half)


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_activations(device, dtype, act):
    cases.check_activation(device, dtype, act)


@DTYPES
def test_rows_of_tables(device, dtype):
    cases.check_gather(device, dtype)


@DTYPES
def test_a_residual_is_added(device, dtype):
    cases.check_residual(device, dtype)
