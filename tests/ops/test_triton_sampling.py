"""The GPU's sampling against torch's, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("where there is a GPU, kernels are compiled: see test_triton_ops_gpu.py", allow_module_level=True)

import sampling_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's


@pytest.mark.parametrize("size", [1, 300, 2100, pytest.param(50257, marks=pytest.mark.slow)])
def test_rows_with_parameters_of_their_own(size):
    cases.check_mixed_rows("cpu", size)


@pytest.mark.slow
@pytest.mark.parametrize("cut", cases.CUTS, ids=str)
@pytest.mark.parametrize("size", [67, 5000])
def test_the_same_tokens_as_torch(size, cut):
    cases.check_tokens("cpu", size, cut)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_is_its_own(broken):
    cases.check_rows_are_their_own("cpu", 300, {"top_k": 30, "top_p": 0.9, "typical_p": 0.8}, broken)


@pytest.mark.slow
def test_flat_rows():
    cases.check_flat_rows("cpu", 10_000)


@pytest.mark.parametrize("params", cases.PENALTIES, ids=str)
def test_penalties(params):
    cases.check_penalties("cpu", params)


def test_logprobs():
    cases.check_logprobs("cpu")
