"""A sparse mixture of experts (Shazeer et al. 2017; Mixtral: Jiang et al. 2024)."""

from __future__ import annotations

import functools

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.linear_method import LinearWeights, UnquantizedLinearMethod


class SparseMoE(nn.Module):
    """Each token goes to `top_k` of the experts; their outputs are summed by the routing's weights.

    `gate` scores the experts, `experts.E` are gated MLPs: rules map other names on disk to these.
    A token's result does not depend on the other tokens of the batch.

    normalise: whether a token's weights sum to one. They are the softmax over the chosen scores then
    (Granite), which is the softmax over all, cut and divided by its sum (Mixtral); else it is not divided.
    reduce: as in RowParallelLinear. Ranks share each expert, and sum once a token, not once an expert.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        ctx: BuildContext,
        *,
        normalise: bool,
        act: str = "silu",
        reduce: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < top_k <= num_experts:
            raise ModelNotSupported(f"config.json: {top_k} experts a token of {num_experts} experts")
        self.gate = Router(hidden_size, num_experts, ctx)
        experts = [GatedMLP(hidden_size, intermediate_size, ctx, act=act, reduce=False) for _ in range(num_experts)]
        self.experts = nn.ModuleList(experts)
        self._top_k = top_k
        self._normalise = normalise
        self._inner, self._act = intermediate_size // ctx.tp.size, act
        self._tp, self._reduce = ctx.tp, reduce
        self._ops = ctx.ops
        self._weights = _stack(experts) if ctx.ops.fuses(act) else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # [T, H] -> [T, H]
        weights, chosen = self._ops.route(self.gate(x), self._top_k, normalise=self._normalise)
        if self._weights is not None:
            out = self._ops.mixture(x, weights, chosen, *self._weights, self._inner, self._act)
        else:
            out = self._one_by_one(x, weights, chosen.flatten())
        out = self._tp.all_reduce(out) if self._reduce else out
        return out if residual is None else residual + out

    def _one_by_one(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        by_expert = chosen.argsort(stable=True)  # chosen: [T * k], a token's choices side by side
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        active = [e for e, count in enumerate(counts) if count]
        parts = x[by_expert // self._top_k].split([counts[e] for e in active])
        out = x.new_empty(len(chosen), x.shape[1])
        out[by_expert] = torch.cat([self.experts[e](part) for e, part in zip(active, parts, strict=True)])
        weighted = out.view(len(x), self._top_k, -1) * weights[..., None]  # fp32 [T, k, H]
        # not sum(): its order depends on the shape; this one is by rank
        return functools.reduce(torch.add, weighted.unbind(1)).to(x.dtype)


def _stack(experts: list[GatedMLP]) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, down = [e.gate_up_proj for e in experts], [e.down_proj for e in experts]
    return gate_up[0].method.stack(gate_up), down[0].method.stack(down)


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
