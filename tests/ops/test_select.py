"""Whose kernels are taken."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging

import pytest
import torch

from nanovllm.attention.base import select_backend
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.ops.base import select_ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def interpreter(monkeypatch):
    return lambda on: monkeypatch.setenv("TRITON_INTERPRET", "1" if on else "0")


@needs_triton
def test_triton_is_for_cuda_devices_and_its_interpreter(interpreter):
    interpreter(False)
    with pytest.raises(ConfigError, match="kernels='triton': runs on CUDA devices, not on cpu"):
        select_ops("triton", CPU, torch.float32)
    assert select_ops("auto", CUDA, torch.float16).name == "triton"
    assert select_ops("auto", CPU, torch.float16).name == "torch"
    interpreter(True)
    assert select_ops("triton", CPU, torch.float32).name == "triton"
    assert select_ops("auto", CPU, torch.float16).name == "torch"


def test_where_triton_is_not_installed_torch_s_kernels_run(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert select_ops("auto", CUDA, torch.float16).name == "torch"
    assert "Triton is not installed: pip install triton; torch's kernels run instead" in caplog.text
    with pytest.raises(ConfigError, match="kernels='triton': is not installed: pip install triton"):
        select_ops("triton", CUDA, torch.float16)


def test_kernels_are_one_of_a_few():
    with pytest.raises(ConfigError, match="kernels='cuda' is not one of auto, native, triton, torch"):
        EngineConfig(model="m", kernels="cuda")


@needs_triton
def test_rows_of_their_own_are_asked_of_the_kernels_that_give_them(interpreter):
    interpreter(False)
    assert type(select_ops("auto", CUDA, torch.bfloat16, batch_invariant=True)).__name__ == "InvariantTritonOps"
    for device, name, own in ((CUDA, "torch", "triton"), (CUDA, "native", "triton"), (CPU, "torch", "native")):
        with pytest.raises(ConfigError, match=f"kernels='{name}' sums .*; set kernels='{own}'"):
            select_ops(name, device, torch.bfloat16, batch_invariant=True)
    with pytest.raises(ConfigError, match="kernels='triton': runs on CUDA devices, not on cpu"):
        select_ops("triton", CPU, torch.float32, batch_invariant=True)
    for name in ("auto", "triton"):
        assert type(select_backend(name, CUDA, [], 16, batch_invariant=True)).__name__ == "InvariantTritonAttention"
    assert type(select_backend("triton", CPU, [], 16, batch_invariant=True)).__name__ == "InvariantTritonAttention"
    assert select_backend("auto", CPU, [], 16, batch_invariant=True).name == "native"


@pytest.mark.parametrize(("device", "name", "own"), [("cuda", "flash", "triton"), ("cpu", "cpu", "native")])
def test_attention_of_their_own_is_asked_of_the_backends_that_give_it(device, name, own):
    config = EngineConfig(model="m", device=device, batch_invariant=True, attention_backend=name)
    with pytest.raises(ConfigError, match=f"attention_backend='{name}' computes .*; set attention_backend='{own}'"):
        config.resolve(checkpoint_dtype="bfloat16", max_positions=64, cuda=True)


def test_activations_of_8_bits_take_tritons_kernels_on_gpus():
    pytest.importorskip("triton")
    for name, device in (("auto", CUDA), ("triton", CPU)):
        found = select_ops(name, device, torch.bfloat16, quantize_activations=True)
        assert type(found).__name__ == "EightBitTritonOps"
    with pytest.raises(ConfigError, match="kernels='torch' multiplies in 16 bits; set kernels='triton'"):
        select_ops("torch", CUDA, torch.bfloat16, quantize_activations=True)


def test_between_gpus_the_order_of_sums_is_not_ours():
    config = EngineConfig(model="m", device="cuda", batch_invariant=True, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"batch_invariant=True: the order in which NCCL .* tensor_parallel_size=1"):
        config.resolve(checkpoint_dtype="bfloat16", max_positions=64, cuda=True)
    cpu = dataclasses.replace(config, device="cpu").resolve(checkpoint_dtype="bfloat16", max_positions=64, cuda=False)
    assert cpu.batch_invariant
