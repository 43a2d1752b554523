"""flash-attn and torch's varlen attention: what they are given, with functions of the same signatures in their place
that say no to what the real ones refuse, and compute in plain torch."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from gpu_cases import CASES, Case
from test_backends import CPU, Step, make_batch

from nanovllm.attention import base, flash, gpu, torch_varlen
from nanovllm.attention.base import select_backend
from nanovllm.attention.flash import FlashAttention
from nanovllm.attention.torch_varlen import TorchVarlenAttention
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.errors import ConfigError

pytest.importorskip("triton")
CUDA = torch.device("cuda")
SPEC = PagedKVSpec(2, 64, torch.bfloat16)
SERVED = {name: CASES[name] for name in ("GQA", "71 heads of one", "window", "one decode", "one prompt")}


def paged(q, k_cache, v_cache, query_start, lengths, tables, scale, window_size) -> torch.Tensor:
    """q [T, H, D] over pages [blocks, block_size, KH, D]; causal, with the last query at a sequence's end."""
    assert query_start.dtype == lengths.dtype == tables.dtype == torch.int32
    assert len(query_start) == len(lengths) + 1 == len(tables) + 1 and window_size[1] == 0
    out = torch.full_like(q, float("nan"))
    for i, (start, end, length) in enumerate(
        zip(query_start[:-1].tolist(), query_start[1:].tolist(), lengths.tolist(), strict=True)
    ):
        keys, values = (
            x[tables[i].long()].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // x.shape[2], 1).float()
            for x in (k_cache, v_cache)
        )
        distance = torch.arange(length - end + start, length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | ((distance > window_size[0]) if window_size[0] >= 0 else False)
        scores = torch.einsum("shd,lhd->hsl", q[start:end].float(), keys) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hsl,lhd->shd", weights, values).to(q.dtype)
    return out


def flash_attn_2() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        block_table=None,
        num_splits=0,
    ):
        lengths = cu_seqlens_k.diff()
        assert causal and k.shape[1] % 256 == 0 and num_splits == 1
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == lengths.max()
        return paged(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, window_size)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal=False, window_size=(-1, -1)
    ):
        assert causal and k_cache.shape[1] % 256 == 0 and q.shape[1] == 1 and len(q) == len(cache_seqlens)
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        return paged(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, window_size)[:, None]

    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
    return module


def flash_attn_3() -> ModuleType:
    module = ModuleType("flash_attn_interface")

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        cache_seqlens=None,
        page_table=None,
        cu_seqlens_q=None,
        max_seqlen_q=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert causal and max_seqlen_q == cu_seqlens_q.diff().max()
        return paged(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, window_size)

    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    return module


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("version", [2, 3])
def test_flash(monkeypatch, version, case):
    fake = flash_attn_2() if version == 2 else flash_attn_3()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(flash, "_has_version_3", lambda device: version == 3)
    block_size = 256 if version == 2 else case.block_size
    Case(case.sequences, case.heads, case.kv_heads, case.head_dim, block_size, case.window).check(
        FlashAttention(), torch.float16
    )


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_torch_varlen(monkeypatch, case):
    real = inspect.signature(torch_varlen._varlen_attn())
    if "block_table" not in real.parameters:
        pytest.skip("this torch reads no pages")

    def varlen_attn(*args, **options):
        given = real.bind(*args, **options).arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        assert k.shape[1] % 256 == 0 and given["num_splits"] == 1
        assert given["enable_gqa"] == (q.shape[1] != k.shape[2])
        lengths = given["cu_seq_k"].diff()
        assert torch.equal(lengths, given["seqused_k"]) and given["max_k"] == lengths.max()
        assert given["max_q"] == given["cu_seq_q"].diff().max()
        return paged(
            q, k, v, given["cu_seq_q"], lengths, given["block_table"], given["scale"], given["window_size"]
        )  # fmt: skip

    monkeypatch.setattr(torch_varlen, "_varlen_attn", lambda: varlen_attn)
    Case(case.sequences, case.heads, case.kv_heads, case.head_dim, 256, case.window).check(
        TorchVarlenAttention(), torch.float16
    )


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H100, as far as selection asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def install(monkeypatch, *packages: str) -> None:
    """Of the flash-attn packages, those and no others."""
    find = gpu.importlib.util.find_spec

    def find_spec(name, package=None):
        if name in ("flash_attn", "flash_attn_interface"):
            return object() if name in packages else None
        return find(name, package)

    monkeypatch.setattr(gpu.importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("packages", "block_size", "chosen"),
    [
        ((), 16, "triton"),
        ((), 256, "triton"),
        (("flash_attn",), 16, "triton"),
        (("flash_attn",), 256, "flash"),
        (("flash_attn_interface",), 16, "flash"),
    ],
)
def test_what_auto_takes_on_a_gpu(monkeypatch, hopper, caplog, packages, block_size, chosen):
    install(monkeypatch, *packages)
    caplog.set_level("INFO", base.logger.name)
    assert select_backend("auto", CUDA, [SPEC], block_size).name == chosen
    if chosen == "triton":
        reason = "flash-attn 2 reads pages of a multiple of 256" if packages else "flash-attn is not installed"
        assert f"attention triton: flash: {reason}" in caplog.text
    else:
        assert not caplog.text


def test_what_no_kernel_serves_goes_to_the_reference(hopper):
    assert select_backend("auto", CUDA, [SPEC], 8).name == "reference"


@pytest.mark.parametrize(
    ("change", "chosen", "reason"),
    [
        ({}, "flash", None),
        ({"alibi": True}, "triton", "flash: has no ALiBi as this model needs it"),
        ({"head_dim": 100}, "triton", "flash: takes head sizes up to 256 in steps of 8, not 100"),
        ({"dtype": torch.float32}, "triton", "flash: has no kernels for torch.float32"),
        ({"dtype": torch.float32, "head_dim": 256}, "triton", "flash: has no kernels for torch.float32"),
        ({"head_dim": 288}, "reference", "triton: takes head sizes up to 256, not 288"),
    ],
    ids=str,
)
def test_auto_takes_what_serves_every_layer(monkeypatch, hopper, caplog, change, chosen, reason):
    """It took flash by the device alone, and a model with ALiBi, odd heads or float32 was refused."""
    install(monkeypatch, "flash_attn")
    caplog.set_level("INFO", base.logger.name)
    assert select_backend("auto", CUDA, [SPEC, replace(SPEC, **change)], 256).name == chosen
    assert len(caplog.messages) == (reason is not None)
    assert reason is None or (reason in caplog.text and "set attention_backend" not in caplog.text)
    if chosen != "flash":
        with pytest.raises(ConfigError, match=r"attention_backend='flash': .*set attention_backend='triton'"):
            select_backend("flash", CUDA, [SPEC, replace(SPEC, **change)], 256)


@pytest.mark.parametrize(
    ("backend", "spec", "block_size", "reason"),
    [
        (FlashAttention, SPEC, 128, "multiple of 256 tokens: set kvcache_block_size=256"),
        (FlashAttention, PagedKVSpec(2, 260, torch.bfloat16), 256, "not 260; set attention_backend='triton'"),
        (FlashAttention, PagedKVSpec(2, 64, torch.float32), 256, "no kernels for torch.float32"),
        (FlashAttention, PagedKVSpec(2, 64, torch.bfloat16, None, True), 256, "ALiBi"),
        (TorchVarlenAttention, SPEC, 16, "256"),
        (TorchVarlenAttention, PagedKVSpec(2, 64, torch.bfloat16, None, True), 256, "ALiBi"),
    ],
    ids=str,
)
def test_reasons(monkeypatch, hopper, backend, spec, block_size, reason):
    install(monkeypatch, "flash_attn")
    monkeypatch.setattr(torch_varlen, "_reads_pages", lambda: True)
    assert reason in backend().unsupported_reason(CUDA, spec.dtype, spec, block_size)
    assert backend().unsupported_reason(CUDA, torch.bfloat16, SPEC, 256) is None


def test_reasons_of_machines(monkeypatch):
    for backend in (FlashAttention(), TorchVarlenAttention()):
        assert backend.unsupported_reason(CPU, torch.bfloat16, SPEC, 256) == "runs on NVIDIA GPUs, not on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "needs compute capability 8.0, and this GPU has 7.5" in gpu.gpu_reason(CUDA)


def test_keys_are_stored_without_triton(monkeypatch):
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
    monkeypatch.setattr(torch_varlen, "_varlen_attn", lambda: lambda q, *args, **options: q)
    step = Step([(3, 1), (0, 9)], block_size=256, dtype=torch.float16)
    q, k, v = step.normal(10, 8, 16).split((4, 2, 2), dim=1)
    kv = step.normal(2, step.num_blocks, 256, 2, 16)
    before, backend = kv.clone(), TorchVarlenAttention()
    backend.forward(q, k, v, kv, make_batch(step.sequences, step.tables, 256, backend), scale=1.0)
    step.check_writes(before, kv, k, v)


def test_torch_2_11_reads_no_pages(monkeypatch, hopper):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    monkeypatch.setattr(torch_varlen, "_varlen_attn", lambda: varlen_attn)
    reason = TorchVarlenAttention().unsupported_reason(CUDA, torch.bfloat16, SPEC, 256)
    assert "has no varlen_attn that reads pages; torch 2.12 has" in reason
