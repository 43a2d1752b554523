"""Where Triton's kernels are tried: interpreted on the CPU, and compiled where there is a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import sys

import pytest
import torch
from interpreter import multiply_bfloat16

HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled")


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=HERE), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in sys.modules:
        multiply_bfloat16(monkeypatch)
