"""Published quantised checkpoints compute, bit for bit, as plain ones that hold the weights they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kernels import native_library
from published import SCHEMES, publish
from tiny_models import make_tiny_model

from nanovllm import LLM
from nanovllm.cli.parity import all_logits

native_library()
TOKENS = np.random.default_rng(1).integers(2, 128, 40).tolist()
OPTIONS = {"skip_tokenizer_init": True, "kvcache_memory": "8MiB", "device": "cpu", "enforce_eager": True}
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
TORCH = {"kernels": "torch", "attention_backend": "cpu"}


def logits(path: Path, **options) -> torch.Tensor:
    with LLM(str(path), **{**OPTIONS, **options}) as llm:
        return all_logits(llm, TOKENS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bits_are_those_of_the_weights_that_it_stands_for(llama, tmp_path, scheme):
    quantised, plain = publish(llama, tmp_path, SCHEMES[scheme])
    expected = logits(plain)
    assert torch.equal(logits(quantised), expected)
    assert torch.equal(logits(quantised, quantization="dequantize"), expected)
    assert torch.equal(logits(quantised, **TORCH), logits(plain, **TORCH))
