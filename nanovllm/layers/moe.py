"""A sparse mixture of experts (Shazeer et al. 2017; Mixtral: Jiang et al. 2024)."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.linear_method import LinearWeights, Stack, UnquantizedLinearMethod


class SparseMoE(nn.Module):
    """Each token goes to `top_k` of the experts; their outputs are summed by the routing's weights.

    `gate` scores the experts, `experts.E` are gated MLPs: rules map other names on disk to these.
    A token's result does not depend on the other tokens of the batch.

    normalise: whether a token's weights sum to one. They are the softmax over the chosen scores then
    (Granite), which is the softmax over all, cut and divided by its sum (Mixtral); else it is not divided.
    reduce: as in RowParallelLinear. Ranks share each expert, or with the context's expert_parallel have whole ones
    each; either way they sum once a token, not once an expert.
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
        self._mine = ctx.tp.uneven_part(num_experts, "experts") if ctx.expert_parallel else slice(0, num_experts)
        inside = dataclasses.replace(ctx, tp=TPGroup()) if ctx.expert_parallel else ctx
        elsewhere = dataclasses.replace(inside, device=torch.device("meta"))

        experts = [
            GatedMLP(hidden_size, intermediate_size, inside if here else elsewhere, act=act, reduce=False)
            for here in (self._mine.start <= number < self._mine.stop for number in range(num_experts))
        ]
        mine = experts[self._mine]
        self.experts = nn.ModuleList(e if e in mine else ExpertElsewhere(e) for e in experts)
        self._top_k = top_k
        self._normalise = normalise
        self._inner, self._act = intermediate_size // inside.tp.size, act
        self._tp, self._reduce = ctx.tp, reduce
        self._ops = ctx.ops
        self._stacks = _stack(mine) if ctx.ops.fuses(act) else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # [T, H] -> [T, H]
        weights, chosen = self._ops.route(self.gate(x), self._top_k, normalise=self._normalise)
        if self._stacks is not None:
            gate_up, down = (stack.weight for stack in self._stacks)
            out = self._ops.mixture(x, weights, chosen, gate_up, down, self._inner, self._act, self._mine.start)
        else:
            out = self._one_by_one(x, weights, chosen.flatten())
        out = self._tp.all_reduce(out) if self._reduce else out
        return out if residual is None else residual + out

    def _one_by_one(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        by_expert = chosen.argsort(stable=True)  # chosen: [T * k], a token's choices side by side
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        out = x.new_zeros(len(chosen), x.shape[1])  # where the expert is on another rank
        begin = sum(counts[: self._mine.start])
        for expert, count in zip(self.experts[self._mine], counts[self._mine], strict=True):
            pairs = by_expert[begin : begin + count]
            if count:
                out[pairs] = expert(x[pairs // self._top_k])
            begin += count
        weighted = out.view(len(x), self._top_k, -1) * weights[..., None]  # fp32 [T, k, H]
        # not sum(): its order depends on the shape; this one is by rank
        return functools.reduce(torch.add, weighted.unbind(1)).to(x.dtype)


class ExpertElsewhere(nn.Module):
    """In the place of an expert that another rank has: its tensors are known, and left where they are."""

    def __init__(self, expert: GatedMLP) -> None:
        super().__init__()
        self.gate_up_proj = _LayerElsewhere(expert.gate_up_proj)
        self.down_proj = _LayerElsewhere(expert.down_proj)


class _LayerElsewhere(WeightLayer):
    def __init__(self, layer: WeightLayer) -> None:
        super().__init__()
        self._expected = layer.expected_weights()

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return self._expected

    def takes_blocks(self, parameter: str) -> bool:
        return True

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        pass


def _stack(experts: list[GatedMLP]) -> tuple[Stack, Stack]:
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
