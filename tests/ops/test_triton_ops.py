"""The GPU's ops against torch's, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("where there is a GPU, kernels are compiled: see test_triton_ops_gpu.py", allow_module_level=True)

import triton_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of the interpreter
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("size", cases.SIZES)
def test_norms(dtype, size):
    cases.check_norms("cpu", dtype, size)


def test_norms_with_fp32_weights():
    cases.check_fp32_weights("cpu", torch.float16)


@DTYPES
@pytest.mark.parametrize(("size", "half"), cases.HEADS)
def test_rotation(dtype, size, half):
    cases.check_rotation("cpu", dtype, size, half)
    cases.check_norm_and_rotation("cpu", dtype, size, half)


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_activations(dtype, act):
    cases.check_activation("cpu", dtype, act)


@DTYPES
def test_rows_of_tables(dtype):
    cases.check_gather("cpu", dtype)


def test_a_residual_is_added():
    cases.check_residual("cpu", torch.float32)
