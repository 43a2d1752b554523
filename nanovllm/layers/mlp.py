"""The gated MLP of the Llama line."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.layers.activation import activation
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), gate and up in one matrix."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, ctx: BuildContext, *, bias: bool = False, act: str = "silu"
    ) -> None:
        super().__init__()
        shards: dict[str | None, int] = {"gate": intermediate_size, "up": intermediate_size}
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, shards, ctx, bias=bias)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, ctx, bias=bias)
        self._act = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, H] -> [T, H]
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self._act(gate) * up)
