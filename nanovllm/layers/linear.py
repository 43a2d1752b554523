"""Linear layers, split over tensor-parallel ranks by rows or by columns (Shoeybi et al. 2019)."""

from __future__ import annotations

import torch

from nanovllm.build_context import BuildContext
from nanovllm.layers.activation import activation
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.linear_method import LinearWeights, UnquantizedLinearMethod


class MergedColumnParallelLinear(WeightLayer, LinearWeights):
    """Several projections of the same input in one matrix, each split by rows over the ranks.

    shards: {name: rows of the whole projection}, in the order of the output.
    """

    bias: torch.Tensor | None

    def __init__(self, in_features: int, shards: dict[str | None, int], ctx: BuildContext, *, bias: bool) -> None:
        super().__init__()
        self._in_features = in_features
        self._whole = shards
        self._tp = ctx.tp
        self._rows: dict[str | None, slice] = {}  # of this rank's matrix
        total = 0
        for name, rows in shards.items():
            mine = ctx.tp.shard(rows, f"linear shard {name}")
            self._rows[name] = slice(total, total + mine)
            total += mine
        self.method = UnquantizedLinearMethod(ctx.ops)
        self.method.create(self, total, in_features, ctx.dtype, ctx.device)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (total,), ctx.hidden_dtype, ctx.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, sum of this rank's rows]
        return self.method.apply(self, x, self.bias)

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        expected: dict[str, dict[str | None, tuple[int, ...]]] = {
            "weight": {name: (rows, self._in_features) for name, rows in self._whole.items()}
        }
        if self.bias is not None:
            expected["bias"] = {name: (rows,) for name, rows in self._whole.items()}
        return expected

    def load_weight(self, parameter: str, tensor: torch.Tensor, shard: str | None) -> None:
        rows = self._rows[shard]
        mine = tensor.chunk(self._tp.size)[self._tp.rank]
        if parameter == "weight":
            self.method.load(self, mine, rows)
        else:
            assert self.bias is not None
            self.bias[rows].copy_(mine)

    def finalize_weights(self) -> None:
        self.method.finalize(self)


class GatedLinear(MergedColumnParallelLinear):
    """act(gate(x)) * up(x), both projections in one matrix.

    act: as config.json names it; ModelNotSupported if there is no such activation.
    """

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool, act: str) -> None:
        activation(act)
        super().__init__(in_features, {"gate": out_features, "up": out_features}, ctx, bias=bias)
        self.act, self.gated = act, True


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One projection, split by rows of its weight (columns of its output)."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool = False) -> None:
        super().__init__(in_features, {None: out_features}, ctx, bias=bias)


class ActivatedLinear(ColumnParallelLinear):
    """act(projection); act as in GatedLinear."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool, act: str) -> None:
        activation(act)
        super().__init__(in_features, out_features, ctx, bias=bias)
        self.act = act


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections, split by heads."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        ctx: BuildContext,
        *,
        bias: bool = False,
    ) -> None:
        ctx.tp.shard(num_heads, "query heads")
        ctx.tp.shard(num_kv_heads, "key/value heads")
        shards: dict[str | None, int] = {
            "q": num_heads * head_dim,
            "k": num_kv_heads * head_dim,
            "v": num_kv_heads * head_dim,
        }
        super().__init__(hidden_size, shards, ctx, bias=bias)


class RowParallelLinear(ColumnParallelLinear):
    """A projection of what the ranks hold in parts, split by columns of its weight.

    With one rank there is nothing to sum, and it is a plain linear layer.
    """

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool = False) -> None:
        assert ctx.tp.size == 1, "the configuration admits one rank"
        super().__init__(in_features, out_features, ctx, bias=bias)
