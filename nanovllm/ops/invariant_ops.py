"""TritonOps whose rows have the same bits in any batch."""

from __future__ import annotations

import dataclasses
import sys

import torch

from nanovllm.cache_spec import StateSpec
from nanovllm.ops import triton_mamba2
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.ops.triton_ops import TritonOps
from nanovllm.triton_kernels.linear import linear
from nanovllm.triton_kernels.mamba2_plan import Mamba2Plan


class InvariantTritonOps(TritonOps):
    """Tiles are chosen by weights, never by how many rows there are, and a token goes the same way in a prompt as when
    it is decoded. What is not overridden works row by row, in an order that the row's size decides."""

    expert_rows = 64  # as many as of a linear layer's tile, for the same reason
    quantized_tokens = 32  # more would let a token that is alone wait for its tile's products
    most_quantized_tokens = sys.maxsize

    def plain_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear(x, weight, bias, residual)

    def mamba2_states(self, sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
        return dataclasses.replace(super().mamba2_states(sizes, dtype), grid=1)

    def mamba2(
        self,
        projected: torch.Tensor,
        weights: Mamba2Weights,
        conv_states: torch.Tensor,
        states: torch.Tensor,
        plan: Mamba2Plan,
        sum_squares: SumOverRanks | None = None,
    ) -> torch.Tensor:
        """Without cells: a preempted sequence computes as a prompt what it once decoded."""
        return triton_mamba2.mamba2(projected, weights, conv_states, states, plan, sum_squares, in_cells=False)
