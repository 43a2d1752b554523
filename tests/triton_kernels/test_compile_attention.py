"""As test_compile.py, the two modules that take as long as all others: in a file, and so a process, of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton_kernels.compiled import check

from nanovllm.triton_kernels.variant import AMPERE_ON

MODULES = ("prompt_attention", "decode_attention")


@pytest.mark.parametrize("chip", AMPERE_ON)
@pytest.mark.parametrize("module", MODULES)
def test_every_variant_compiles(worker, module, chip):
    check(worker(module, chip))


@pytest.mark.slow
@pytest.mark.parametrize("chip", AMPERE_ON)
@pytest.mark.parametrize("module", MODULES)
def test_cases_at_random_compile(worker, module, chip):
    """The list that is compiled by default has what spilled before; this finds what is not in it."""
    check(worker(module, chip, at_random=100))


@pytest.mark.parametrize("chip", AMPERE_ON)
@pytest.mark.parametrize("module", MODULES)
def test_keys_are_fetched_ahead(worker, module, chip):
    """When a tile's keys waited for its page numbers in the same turn of the loop, none were."""
    usual = worker(module, chip)[:2]
    assert usual and all(row["ahead"] >= 2 for row in usual)
