"""The GPU's sampling against torch's, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("where there is a GPU, kernels are compiled: see test_triton_ops_gpu.py", allow_module_level=True)

import sampling_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's


@pytest.mark.parametrize("cut", cases.CUTS, ids=str)
@pytest.mark.parametrize("size", [1, 67, 5000])
def test_the_same_tokens_as_torch(size, cut):
    cases.check_tokens("cpu", size, cut)
