"""The gated MLP of the Llama line."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.layers.linear import GatedLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), gate and up in one matrix. reduce: as in RowParallelLinear."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        ctx: BuildContext,
        *,
        bias: bool = False,
        act: str = "silu",
        reduce: bool = True,
    ) -> None:
        super().__init__()
        self.gate_up_proj = GatedLinear(hidden_size, intermediate_size, ctx, bias=bias, act=act)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, ctx, bias=bias, reduce=reduce)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # [T, H] -> [T, H]
        return self.down_proj(self.gate_up_proj(x), residual=residual)
