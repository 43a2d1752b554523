"""Products with quantised weights: the bits of bfloat16 weights of the same values, in any company, at every level."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import at_level, normal
from quantized import FORMS, dequantized, packed, random_codes
from test_native import OPS, assert_linear_is_right

from nanovllm.ops.formats import Packed, Segment
from nanovllm.ops.library import LEVELS

EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def values(codes) -> torch.Tensor:
    """What is multiplied by: rounded once."""
    return torch.from_numpy(dequantized(codes)).float().bfloat16()


def assert_rows_keep_their_bits(ops, form, n: int, k: int, rows: int, data: st.DataObject) -> None:
    """Alone, among any of the last rows, by any number of threads."""
    threads = torch.get_num_threads()
    weight, x = packed(ops, random_codes(form, n, k)), normal(rows, k)
    alone = torch.cat([ops.linear(row[None], weight, n, None) for row in x])
    try:
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        for part in (rows, *(data.draw(st.integers(1, rows)) for _ in range(3))):
            assert torch.equal(ops.linear(x[-part:], weight, n, None), alone[-part:])
    finally:
        torch.set_num_threads(threads)


# odd numbers of columns, groups and panels that are not whole, one block of x and several
@EACH_FORM
@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (33, 31), (48, 64), (65, 97), (130, 577)])
def test_linear_is_that_of_the_dequantised_weight(level, form, shape):
    n, k = shape
    codes, bias, residual = random_codes(form, n, k), normal(n, seed=2), normal(19, n, seed=3)
    weight, x = packed(OPS, codes), normal(19, k)
    out = OPS.linear(x, weight, n, None)
    plain = OPS.pack(values(codes), gated=False)
    assert_linear_is_right(out, x, values(codes))
    assert torch.equal(out, OPS.linear(x, plain, n, None))
    expected = OPS.linear(x, plain, n, bias, residual=residual)
    assert torch.equal(OPS.linear(x, weight, n, bias, residual=residual), expected)
    assert torch.equal(OPS.linear(x, weight, n, bias, "gelu"), OPS.linear(x, plain, n, bias, "gelu"))


@EACH_FORM
def test_threads_pack_what_one_packs(threads, form):
    """Two of them once packed the panels of a pair, and lost what the other wrote to a word of both: of a single
    pair, they are at it at the same time."""
    codes = random_codes(form, 32, 8192)

    def found(count: int) -> torch.Tensor:
        threads(count)
        data = OPS.zeros(OPS.codes_bytes(form, 32, 8192), torch.device("cpu"))
        OPS.pack_codes(codes, 0, data)
        return data

    alone = found(1)
    assert all(torch.equal(found(2), alone) for _ in range(10))


@EACH_FORM
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 100), k=st.integers(1, 200), rows=st.integers(1, 90), level=st.sampled_from(LEVELS), data=st.data()
)
def test_a_row_has_the_same_bits_in_any_batch(form, n, k, rows, level, data):
    """Few rows are multiplied by another kernel than many."""
    with at_level(level) as supported:
        assert_rows_keep_their_bits(OPS, form, n, k, rows, data)
    assert supported or level != "generic"


@EACH_FORM
def test_gated_linear(level, form):
    for inner, k in ((64, 128), (17, 31), (1, 1)):
        codes, x, bias = random_codes(form, 2 * inner, k), normal(9, k), normal(2 * inner, seed=2)
        out = OPS.gated_linear(x, packed(OPS, codes, gated=True), 2 * inner, bias, "silu")
        gate, up = OPS.linear(x, packed(OPS, codes), 2 * inner, bias).chunk(2, dim=1)
        wanted = torch.nn.functional.silu(gate.double()) * up.double()
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), wanted, rtol=2.0**-8, atol=2e-6)
        assert torch.equal(OPS.gated_linear(x[:1], packed(OPS, codes, gated=True), 2 * inner, bias, "silu"), out[:1])


@EACH_FORM
def test_rows_of_a_table(level, form):
    for n, k in ((70, 64), (33, 31), (1, 1), (100, 577)):
        codes, ids = random_codes(form, n, k), torch.randint(0, n + 9, (19,))
        found = OPS.embed_packed(packed(OPS, codes), ids, 0, (n, k))
        assert torch.equal(found, torch.cat([values(codes).float(), torch.zeros(9, k)])[ids])


def test_rows_of_several_forms_in_one_weight(level):
    """As query, key and value projections of a GGUF file may have: each is a product of its own."""
    k, ends, x = 64, [0, 40, 57, 90], normal(7, 64)
    parts = [random_codes(FORMS[name], end - start, k) for name, start, end in zip(
        ("q4_nested", "q8_fine", "q8"), ends, ends[1:], strict=False)]  # fmt: skip
    memory, segments, expected = [], [], []
    bias, residual = normal(90, seed=1), normal(7, 90, seed=2)
    for codes, start, end in zip(parts, ends, ends[1:], strict=False):
        weight = packed(OPS, codes)
        segments.append(Segment(slice(start, end), codes.form, sum(map(len, memory))))
        memory.append(weight.data)
        rows = slice(start, end)
        expected.append(OPS.linear(x, weight, end - start, bias[rows], residual=residual[:, rows]))
    whole = Packed(torch.cat(memory), tuple(segments))
    assert torch.equal(OPS.linear(x, whole, 90, bias, residual=residual), torch.cat(expected, dim=1))


@pytest.mark.parametrize("forms", [("q4", "q8"), ("q5", "q5"), ("q4_nested", "q6_fine")])
@pytest.mark.parametrize("tokens", [1, 60])
def test_a_mixture_gives_the_bits_of_its_experts(level, threads, forms, tokens):
    threads(2)
    experts, hidden, inner = 5, 96, 64
    first = [packed(OPS, random_codes(FORMS[forms[0]], 2 * inner, hidden, e), gated=True) for e in range(experts)]
    second = [packed(OPS, random_codes(FORMS[forms[1]], hidden, inner, e)) for e in range(experts)]
    gate_up, down = (Packed(torch.stack([w.data for w in ws]), ws[0].segments) for ws in (first, second))
    x, chosen = normal(tokens, hidden), torch.randint(experts, (tokens, 1)).int()
    out = OPS.mixture(x, torch.ones(tokens, 1), chosen, gate_up, down, inner, "silu")
    for e in chosen.unique().tolist():
        mine = chosen[:, 0] == e
        fed = OPS.gated_linear(x[mine], first[e], 2 * inner, None, "silu")
        assert torch.equal(out[mine], OPS.linear(fed, second[e], hidden, None))


@pytest.mark.parametrize("rows", [1, 19])
def test_columns_in_another_order(level, rows):
    """Of fp32 and of bfloat16 rows, which have gaps between them."""
    n, k = 40, 577
    weight, order = packed(OPS, random_codes(FORMS["q4_128"], n, k)), torch.randperm(k)
    ordered = dataclasses.replace(weight, columns=order.int())
    for x in (normal(rows, k + 3)[:, :k], normal(rows, k + 3).bfloat16()[:, :k]):
        assert torch.equal(OPS.linear(x, ordered, n, None), OPS.linear(x[:, order], weight, n, None))


def test_a_mixture_whose_experts_have_columns_in_other_orders(level, threads):
    threads(2)
    experts, hidden, inner, tokens = 4, 96, 64, 30
    first = [packed(OPS, random_codes(FORMS["q4_32"], 2 * inner, hidden, e), gated=True) for e in range(experts)]
    second = [packed(OPS, random_codes(FORMS["q8_128"], hidden, inner, e)) for e in range(experts)]
    orders = [[torch.randperm(size).int() for _ in range(experts)] for size in (hidden, inner)]
    gate_up, down = (
        Packed(torch.stack([w.data for w in ws]), ws[0].segments, torch.stack(columns))
        for ws, columns in zip((first, second), orders, strict=True)
    )
    x, chosen = normal(tokens, hidden), torch.randint(experts, (tokens, 1)).int()
    out = OPS.mixture(x, torch.ones(tokens, 1), chosen, gate_up, down, inner, "silu")
    for e in chosen.unique().tolist():
        mine = chosen[:, 0] == e
        fed = OPS.gated_linear(x[mine][:, orders[0][e]], first[e], 2 * inner, None, "silu")
        assert torch.equal(out[mine], OPS.linear(fed[:, orders[1][e]], second[e], hidden, None))
