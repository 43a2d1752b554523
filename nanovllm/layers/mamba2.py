"""Mamba2 (Dao and Gu 2024): a short convolution and a state space recurrence in place of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.layers.attention import CachedLayer
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear, Shard
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
        part = Mamba2Part(sizes, ctx.tp)
        self._sizes, self._ops = part.sizes, ctx.ops
        self._sum_squares = ctx.tp.all_reduce if part.sizes.whole_norm_size else None
        shards = {name: Shard(rows, part.rows[name]) for name, rows in sizes.in_proj_shards.items()}
        self.in_proj = MergedColumnParallelLinear(sizes.hidden_size, shards, ctx, bias=sizes.proj_bias)
        self.conv1d = Conv1dWeights(sizes, part, ctx)
        for name in ("A_log", "D", "dt_bias"):
            self.add_part(name, (sizes.num_heads,), [part.rows["dt"]], ctx.dtype, ctx.device)
        self.norm = GatedNormWeights(sizes, part, ctx)
        self.out_proj = RowParallelLinear(sizes.inner_size, sizes.hidden_size, ctx, bias=sizes.proj_bias)
        self.cache_spec = ctx.ops.mamba2_states(self._sizes, ctx.dtype)

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
        states = self._conv_states, self._states
        return self.out_proj(self._ops.mamba2(self.in_proj(x), self._weights, *states, plan, self._sum_squares))


class Mamba2Part:
    """What a rank has of a layer: some heads, and the groups that these read. The only group is on all ranks,
    and its norm needs the sum of their squares.

    sizes: of the part. rows: of each segment of the input projection.
    """

    def __init__(self, sizes: Mamba2Sizes, tp: TPGroup) -> None:
        heads = tp.part(sizes.num_heads, "Mamba heads")
        one = sizes.num_groups == 1
        groups = slice(0, 1) if one else tp.part(sizes.num_groups, "Mamba groups")
        inner, shared = _times(heads, sizes.head_dim), _times(groups, sizes.state_size)
        self.rows: dict[str | None, slice] = {"gate": inner, "x": inner, "B": shared, "C": shared, "dt": heads}
        self.sizes = dataclasses.replace(
            sizes,
            num_heads=heads.stop - heads.start,
            num_groups=groups.stop - groups.start,
            whole_norm_size=sizes.inner_size if one and tp.size > 1 else None,
        )


def _times(part: slice, size: int) -> slice:
    return slice(part.start * size, part.stop * size)


class Conv1dWeights(WeightLayer):
    """One filter a channel, over a token and those before it."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, sizes: Mamba2Sizes, part: Mamba2Part, ctx: BuildContext) -> None:
        super().__init__()
        parts, start = [], 0
        for name in ("x", "B", "C"):
            rows = part.rows[name]
            parts.append(slice(start + rows.start, start + rows.stop))
            start += sizes.in_proj_shards[name]
        self.add_part("weight", (sizes.conv_size, 1, sizes.conv_kernel), parts, ctx.dtype, ctx.device)
        self.register_parameter("bias", None)
        if sizes.conv_bias:
            self.add_part("bias", (sizes.conv_size,), parts, ctx.dtype, ctx.device)


class GatedNormWeights(WeightLayer):
    """Of the RMSNorm before the output projection."""

    weight: torch.Tensor

    def __init__(self, sizes: Mamba2Sizes, part: Mamba2Part, ctx: BuildContext) -> None:
        super().__init__()
        self.add_part("weight", (sizes.inner_size,), [part.rows["x"]], ctx.dtype, ctx.device)
