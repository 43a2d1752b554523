"""Blocks against the gguf package, and what the schemes of our own make of a weight against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import normal

from nanovllm.quantization.ggml import KINDS, GGMLBlocks, row_bytes
from nanovllm.quantization.int4 import quantize_int4
from nanovllm.quantization.int8 import quantize_int8

HALVES = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2}  # half-precision numbers that a block begins with


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Any bytes, with sane scales."""
    random = np.random.default_rng(0)
    size = KINDS[kind].bytes
    data = random.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for at in [208] if kind == "Q6_K" else range(0, 2 * HALVES.get(kind, 1), 2):
        data[:, at : at + 2] = random.uniform(-1e-2, 1e-2, (len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_gguf_package(kind):
    ggml = GGMLQuantizationType[kind]
    assert GGML_QUANT_SIZES[ggml] == KINDS[kind][:2]
    data = random_blocks(kind, 6, 3)
    expected = dequantize(data, ggml)
    blocks = GGMLBlocks(kind, torch.from_numpy(data), expected.shape[1])
    assert blocks.shape == expected.shape and row_bytes(kind, expected.shape[1]) == data.shape[1]
    assert np.array_equal(blocks.dequantize().numpy(), expected)
    assert np.array_equal(blocks[2:5].dequantize().numpy(), expected[2:5])
    cols = KINDS[kind].cols
    assert np.array_equal(blocks.columns(slice(cols, 3 * cols)).dequantize().numpy(), expected[:, cols:])
    assert blocks.unpack().form is blocks.form


@pytest.mark.parametrize("size", [0.02, 0.0, 3.0])
def test_int8_is_ggmls_q8_0(size):
    """Which rounds halves away from zero instead of to even, and divides by a scale before it is rounded."""
    weight = normal(20, 96) * size
    ours = quantize_int8(weight)
    theirs = quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
    scales = torch.from_numpy(theirs.reshape(-1, 34)[:, :2].copy()).view(torch.float16)
    assert torch.equal(ours.unpack().scales.flatten(), scales.flatten())
    limit = 0.51 * ours.unpack().scales.float().repeat_interleave(32, dim=1) + 6e-8
    assert ((ours.dequantize() - weight).abs() <= limit).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 5), groups=st.integers(1, 4), power=st.integers(1, 4))
def test_int4_is_nearer_than_ggmls_q4_1_in_every_group(seed, rows, groups, power):
    """Of the least and largest of a group, as ggml takes it; heavy tails gain most from a cut."""
    weight = normal(rows, 32 * groups, seed=seed) ** power * 0.02
    theirs = dequantize(quantize(weight.numpy(), GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
    ours = quantize_int4(weight).dequantize()
    errors = [(found - weight).square().view(rows, groups, 32).sum(-1) for found in (torch.from_numpy(theirs), ours)]
    assert (errors[1] <= errors[0] * 1.0001 + 1e-12).all()


def test_int4_gains_from_the_search():
    weight = normal(64, 1024) * 0.02
    theirs = dequantize(quantize(weight.numpy(), GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
    ours = quantize_int4(weight).dequantize()
    assert (ours - weight).square().sum() < 0.83 * (torch.from_numpy(theirs) - weight).square().sum()


@pytest.mark.parametrize(("quantize", "steps"), [(quantize_int4, 15), (quantize_int8, 250)])
@pytest.mark.parametrize("cols", [1, 31, 33, 70])
def test_groups_that_are_not_whole(quantize, steps, cols):
    weight = normal(9, cols)
    blocks = quantize(weight)
    assert blocks.data.shape == (9, row_bytes(blocks.kind, cols)) and blocks.shape == (9, cols)
    found = blocks.dequantize()
    spread = 2 * weight.abs().amax()
    assert found.shape == weight.shape and (found - weight).abs().max() <= spread / steps


@pytest.mark.parametrize("weight", [torch.zeros(3, 64), torch.full((3, 64), -1.5), normal(1, 64).expand(3, -1) * 1e-6])
def test_int4_of_what_has_no_spread(weight):
    torch.testing.assert_close(quantize_int4(weight).dequantize(), weight, rtol=0, atol=5e-7)


def test_what_int4_can_hold_is_kept():
    """A weight that was Q4_1 before comes out the same."""
    data = quantize((normal(8, 128) * 0.02).numpy(), GGMLQuantizationType.Q4_1)
    weight = torch.from_numpy(dequantize(data, GGMLQuantizationType.Q4_1))
    torch.testing.assert_close(quantize_int4(weight).dequantize(), weight, rtol=0, atol=2e-5)
