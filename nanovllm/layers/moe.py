"""A sparse mixture of experts (Shazeer et al. 2017; Mixtral: Jiang et al. 2024)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.linear_method import LinearWeights, UnquantizedLinearMethod

Routing = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(fp32 scores [T, E], k) -> a token's weights and experts, fp32 and int64 [T, k], best first."""


def softmax_top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the softmax over all experts: weights sum to less than one."""
    weights, experts = scores.softmax(dim=-1).topk(k, dim=-1)
    return weights, experts


def softmax_top_k_renormalised(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, divided by their sum (Mixtral)."""
    weights, experts = softmax_top_k(scores, k)
    return weights / weights.sum(dim=-1, keepdim=True), experts


def top_k_softmax(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over the k largest scores (Granite)."""
    scores, experts = scores.topk(k, dim=-1)
    return scores.softmax(dim=-1), experts


class SparseMoE(nn.Module):
    """Each token goes to `top_k` of the experts; their outputs are summed by the routing's weights.

    `gate` scores the experts, `experts.E` are gated MLPs: rules map other names on disk to these.
    A token's result does not depend on the other tokens of the batch.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        ctx: BuildContext,
        *,
        routing: Routing,
        act: str = "silu",
    ) -> None:
        super().__init__()
        if not 0 < top_k <= num_experts:
            raise ModelNotSupported(f"config.json: {top_k} experts a token of {num_experts} experts")
        self.gate = Router(hidden_size, num_experts, ctx)
        self.experts = nn.ModuleList(GatedMLP(hidden_size, intermediate_size, ctx, act=act) for _ in range(num_experts))
        self._top_k = top_k
        self._routing = routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, H] -> [T, H]
        weights, chosen = self._routing(self.gate(x), self._top_k)
        chosen = chosen.flatten()  # [T * k], a token's choices side by side
        by_expert = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        active = [e for e, count in enumerate(counts) if count]
        parts = x[by_expert // self._top_k].split([counts[e] for e in active])
        out = x.new_empty(len(chosen), x.shape[1])
        out[by_expert] = torch.cat([self.experts[e](part) for e, part in zip(active, parts, strict=True)])
        weighted = out.view(len(x), self._top_k, -1) * weights[..., None]  # fp32 [T, k, H]
        # not sum(): its order depends on the shape; this one is by rank
        return functools.reduce(torch.add, weighted.unbind(1)).to(x.dtype)


class Router(WeightLayer, LinearWeights):
    """Scores of the experts, fp32 [T, E]. Whole on every rank and never quantised: it is small,
    and an error in it sends tokens elsewhere."""

    def __init__(self, hidden_size: int, num_experts: int, ctx: BuildContext) -> None:
        super().__init__()
        self.method = UnquantizedLinearMethod(ctx.ops)
        self.method.create(self, num_experts, hidden_size, ctx.dtype, ctx.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self, x, None).float()

    def finalize_weights(self) -> None:
        self.method.finalize(self)
