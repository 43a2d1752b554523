"""As test_compile.py, the two modules that take longer than all others: in a file, and so a process, of their own, and
by default in bfloat16."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton_kernels.compiled import check

from nanovllm.triton_kernels.variant import AMPERE_ON

MODULES = ("prompt_attention", "decode_attention")


DTYPES = ("bf16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp16", "fp32")))


@pytest.mark.parametrize("chip", AMPERE_ON)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", MODULES)
def test_every_variant_compiles(worker, module, dtype, chip):
    check(worker(module, chip, dtype))


@pytest.mark.parametrize("chip", AMPERE_ON)
@pytest.mark.parametrize("module", MODULES)
def test_keys_are_fetched_ahead(worker, module, chip):
    """When a tile's keys waited for its page numbers in the same turn of the loop, none were."""
    usual = worker(module, chip, "bf16")[:2]
    assert usual and all(row["ahead"] >= 2 for row in usual)
