"""Whose kernels are taken."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

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
