"""Where Triton's kernels are tried: interpreted on the CPU, and compiled where there is a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled")


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=HERE), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
