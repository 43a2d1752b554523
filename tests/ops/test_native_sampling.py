"""Native sampling against torch's, on every level that this processor has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels import native_library, normal
from sampling_rows import cuts, logits_rows, make_rows

from nanovllm.ops.native_sampling import NativeSampling
from nanovllm.ops.torch_sampling import TorchSampling
from nanovllm.sampling_params import SamplingParams

NATIVE, TORCH = NativeSampling(native_library()), TorchSampling()
SIZES = [1, 3, 16, 67, 1023, 1025, 5000]
CUTS = cuts(1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_same_tokens_as_torch(level, size, cut):
    """At both ends of what is kept, and between."""
    logits = logits_rows(size)
    rows = make_rows(SamplingParams(**cut), len(logits))
    for u in (1e-12, 0.1234, 0.3456, 0.5678, 0.789, 0.98765, 1 - 1e-12):
        uniforms = np.full(len(logits), u)
        expected = TORCH.draw(logits, rows, uniforms)
        assert NATIVE.draw(logits, rows, uniforms).tolist() == expected.tolist()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_row_is_the_same_alone_and_by_any_number_of_threads(level, threads, cut):
    logits, uniforms = logits_rows(3000), np.linspace(0, 0.99, 8)
    rows = make_rows(SamplingParams(**cut), 8)
    threads(1)
    alone = [NATIVE.draw(logits[i : i + 1], rows[:1], uniforms[i : i + 1])[0] for i in range(8)]
    for count in (1, 2, 3):
        threads(count)
        assert NATIVE.draw(logits, rows, uniforms).tolist() == alone


@pytest.mark.parametrize("shape", ["steps", "powers", "heavy head"])
def test_floors_of_shapes_that_mislead_the_pivot(level, shape):
    """The pivot is guessed from samples: of rows in order, of rows whose mass lies in a few tokens."""
    size = 20_000
    ramp = torch.linspace(0, 20, size)
    x = {"steps": ramp.floor(), "powers": -(1.0005 ** torch.arange(size)), "heavy head": ramp - 20}[shape][None]
    if shape == "heavy head":
        x[0, :50] = 3 + ramp[:50]
    for cut in ({"top_k": 1999}, {"top_p": 0.9}, {"top_p": 0.9999}, {"top_k": 19_990}):
        rows = make_rows(SamplingParams(**cut), 1)
        for u in (1e-12, 0.5, 1 - 1e-12):
            expected = TORCH.draw(x, rows, np.array([u]))
            assert NATIVE.draw(x, rows, np.array([u])) == expected


@pytest.mark.parametrize("size", SIZES)
def test_argmax_takes_the_first(level, size):
    x = logits_rows(size)
    x = torch.cat([x, x.flip(1), torch.full((1, size), float("-inf"))])
    assert NATIVE.argmax(x).tolist() == TORCH.argmax(x).tolist()
    x[3, size // 3 :] = float("nan")
    x[5, size // 2] = float("inf")
    assert NATIVE.argmax(x).tolist() == TORCH.argmax(x).tolist()


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_gives_a_token_and_harms_no_other(level, cut, broken):
    logits, uniforms = logits_rows(1025), np.linspace(0, 0.99, 8)
    rows = make_rows(SamplingParams(**cut), 8)
    expected = NATIVE.draw(logits, rows, uniforms)
    logits[2], logits[5, 1020:] = broken, broken
    found = NATIVE.draw(logits, rows, uniforms)
    assert ((found >= 0) & (found < 1025)).all()
    healthy = [0, 1, 3, 4, 6, 7]
    assert found[healthy].tolist() == expected[healthy].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_log_softmax(level, threads, size):
    x = logits_rows(size)
    threads(1)
    alone = torch.cat([NATIVE.log_softmax(row[None]) for row in x])
    torch.testing.assert_close(alone.double(), x.double().log_softmax(-1), rtol=1e-6, atol=1e-5)
    threads(2)
    assert torch.equal(NATIVE.log_softmax(x), alone)
    x[1] = float("nan")
    found = NATIVE.log_softmax(x)
    assert found[1].isnan().all() and torch.equal(found[2:], alone[2:])


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1e-40},
        {"presence_penalty": 0.7},
        {"frequency_penalty": -0.3},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.25},
    ],
    ids=str,
)
def test_penalties_are_torch_s(level, threads, params):
    rng = np.random.default_rng(0)
    logits = logits_rows(500)
    rows = {}
    for i, (prompt, output) in {1: (40, 0), 2: (1, 3000), 4: (900, 70), 7: (0, 5)}.items():
        rows[i] = make_rows(SamplingParams(**params), 1, rng.integers(0, 500, prompt), rng.integers(0, 500, output))[0]
    expected = logits.clone()
    TORCH.penalise(expected, rows)
    for count in (1, 2):
        threads(count)
        found = logits.clone()
        NATIVE.penalise(found, rows)
        assert torch.equal(found, expected)


def test_rows_may_be_parts_of_wider_rows(level):
    wide = normal(6, 400)
    part, rows = wide[:, 7:300], make_rows(SamplingParams(top_p=0.8), 6)
    uniforms = np.linspace(0, 0.9, 6)
    assert NATIVE.draw(part, rows, uniforms).tolist() == NATIVE.draw(part.contiguous(), rows, uniforms).tolist()
    assert NATIVE.argmax(part).tolist() == part.argmax(1).tolist()
    assert torch.equal(NATIVE.log_softmax(part), NATIVE.log_softmax(part.contiguous()))


def test_no_rows_give_no_tokens():
    assert NATIVE.argmax(torch.empty(0, 5)).shape == NATIVE.draw(torch.empty(0, 5), [], np.empty(0)).shape == (0,)
