"""The Triton kernels of mixtures of experts against torch's ops, interpreted on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("where there is a GPU, kernels are compiled: see test_triton_moe_gpu.py", allow_module_level=True)

import triton_moe_cases as cases
from kernels import normal
from mamba2_cases import context

from nanovllm.distributed.group import TPGroup
from nanovllm.layers.moe import SparseMoE
from nanovllm.ops.base import Ops
from nanovllm.weights.loader import fill_dummy_weights

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_routes_are_those_of_torch(data):
    experts = data.draw(st.integers(1, 130))
    cases.check_route("cpu", data.draw(st.integers(1, 40)), experts, data.draw(st.integers(1, min(experts, 9))))


@pytest.mark.parametrize("k", range(1, 6))
def test_any_number_of_choices(k):
    cases.check_route("cpu", 7, 5, k)


def test_scores_that_are_no_numbers():
    cases.check_odd_scores("cpu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float16) for shape in (*cases.SHAPES, cases.MANY_ROWS)),
        *((shape, torch.float32) for shape in cases.SHAPES[:2]),
        *(pytest.param(shape, torch.float32, marks=pytest.mark.slow) for shape in (*cases.SHAPES[2:], cases.MANY_ROWS)),
    ],
    ids=str,
)
def test_mixtures(shape, dtype):
    cases.check_mixture("cpu", dtype, shape)


def test_another_activation():
    cases.check_mixture("cpu", torch.float32, cases.SHAPES[1], "gelu_pytorch_tanh")


@DTYPES
def test_only_chosen_experts_count(dtype):
    cases.check_few_experts_chosen("cpu", dtype)


@DTYPES
def test_experts_that_are_elsewhere_give_nothing(dtype):
    cases.check_experts_elsewhere("cpu", dtype)


@DTYPES
def test_a_token_has_the_same_bits_in_any_company(dtype):
    cases.check_company("cpu", dtype)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_pairs_in_tiles(data):
    experts = data.draw(st.integers(1, 40))
    tokens, k = data.draw(st.sampled_from([1, 2, 30, 300])), data.draw(st.integers(1, min(experts, 4)))
    start = data.draw(st.integers(0, experts - 1))
    cases.check_groups("cpu", tokens, experts, k, slice(start, data.draw(st.integers(start + 1, experts))))


def test_many_pairs_in_tiles():
    """Blocks of pairs are larger then."""
    cases.check_groups("cpu", 8200, 3, 2, slice(0, 3))


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
