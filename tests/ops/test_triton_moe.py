"""The Triton kernels of mixtures of experts against torch's ops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton_moe_cases as cases
from kernels import normal
from mamba2_cases import context

from nanovllm.distributed.group import TPGroup
from nanovllm.layers.moe import SparseMoE
from nanovllm.ops.base import Ops
from nanovllm.weights.loader import fill_dummy_weights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.slow)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)
LARGE = (300, 128, 8, 512, 192)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_routes_are_those_of_torch(device, data):
    experts = data.draw(st.integers(1, 130))
    cases.check_route(device, data.draw(st.integers(1, 40)), experts, data.draw(st.integers(1, min(experts, 9))))


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [
        *((7, 5, k) for k in range(1, 6)),
        *(pytest.param(*sizes, marks=pytest.mark.gpu) for sizes in ((40, 128, 8), (1000, 62, 6))),
    ],
)
def test_any_number_of_choices(device, tokens, experts, k):
    cases.check_route(device, tokens, experts, k)


def test_scores_that_are_no_numbers(device):
    cases.check_odd_scores(device)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float16) for shape in (*cases.SHAPES, cases.MANY_ROWS)),
        *((shape, dtype) for shape in cases.SHAPES[:2] for dtype in (torch.float32, torch.bfloat16)),
        *(pytest.param(shape, torch.float32, marks=pytest.mark.slow) for shape in (*cases.SHAPES[2:], cases.MANY_ROWS)),
        *(
            pytest.param(shape, torch.bfloat16, marks=pytest.mark.slow)
            for shape in (*cases.SHAPES[2:], cases.MANY_ROWS)
        ),
        *(
            pytest.param(LARGE, dtype, marks=pytest.mark.gpu)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ),
    ],
    ids=str,
)
def test_mixtures(device, shape, dtype):
    cases.check_mixture(device, dtype, shape)


@DTYPES
def test_another_activation(device, dtype):
    cases.check_mixture(device, dtype, cases.SHAPES[1], "gelu_pytorch_tanh")


@DTYPES
def test_only_chosen_experts_count(device, dtype):
    cases.check_few_experts_chosen(device, dtype)


@DTYPES
def test_experts_that_are_elsewhere_give_nothing(device, dtype):
    cases.check_experts_elsewhere(device, dtype)


@DTYPES
def test_a_token_has_the_same_bits_in_any_company(device, dtype):
    cases.check_company(device, dtype)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_pairs_in_tiles(device, data):
    experts = data.draw(st.integers(1, 40))
    tokens, k = data.draw(st.sampled_from([1, 2, 30, 300])), data.draw(st.integers(1, min(experts, 4)))
    start = data.draw(st.integers(0, experts - 1))
    cases.check_groups(device, tokens, experts, k, slice(start, data.draw(st.integers(start + 1, experts))))


def test_many_pairs_in_tiles(device):
    """Blocks of pairs are larger then."""
    cases.check_groups(device, 8200, 3, 2, slice(0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300, 40000])
def test_pairs_of_many_experts(device, tokens):
    cases.check_groups(device, tokens, 128, 8, slice(0, 128))
    cases.check_groups(device, tokens, 128, 8, slice(32, 64))


@pytest.mark.gpu
def test_a_mixture_can_be_captured_and_replayed():
    cases.check_capture()


def build(ops: Ops, tp: TPGroup, **options: bool) -> SparseMoE:
    moe = SparseMoE(12, 7, 6, 2, dataclasses.replace(context(ops, tp=tp), **options), normalise=True, reduce=False)
    fill_dummy_weights(moe)
    return moe


def test_a_layer_keeps_its_experts_in_one_tensor_and_is_that_of_torch():
    """Weights are loaded into their places; what ranks have of the experts adds up."""
    x = normal(9, 12)
    wanted = build(cases.TORCH, TPGroup())(x)
    moe = build(cases.TRITON, TPGroup())
    assert moe._stacks is not None
    for stack, name in zip([s.weight for s in moe._stacks], ("gate_up_proj", "down_proj"), strict=True):
        weights = [expert.get_submodule(name).weight for expert in moe.experts]
        assert [w.data_ptr() for w in weights] == [place.data_ptr() for place in stack]
        assert [w.shape for w in weights] == [place.shape for place in stack]
    torch.testing.assert_close(moe(x), wanted)
    whole, total = dict(moe.named_parameters()), torch.zeros_like(wanted)
    for rank in range(4):
        part = build(cases.TRITON, TPGroup(rank, 4), expert_parallel=True)
        for name, parameter in part.named_parameters():
            parameter.copy_(whole[name])
        total += part(x)
    torch.testing.assert_close(total, wanted)
