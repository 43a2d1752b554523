"""Quantised keys and values: the codes, where they lie, and the reference that reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_backends import CPU, MIXED, Step, make_batch

from nanovllm.attention.alibi import Alibi, alibi_slopes
from nanovllm.attention.base import select_backend
from nanovllm.attention.codes import LARGEST, encode, split_pages
from nanovllm.attention.gpu import flash_reason
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.errors import ConfigError

CODES = list(LARGEST)
ROUNDING = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}  # of the largest magnitude, or of each


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encode(codes, dtype):
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.tensor([1e-20, 1.0, 1e20])[
        :, None
    ].to(dtype)
    found, scales = encode(x, codes)
    assert (found.dtype, found.shape, scales.dtype, scales.shape) == (codes, x.shape, torch.float32, x.shape[:-1])
    assert (found.float().abs().amax(-1) == LARGEST[codes]).all()
    largest = x.float().abs().amax(-1, keepdim=True)
    assert ((found.float() * scales[..., None] - x.float()).abs() <= 1.001 * ROUNDING[codes] * largest).all()


def test_codes_are_those_of_a_true_division():
    """As in the kernels: the product with a reciprocal falls to the other side of a tie now and then."""
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    factor = np.float32(LARGEST[torch.int8]) / np.abs(x.numpy()).max(-1, keepdims=True)
    assert np.array_equal(encode(x, torch.int8)[0].numpy(), np.rint(x.numpy() * factor))


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_zeros_stay_zeros_and_so_does_what_is_next_to_nothing(codes):
    x = torch.tensor([[0.0, -0.0], [1e-40, -1e-39]])
    found, scales = encode(x, codes)
    assert (found.float() * scales[:, None]).abs().max() < 1e-38 and scales.isfinite().all()


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_codes_and_scales_share_a_page_and_nothing_else(codes):
    spec = PagedKVSpec(3, 10, torch.bfloat16, codes=codes)
    kv = torch.zeros(ReferenceAttention().kv_shape(spec, 5, 16), dtype=spec.stored)
    assert kv.nbytes == 5 * spec.block_bytes(16) == 5 * 2 * 16 * 3 * (10 + 4)
    pages, scales = split_pages(kv)
    assert (pages.shape, scales.shape) == ((2, 5, 16, 3, 10), (2, 5, 16, 3))
    pages.view(torch.uint8).fill_(1)
    assert not scales.any()
    scales.view(torch.uint8).fill_(1)
    assert (kv.view(torch.uint8) == 1).all()
    pages[:, 2] = scales[:, 2] = 0
    changed = (kv.view(torch.uint8) == 0).flatten(2).all(-1)
    assert changed.tolist() == [[page == 2 for page in range(5)]] * 2


def cache_of(step: Step, codes: torch.dtype) -> torch.Tensor:
    """Full of garbage."""
    shape = step.num_blocks, step.block_size, step.kv_heads, step.head_dim
    spec = PagedKVSpec(step.kv_heads, step.head_dim, step.dtype, codes=codes)
    kv = torch.zeros(ReferenceAttention().kv_shape(spec, *shape[:2]), dtype=spec.stored, device=step.device)
    for part, garbage in zip(split_pages(kv), encode(step.normal(2, *shape), codes), strict=True):
        part.copy_(garbage)
    return kv


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"alibi": Alibi(alibi_slopes(4))}], ids=str)
def test_the_reference_attends_over_what_the_codes_stand_for(codes, options):
    step, backend = Step(MIXED), ReferenceAttention()
    q, k, v = (step.normal(sum(new for _, new in MIXED), heads, step.head_dim) for heads in (4, 2, 2))
    kv = cache_of(step, codes)

    def stands_for() -> torch.Tensor:
        return pages.float() * scales[..., None]

    pages, scales = split_pages(kv)
    plain = stands_for()
    batch = make_batch(MIXED, step.tables, 8, backend)
    found = backend.forward(q, k, v, kv, batch, scale=0.25, **options)
    k, v = (c.float() * s[..., None] for c, s in (encode(x, codes) for x in (k, v)))
    assert torch.equal(found, backend.forward(q, k, v, plain, batch, scale=0.25, **options))
    assert torch.equal(stands_for(), plain)  # other slots are as they were


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_backends_without_kernels_say_so(codes):
    spec = PagedKVSpec(2, 64, torch.bfloat16, codes=codes)
    assert "set kv_cache_dtype='auto'" in flash_reason(torch.bfloat16, spec)  # also torch_varlen's
    with pytest.raises(ConfigError, match=r"attention_backend='cpu': .* set kv_cache_dtype='auto'"):
        select_backend("cpu", CPU, [spec], 16)


def test_no_backend_for_all_is_a_config_error():
    with pytest.raises(ConfigError, match=r"native: .* as fp8; .*cpu: .* as fp8"):
        select_backend("auto", CPU, [PagedKVSpec(2, 64, torch.bfloat16, codes=torch.float8_e4m3fn)], 16)
