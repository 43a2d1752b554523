"""The GPU's sampling against torch's."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import sampling_cases as cases

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's


def marked(mark: pytest.MarkDecorator, *values: object) -> list:
    return [pytest.param(value, marks=mark) for value in values]


@pytest.mark.parametrize("size", [1, 300, 2100, pytest.param(50257, marks=pytest.mark.slow)])
def test_rows_with_parameters_of_their_own(device, size):
    cases.check_mixed_rows(device, size)


@pytest.mark.parametrize("cut", cases.CUTS, ids=str)
@pytest.mark.parametrize("size", [*marked(pytest.mark.slow, 67, 5000), *marked(pytest.mark.gpu, 1, 50257, 151936)])
def test_the_same_tokens_as_torch(device, size, cut):
    cases.check_tokens(device, size, cut)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("size", "cut"),
    [
        (300, {"top_k": 30, "top_p": 0.9, "typical_p": 0.8}),
        *(pytest.param(50257, cut, marks=pytest.mark.gpu) for cut in cases.CUTS),
    ],
    ids=str,
)
def test_a_row_is_its_own(device, size, cut, broken):
    cases.check_rows_are_their_own(device, size, cut, broken)


@pytest.mark.parametrize("size", [*marked(pytest.mark.slow, 10_000), *marked(pytest.mark.gpu, 151936)])
def test_flat_rows(device, size):
    cases.check_flat_rows(device, size)


@pytest.mark.parametrize("params", cases.PENALTIES, ids=str)
def test_penalties(device, params):
    cases.check_penalties(device, params)


def test_logprobs(device):
    cases.check_logprobs(device)
