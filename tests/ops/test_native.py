"""The native kernels: bits that do not depend on company, on every level that this processor has, and
values against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import at_level, native_library, normal

from nanovllm.errors import ConfigError
from nanovllm.layers.activation import activation
from nanovllm.ops.base import select_ops
from nanovllm.ops.library import LEVELS, load_library
from nanovllm.ops.native import NativeOps

OPS = NativeOps(native_library())
DTYPES = [torch.float32, torch.bfloat16]
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}  # half a unit in the last place
GATES = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]


def products(x, weight, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: the result, and the sum of the terms' sizes, which bounds any order's rounding."""
    out, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    return (out, sizes) if bias is None else (out + bias.double(), sizes + bias.double().abs())


def assert_linear_is_right(out, x, weight, bias=None):
    """x as the kernel rounds it: the sum in fp32 is all that may differ."""
    wanted, sizes = products(x.to(weight.dtype), weight, bias)
    allowed = (x.shape[1] + 2) * 2.0**-23 * sizes + 1e-30
    assert out.shape == wanted.shape and out.dtype == torch.float32
    assert ((out.double() - wanted).abs() <= allowed).all()


SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 130), st.integers(1, 300))


# an odd k, panels that are not full, blocks that are not whole, prime numbers
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 1), (7, 33, 3), (15, 31, 64), (29, 97, 65), (300, 17, 131)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(level, dtype, shape):
    rows, n, k = shape
    x, weight, bias = normal(rows, k), normal(n, k, seed=1).to(dtype), normal(n, seed=2)
    packed = OPS.pack(weight, gated=False)
    assert_linear_is_right(OPS.linear(x, packed, n, None), x, weight)
    assert_linear_is_right(OPS.linear(x, packed, n, bias), x, weight, bias)


@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 31, 64), (29, 97, 65), (300, 576, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added_last(level, dtype, shape):
    rows, n, k = shape
    x, weight, bias = normal(rows, k), normal(n, k, seed=1).to(dtype), normal(n, seed=2)
    residual = normal(rows, n + 3, seed=3)[:, 1 : n + 1]
    packed = OPS.pack(weight, gated=False)
    for offset in (None, bias):
        added = OPS.linear(x, packed, n, offset, residual=residual)
        assert torch.equal(added, OPS.linear(x, packed, n, offset) + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 9), level=st.sampled_from(LEVELS))
def test_linear_of_any_shape(dtype, shape, seed, level):
    rows, n, k = shape
    x, weight = normal(rows, k, seed=seed), normal(n, k, seed=seed + 1).to(dtype)
    with at_level(level) as supported:
        out = OPS.linear(x, OPS.pack(weight, gated=False), n, None)
    assert_linear_is_right(out, x, weight)
    assert supported or level != "generic"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [48, 515])
@pytest.mark.parametrize("k", [577, 64])
def test_a_row_has_the_same_bits_in_any_batch(level, threads, dtype, n, k):
    x, bias = normal(300, k), normal(n, seed=2)
    packed = OPS.pack(normal(n, k, seed=1).to(dtype), gated=False)
    threads(1)
    alone = torch.cat([OPS.linear(row[None], packed, n, bias) for row in x])
    for count in (1, 2, 3):
        threads(count)
        for rows in [*range(1, 71), 128, 257, 300]:
            part = slice(rows) if (rows + count) % 2 else slice(300 - rows, 300)
            assert torch.equal(OPS.linear(x[part], packed, n, bias), alone[part]), (count, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_that_are_not_numbers_change_nothing(level, dtype):
    packed = OPS.pack(normal(40, 33, seed=1).to(dtype), gated=False)
    x = normal(20, 33)
    expected = OPS.linear(x, packed, 40, None)
    x[7], x[12] = float("nan"), float("inf")
    out = OPS.linear(x, packed, 40, None)
    healthy = [i for i in range(20) if i not in (7, 12)]
    assert torch.equal(out[healthy], expected[healthy])
    assert not out[[7, 12]].isfinite().any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_linear(level, dtype, gate):
    """As the two projections, their activation and their product in float64, rounded once."""
    for inner, k in ((64, 128), (17, 31), (1, 1), (37, 200)):
        x, weight, bias = normal(9, k), (normal(2 * inner, k, seed=1) / k**0.5).to(dtype), normal(2 * inner, seed=2)
        packed = OPS.pack(weight, gated=True)
        for b in (None, bias):
            out = OPS.gated_linear(x, packed, 2 * inner, b, gate)
            assert out.dtype == dtype and out.shape == (9, inner)
            first, second = products(x.to(dtype), weight, b)[0].chunk(2, dim=1)
            wanted = activation(gate)(first) * second
            torch.testing.assert_close(out.double(), wanted, rtol=2 * EPS[dtype] + 2e-5, atol=2e-6)


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_with_an_activation(level, dtype, act):
    """As the projection and the activation in float64, rounded once."""
    for n, k in ((64, 128), (17, 31), (1, 1), (37, 200)):
        x, weight, bias = normal(9, k), (normal(n, k, seed=1) / k**0.5).to(dtype), normal(n, seed=2)
        packed = OPS.pack(weight, gated=False)
        for b in (None, bias):
            out = OPS.linear(x, packed, n, b, act)
            assert out.dtype == dtype and out.shape == (9, n)
            wanted = activation(act)(products(x.to(dtype), weight, b)[0])
            torch.testing.assert_close(out.double(), wanted, rtol=2 * EPS[dtype] + 2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_a_gated_row_has_the_same_bits_in_any_batch(level, threads, dtype, gate):
    x = normal(150, 96)
    packed = OPS.pack(normal(2 * 77, 96, seed=1).to(dtype), gated=True)
    alone = torch.cat([OPS.gated_linear(row[None], packed, 2 * 77, None, gate) for row in x])
    for count in (1, 2):
        threads(count)
        for rows in (2, 5, 6, 7, 14, 15, 64, 129, 150):
            assert torch.equal(OPS.gated_linear(x[:rows], packed, 2 * 77, None, gate), alone[:rows])


def test_rows_in_bfloat16_are_rows_that_round_to_them(level):
    x = normal(19, 101)
    packed = OPS.pack(normal(50, 101, seed=1).bfloat16(), gated=False)
    assert torch.equal(OPS.linear(x, packed, 50, None), OPS.linear(x.bfloat16(), packed, 50, None))
    assert torch.equal(OPS.linear(x, packed, 50, None), OPS.linear(x.bfloat16().float(), packed, 50, None))


def test_rounding_is_to_nearest_even(level):
    """A weight of one shows what the kernel makes of x."""
    x = torch.cat([normal(500, 1) * 10.0**e for e in (-30, -3, 0, 3, 30)])
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2.0**127 * 1.998, float("inf"), 0.0])[:, None]
    x = torch.cat([x, ties])
    packed = OPS.pack(torch.ones(1, 1, dtype=torch.bfloat16), gated=False)
    assert torch.equal(OPS.linear(x, packed, 1, None), x.bfloat16().float())
    assert OPS.linear(torch.tensor([[math.nan]]), packed, 1, None).isnan().all()


def test_rows_may_be_parts_of_wider_rows(level):
    wide = normal(20, 100)
    packed = OPS.pack(normal(30, 40, seed=1), gated=False)
    expected = OPS.linear(wide[:, 20:60].contiguous(), packed, 30, None)
    assert torch.equal(OPS.linear(wide[:, 20:60], packed, 30, None), expected)
    assert torch.equal(OPS.linear(wide[:, 20:60].T.contiguous().T, packed, 30, None), expected)
    packed = OPS.pack(normal(60, 40, seed=1)[::2], gated=False)
    assert torch.equal(OPS.linear(wide[:, 20:60], packed, 30, None)[:, 0], expected[:, 0])


def test_no_rows_give_no_rows(level):
    packed = OPS.pack(normal(30, 40), gated=False)
    assert OPS.linear(normal(0, 40), packed, 30, None).shape == (0, 30)
    assert OPS.rms_norm(normal(0, 40), torch.ones(40), 1e-6).shape == (0, 40)
    assert OPS.rotate(normal(0, 2, 8), normal(0, 1, 4), normal(0, 1, 4)).shape == (0, 2, 8)


# --- norms and rotation ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 16, 64, 67, 576, 1031])
def test_norms(level, threads, size):
    x, weight, bias = normal(70, size) * 3 + 1, normal(size, seed=1), normal(size, seed=2)
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    wanted = {
        "rms": exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight,
        "layer": centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias,
        "plain": centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight,
    }
    norms = {
        "rms": lambda x: OPS.rms_norm(x, weight, 1e-5),
        "layer": lambda x: OPS.layer_norm(x, weight, bias, 1e-5),
        "plain": lambda x: OPS.layer_norm(x, weight, None, 1e-5),
    }
    for name, norm in norms.items():
        threads(1)
        alone = torch.cat([norm(row[None]) for row in x])
        torch.testing.assert_close(alone.double(), wanted[name], rtol=1e-5, atol=2e-5 if size == 1 else 1e-5)
        for count in (1, 2):
            threads(count)
            for rows in range(1, 71):
                assert torch.equal(norm(x[:rows]), alone[:rows])


def test_norms_of_heads_that_lie_in_a_wider_tensor(level):
    heads = normal(5, 6, 24)[:, 1:4]
    weight = normal(24, seed=1)
    assert torch.equal(OPS.rms_norm(heads, weight, 1e-6), OPS.rms_norm(heads.contiguous(), weight, 1e-6))
    assert OPS.rms_norm(heads[None], weight, 1e-6).shape == (1, 5, 3, 24)


@pytest.mark.parametrize(("dim", "half"), [(64, 32), (8, 1), (80, 16), (6, 3), (128, 64), (96, 20)])
def test_rotation(level, threads, dim, half):
    x = normal(65, 9, dim)[:, 2:8]
    angles = normal(65, 1, half, seed=1)
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.double().split((half, half, dim - 2 * half), dim=-1)
    wanted = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    threads(1)
    alone = torch.cat([OPS.rotate(x[i : i + 1], cos[i : i + 1], sin[i : i + 1]) for i in range(65)])
    torch.testing.assert_close(alone.double(), wanted, rtol=1e-5, atol=1e-6)
    for count in (1, 2):
        threads(count)
        for rows in (1, 2, 17, 65):
            assert torch.equal(OPS.rotate(x[:rows], cos[:rows], sin[:rows]), alone[:rows])
    rounded = OPS.rotate(x.bfloat16(), cos, sin)
    assert torch.equal(rounded, OPS.rotate(x.bfloat16().float(), cos, sin).bfloat16())


# --- which ops are taken -------------------------------------------------------------------------


def test_native_ops_are_chosen_on_cpus_for_what_they_have():
    cpu = torch.device("cpu")
    assert select_ops("auto", cpu, torch.bfloat16).name == "native"
    assert select_ops("auto", cpu, torch.float32).name == "native"
    assert select_ops("torch", cpu, torch.float32).name == "torch"
    assert select_ops("auto", cpu, torch.float16).name == "torch"
    with pytest.raises(ConfigError, match=r"kernels='native': has no kernels for torch\.float16"):
        select_ops("native", cpu, torch.float16)
    with pytest.raises(ConfigError, match="kernels='native': runs on the CPU, not on cuda"):
        select_ops("native", torch.device("cuda"), torch.bfloat16)


def test_an_environment_variable_names_the_level(monkeypatch, level):
    with at_level("generic"):
        monkeypatch.setenv("NANOVLLM_ISA", level)
        assert load_library().level == level


def test_a_level_that_is_not_to_be_had_is_refused(monkeypatch):
    monkeypatch.setenv("NANOVLLM_ISA", "avx1024")
    with pytest.raises(ConfigError, match="NANOVLLM_ISA='avx1024': not one of generic, avx2"):
        load_library()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_table_and_of_a_packed_weight(level, dtype):
    for n, k in ((70, 64), (33, 31), (1, 1), (100, 577)):
        table, rows = normal(n, k).to(dtype), torch.randint(0, n, (19,))
        assert torch.equal(OPS.gather(table, rows), table[rows].float())
        assert torch.equal(OPS.embed_packed(OPS.pack(table, gated=False), rows, 0, table.shape), table[rows].float())
