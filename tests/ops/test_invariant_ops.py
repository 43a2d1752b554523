"""The kernels of `batch_invariant`, interpreted on the CPU, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import invariant_cases as cases
from interpreter import dots_in_order

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)


@pytest.fixture(autouse=True)
def in_order(bfloat16, monkeypatch):
    dots_in_order(monkeypatch)


@DTYPES
@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 1)), (5, (33, 130)), (70, (100, 64)), (600, (40, 96))])
def test_linear(device, dtype, rows, shape):
    cases.check_linear(device, dtype, rows, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 3072), (6144, 1000), (50257, 768)])
def test_linear_of_sizes_that_models_have(dtype, shape):
    cases.check_linear("cuda", dtype, 700, shape)


@DTYPES
def test_mixture(device, dtype):
    cases.check_mixture(device, dtype)


@DTYPES
def test_recurrence(device, dtype):
    cases.check_recurrence(device, dtype)


@pytest.mark.parametrize("size", [2, 67, 5001, pytest.param(151936, marks=pytest.mark.gpu)])
def test_log_softmax(device, size):
    cases.check_log_softmax(device, size)
