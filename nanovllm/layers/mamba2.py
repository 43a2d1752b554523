"""Mamba2 (Dao and Gu 2024): a short convolution and a state space recurrence in place of attention."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.build_context import BuildContext
from nanovllm.layers.attention import CachedLayer
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights


class Mamba2(WeightLayer, CachedLayer):
    """Keeps for each sequence the convolution's last inputs, as the projection rounded them, and
    the recurrence's state in fp32.

    dt is limited wherever a token is computed. Hugging Face does so in prompts alone; where the
    limits bind, its text differs from what it would compute for the same tokens in one pass.
    """

    A_log: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor

    def __init__(self, sizes: Mamba2Sizes, ctx: BuildContext) -> None:
        super().__init__()
        assert ctx.tp.size == 1, "the configuration admits one rank"
        self._sizes, self._ops = sizes, ctx.ops
        self.in_proj = MergedColumnParallelLinear(sizes.hidden_size, sizes.in_proj_shards, ctx, bias=sizes.proj_bias)
        self.conv1d = Conv1dWeights(sizes, ctx)
        for name in ("A_log", "D", "dt_bias"):
            self.add_parameter(name, (sizes.num_heads,), ctx.dtype, ctx.device)
        self.norm = GatedNormWeights(sizes, ctx)
        self.out_proj = RowParallelLinear(sizes.inner_size, sizes.hidden_size, ctx, bias=sizes.proj_bias)
        self.cache_spec = ctx.ops.mamba2_states(sizes, ctx.dtype)

    def finalize_weights(self) -> None:
        bias = self.conv1d.bias
        self._weights = Mamba2Weights(
            sizes=self._sizes,
            filters=self.conv1d.weight.float().squeeze(1).t().contiguous(),
            conv_bias=self.A_log.new_zeros(self._sizes.conv_size).float() if bias is None else bias.float(),
            A=-self.A_log.float().exp(),
            D=self.D.float(),
            dt_bias=self.dt_bias.float(),
            norm=self.norm.weight.float(),
        )

    def bind(self, *caches: torch.Tensor) -> None:
        self._conv_states, self._states = caches

    def forward(self, x: torch.Tensor, plan: Any) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]. plan: what Ops.plan_mamba2 made of the batch."""
        y = self._ops.mamba2(self.in_proj(x), self._weights, self._conv_states, self._states, plan)
        return self.out_proj(y)


class Conv1dWeights(WeightLayer):
    """One filter a channel, over a token and those before it."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, sizes: Mamba2Sizes, ctx: BuildContext) -> None:
        super().__init__()
        self.add_parameter("weight", (sizes.conv_size, 1, sizes.conv_kernel), ctx.dtype, ctx.device)
        self.register_parameter("bias", None)
        if sizes.conv_bias:
            self.add_parameter("bias", (sizes.conv_size,), ctx.dtype, ctx.device)


class GatedNormWeights(WeightLayer):
    """Of the RMSNorm before the output projection."""

    weight: torch.Tensor

    def __init__(self, sizes: Mamba2Sizes, ctx: BuildContext) -> None:
        super().__init__()
        self.add_parameter("weight", (sizes.inner_size,), ctx.dtype, ctx.device)
