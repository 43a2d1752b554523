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

from nanovllm.ops.formats import Q4, Q8_FINE
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.quantization.ggml import KINDS, GGMLBlocks, row_bytes
from nanovllm.quantization.searched import Searched

HALVES = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2}  # half-precision numbers that a block begins with


def quantize_int4(weight: torch.Tensor | GGMLBlocks) -> Searched:
    return Searched.whole(TorchOps(), Q4, weight)


def quantize_int8(weight: torch.Tensor | GGMLBlocks) -> Searched:
    return Searched.whole(TorchOps(), Q8_FINE, weight)


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


@pytest.mark.parametrize("size", [0.02, 0.0, 3.0, 1e-5])
def test_int8_is_nearer_than_ggmls_q8_0(size):
    """Which has a scale for 32 columns, in half precision; both rounded to bfloat16, as kernels have them."""
    weight = normal(20, 96) * size
    theirs = dequantize(quantize(weight.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    ours = quantize_int8(weight)
    errors = [(x.bfloat16() - weight).square().sum() for x in (ours.dequantize(), torch.from_numpy(theirs))]
    assert errors[0] <= (0.8 if size > 1e-3 else 1.01) * errors[1]
    assert torch.equal(ours.columns(slice(32, 80)).dequantize(), ours.dequantize()[:, 32:80])
    assert torch.equal(ours[3:9].dequantize(), ours.dequantize()[3:9])


def test_int8_of_rows_whose_groups_are_of_very_different_size():
    weight = normal(4, 64) * torch.tensor([1.0, 1e-2, 1e-4, 1e-7]).repeat_interleave(16)
    limit = weight.abs().amax(dim=1, keepdim=True) / 127**2  # the finest scale that a row can have
    found = quantize_int8(weight).dequantize()
    assert (
        (found - weight).abs() <= (weight.abs().view(4, 4, 16).amax(-1) / 127 + limit).repeat_interleave(16, 1)
    ).all()


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
    assert blocks.shape == (9, cols)
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


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_pieces_and_columns_are_those_of_whole_rows(quantize, monkeypatch):
    """Of floats, and of another file's blocks, which are widened piece by piece."""
    blocks = GGMLBlocks("Q6_K", torch.from_numpy(random_blocks("Q6_K", 80, 2)), 512)
    weight = blocks.dequantize()
    whole = quantize(weight).dequantize()
    monkeypatch.setattr("nanovllm.quantization.searched._PIECE", 32 * 512)
    for source in (weight, blocks):
        found = quantize(source)
        assert [start for start, _ in found.pieces()] == [0, 32, 64]
        assert torch.equal(found.dequantize(), whole)
        assert torch.equal(found.columns(slice(64, 320)).columns(slice(64, 128)).dequantize(), whole[:, 128:192])
        assert torch.equal(found[torch.tensor([70, 3])].dequantize(), whole[[70, 3]])
