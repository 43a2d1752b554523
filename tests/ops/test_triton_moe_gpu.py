"""The Triton kernels of mixtures of experts against torch's ops, on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton_moe_cases as cases

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (40, 128, 8), (1000, 62, 6), (9, 5, 5)])
def test_routes_are_those_of_torch(tokens, experts, k):
    cases.check_route("cuda", tokens, experts, k)


def test_scores_that_are_no_numbers():
    cases.check_odd_scores("cuda")


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("shape", [*cases.SHAPES, cases.MANY_ROWS, (300, 128, 8, 512, 192)], ids=str)
def test_mixtures(dtype, shape, act):
    cases.check_mixture("cuda", dtype, shape, act)


@DTYPES
def test_only_chosen_experts_count(dtype):
    cases.check_few_experts_chosen("cuda", dtype)


@DTYPES
def test_experts_that_are_elsewhere_give_nothing(dtype):
    cases.check_experts_elsewhere("cuda", dtype)


@DTYPES
def test_a_token_has_the_same_bits_in_any_company(dtype):
    cases.check_company("cuda", dtype)


@pytest.mark.parametrize("tokens", [1, 300, 40000])
def test_pairs_in_tiles(tokens):
    cases.check_groups("cuda", tokens, 128, 8, slice(0, 128))
    cases.check_groups("cuda", tokens, 128, 8, slice(32, 64))


def test_a_mixture_can_be_captured_and_replayed():
    cases.check_capture()
