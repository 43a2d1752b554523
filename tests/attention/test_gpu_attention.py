"""The steps of gpu_cases.py on a real GPU, with every backend that runs there."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import CASES, CODED, DEVICE

from nanovllm.attention.base import load_backend
from nanovllm.cache_spec import PagedKVSpec

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["triton", "flash", "torch_varlen", "reference"])
def test_steps(name, dtype, case):
    backend = load_backend(name)
    spec = PagedKVSpec(case.kv_heads, case.head_dim, dtype, case.window, case.bias != "none")
    reason = backend.unsupported_reason(DEVICE, dtype, spec, case.block_size)
    if reason is not None:
        pytest.skip(reason)
    case.check(backend, dtype)


@pytest.mark.parametrize("name", [*CODED, "head of 128", "head of 256", "long chunk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes(dtype, name):
    CASES[name].check_codes(load_backend("triton"), dtype)
