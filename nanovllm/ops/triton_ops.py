"""Ops of triton_kernels/: GPUs, with cuBLAS for the matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.batch import Batch
from nanovllm.cache_spec import StateSpec
from nanovllm.ops import triton_mamba2
from nanovllm.ops.formats import Packed
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_sampling import TritonSampling
from nanovllm.triton_kernels import moe
from nanovllm.triton_kernels.activation import KINDS, activate_gated
from nanovllm.triton_kernels.gather import gather
from nanovllm.triton_kernels.mamba2_plan import Mamba2Plan, plan_mamba2
from nanovllm.triton_kernels.norm import layer_norm, rms_norm
from nanovllm.triton_kernels.rotary import norm_and_rotate, rotate


class TritonOps(TorchOps):
    """torch's operations, but for those that a kernel of ours does in one launch instead of several.

    The hidden stream has the weights' dtype; each operation computes in fp32 and rounds once.
    """

    name = "triton"
    norms_and_rotates = True
    sampling = TritonSampling()
    expert_rows: int | None = None  # of a tile of one expert's tokens; None: by how many tokens there are

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False

    def plain_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The residual is where the product's sums begin, in fp32 and in its own memory: one launch and one
        rounding, where torch would first copy it elsewhere. With a bias, which cuBLAS adds in its place, it is
        added afterwards."""
        if residual is None:
            return F.linear(x, weight, bias)
        if bias is None:
            return residual.addmm_(x, weight.t())
        return residual.add_(F.linear(x, weight, bias))

    def activate(self, x: torch.Tensor, act: str, *, gated: bool) -> torch.Tensor:
        return activate_gated(x, act) if gated else super().activate(x, act, gated=False)

    def gather(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return gather(table, rows)

    def embed(self, table: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
        return gather(table, ids, first)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return layer_norm(x, weight, bias, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(x, cos, sin)

    def norm_and_rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_and_rotate(q, k, q_weight, k_weight, eps, cos, sin)

    def fuses(self, act: str) -> bool:
        return act in KINDS

    def route(self, scores: torch.Tensor, k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return moe.route(scores, k, normalise=normalise)

    def mixture(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gate_up: torch.Tensor | Packed,
        down: torch.Tensor | Packed,
        inner: int,
        act: str,
        first: int = 0,
    ) -> torch.Tensor:
        assert isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor)
        return moe.mixture(x, weights, chosen, gate_up, down, act, first, self.expert_rows)

    def mamba2_states(self, sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
        return triton_mamba2.mamba2_states(sizes, dtype)

    def plan_mamba2(self, batch: Batch, sizes: Mamba2Sizes) -> Mamba2Plan:
        return plan_mamba2(batch)

    def mamba2(
        self,
        projected: torch.Tensor,
        weights: Mamba2Weights,
        conv_states: torch.Tensor,
        states: torch.Tensor,
        plan: Mamba2Plan,
        sum_squares: SumOverRanks | None = None,
    ) -> torch.Tensor:
        return triton_mamba2.mamba2(projected, weights, conv_states, states, plan, sum_squares)
