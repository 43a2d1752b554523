"""Products of rows that are rounded to 8 bits with quantised weights: what the codes stand for, in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import native_library, normal
from quantized import FORMS, dequantized, packed, random_codes
from test_native_quantized import assert_rows_keep_their_bits

from nanovllm.ops.formats import E4M3_128, Packed, Segment
from nanovllm.ops.native import NativeOps

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(not LIBRARY.eight_bit, reason="this processor has no products of 8 bits")
OPS = NativeOps(LIBRARY, quantize_activations=LIBRARY.eight_bit)
EACH_FORM = pytest.mark.parametrize(
    "form", [form for form in FORMS.values() if not form.e4m3], ids=[name for name in FORMS if "e4m3" not in name]
)


def rounded(x: torch.Tensor) -> np.ndarray:
    """float32 [rows, cols] in 8 bits with a scale for each 32 columns, as float64."""
    found = np.zeros(x.shape)
    for first in range(0, x.shape[1], 32):
        block = x[:, first : first + 32].float().numpy()
        largest = np.abs(block).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            factor = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
        codes = np.round(block * factor)
        assert np.abs(codes).max() <= 127
        found[:, first : first + 32] = codes * (largest / np.float32(127)).astype(np.float64)
    return found


def assert_is_product(out: torch.Tensor, x: torch.Tensor, weight: np.ndarray, bias: torch.Tensor | float = 0.0) -> None:
    """Sums of integers are exact, those of their products with scales in fp32."""
    inputs = rounded(x)
    sizes = np.abs(inputs) @ np.abs(weight).T
    wanted = inputs @ weight.T + np.asarray(bias, dtype=np.float64)
    assert out.dtype == torch.float32 and out.shape == wanted.shape
    assert (
        np.abs(out.numpy() - wanted) <= 2.0**-23 * (4 + x.shape[1] / 8) * (sizes + np.abs(np.asarray(bias))) + 1e-30
    ).all()


# odd numbers of columns, groups and panels that are not whole, one block of x and several
@EACH_FORM
@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (33, 31), (48, 64), (65, 97), (40, 128), (130, 577)])
@pytest.mark.parametrize("rows", [1, 19])
def test_linear_is_that_of_rounded_rows(form, shape, rows):
    n, k = shape
    codes, bias = random_codes(form, n, k), normal(n, seed=2)
    x = normal(rows, k) * torch.logspace(-3, 3, rows)[:, None]
    assert_is_product(OPS.linear(x, packed(OPS, codes), n, bias), x, dequantized(codes), bias)


def test_rows_of_zeros_and_tiny_numbers_and_such_as_are_not_finite():
    codes = random_codes(FORMS["q4"], 40, 200)
    x = normal(6, 200)
    x[1] = 0
    x[2] *= 1e-38
    x[3, 5], x[4, 7] = torch.inf, torch.nan
    out = OPS.linear(x, packed(OPS, codes), 40, None)
    assert not out[1].any() and out[2].abs().max() < 1e-30
    assert not out[3:5].isfinite().any()
    assert_is_product(out[[0, 5]], x[[0, 5]], dequantized(codes))


@EACH_FORM
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 100), k=st.integers(1, 300), rows=st.integers(1, 90), data=st.data())
def test_a_row_has_the_same_bits_in_any_batch(form, n, k, rows, data):
    assert_rows_keep_their_bits(OPS, form, n, k, rows, data)


@EACH_FORM
def test_gated_linear_residuals_columns_in_another_order_and_bfloat16_rows(form):
    n, k = 50, 130
    codes, residual, x = random_codes(form, 2 * n, k), normal(9, 2 * n, seed=3), normal(9, k).bfloat16()
    weight, halves = packed(OPS, codes), packed(OPS, codes, gated=True)
    plain = OPS.linear(x, weight, 2 * n, None)
    assert_is_product(plain, x, dequantized(codes))
    assert torch.equal(OPS.linear(x.float(), weight, 2 * n, None), plain)
    assert torch.equal(OPS.linear(x, weight, 2 * n, None, residual=residual), plain + residual)
    gate, up = plain.chunk(2, dim=1)
    expected = torch.relu(gate) * up
    assert torch.equal(OPS.gated_linear(x, halves, 2 * n, None, "relu"), expected.bfloat16())
    order = torch.randperm(k, generator=torch.Generator().manual_seed(4)).int()
    picked = Packed(weight.data, weight.segments, order)
    assert torch.equal(OPS.linear(x, picked, 2 * n, None), OPS.linear(x[:, order.long()], weight, 2 * n, None))


def test_weights_that_are_no_integers_meet_rows_as_they_are():
    plain, codes, x = NativeOps(LIBRARY), random_codes(E4M3_128, 40, 200), normal(7, 200)
    weight, floats = packed(plain, codes), OPS.pack(normal(33, 200).bfloat16(), gated=False)
    assert torch.equal(OPS.linear(x, weight, 40, None), plain.linear(x, weight, 40, None))
    assert torch.equal(OPS.linear(x, floats, 33, None), plain.linear(x, floats, 33, None))


def test_a_mixture_is_that_of_linear_layers():
    experts, hidden, inner, tokens = 3, 70, 40, 8
    gate_up = [packed(OPS, random_codes(FORMS["q4"], 2 * inner, hidden, seed=e), gated=True) for e in range(experts)]
    down = [packed(OPS, random_codes(FORMS["q8"], hidden, inner, seed=e)) for e in range(experts)]
    x, chosen = normal(tokens, hidden), torch.tensor([[t % experts] for t in range(tokens)], dtype=torch.int32)

    def stacked(weights: list[Packed]) -> Packed:
        return Packed(torch.stack([weight.data for weight in weights]), weights[0].segments)

    out = OPS.mixture(x, torch.ones(tokens, 1), chosen, stacked(gate_up), stacked(down), inner, "silu")
    for t in range(tokens):
        fed = OPS.gated_linear(x[t, None], gate_up[t % experts], 2 * inner, None, "silu")
        assert torch.equal(out[t, None], OPS.linear(fed, down[t % experts], hidden, None))


def test_rows_of_a_weight_may_have_different_forms():
    first, second = random_codes(FORMS["q4_nested"], 32, 256), random_codes(FORMS["q6_fine"], 40, 256, seed=1)
    parts, x = [packed(OPS, first), packed(OPS, second)], normal(5, 256)
    size = len(parts[0].data)
    segments = Segment(slice(0, 32), first.form, 0), Segment(slice(32, 72), second.form, size)
    both = Packed(torch.cat([part.data for part in parts]), segments)
    expected = [OPS.linear(x, part, rows, None) for part, rows in zip(parts, (32, 40), strict=True)]
    assert torch.equal(OPS.linear(x, both, 72, None), torch.cat(expected, dim=1))
