"""Linear layers, split over tensor-parallel ranks by rows or by columns (Shoeybi et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.build_context import BuildContext
from nanovllm.layers.activation import activation
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.linear_method import LinearMethod, LinearWeights
from nanovllm.quantization.select import linear_method


class Shard(NamedTuple):
    """One of several projections: its rows on disk, and those of them that this rank has."""

    rows: int
    mine: slice


class MergedColumnParallelLinear(WeightLayer, LinearWeights):
    """Several projections of the same input in one matrix, each split by rows over the ranks.

    shards: in the order of the output. method: by default the context's.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        shards: dict[str | None, Shard],
        ctx: BuildContext,
        *,
        bias: bool,
        method: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        self._in_features = in_features
        self._shards = shards
        self._rows: dict[str | None, slice] = {}  # of this rank's matrix
        total = 0
        for name, shard in shards.items():
            count = shard.mine.stop - shard.mine.start
            self._rows[name] = slice(total, total + count)
            total += count
        self.method = method or linear_method(ctx)
        self.method.create(self, total, in_features, ctx.dtype, ctx.device)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (total,), ctx.hidden_dtype, ctx.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, sum of this rank's rows]
        return self.method.apply(self, x, self.bias)

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        expected: dict[str, dict[str | None, tuple[int, ...]]] = {
            "weight": {name: (shard.rows, self._in_features) for name, shard in self._shards.items()}
        }
        if self.bias is not None:
            expected["bias"] = {name: (shard.rows,) for name, shard in self._shards.items()}
        return expected

    def takes_blocks(self, parameter: str) -> bool:
        return parameter == "weight" and self.method.takes_blocks

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        rows, mine = self._rows[shard], tensor[self._shards[shard].mine]
        if parameter == "weight":
            self.method.load(self, self.method.convert(mine), rows)
        else:
            assert self.bias is not None and isinstance(mine, torch.Tensor)
            self.bias[rows].copy_(mine)

    def finalize_weights(self) -> None:
        self.method.finalize(self)


class GatedLinear(MergedColumnParallelLinear):
    """act(gate(x)) * up(x), both projections in one matrix.

    act: as config.json names it; ModelNotSupported if there is no such activation.
    """

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool, act: str) -> None:
        activation(act)
        half = Shard(out_features, ctx.tp.part(out_features, "rows of a gate"))
        super().__init__(in_features, {"gate": half, "up": half}, ctx, bias=bias)
        self.act, self.gated = act, True


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One projection, split by rows of its weight (columns of its output)."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool = False) -> None:
        rows = ctx.tp.part(out_features, "rows of a projection")
        super().__init__(in_features, {None: Shard(out_features, rows)}, ctx, bias=bias)


class ActivatedLinear(ColumnParallelLinear):
    """act(projection); act as in GatedLinear."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool, act: str) -> None:
        activation(act)
        super().__init__(in_features, out_features, ctx, bias=bias)
        self.act = act


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections, split by heads. Where there are fewer key/value heads than ranks,
    neighbouring ranks have the same one.

    num_heads, num_kv_heads: of this rank.
    """

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
        heads = ctx.tp.part(num_heads, "query heads")
        kv_heads = ctx.tp.part_or_copy(num_kv_heads, "key/value heads")
        queries, keys = _of_heads(num_heads, heads, head_dim), _of_heads(num_kv_heads, kv_heads, head_dim)
        super().__init__(hidden_size, {"q": queries, "k": keys, "v": keys}, ctx, bias=bias)
        self.num_heads, self.num_kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start


def _of_heads(total: int, mine: slice, size: int) -> Shard:
    return Shard(total * size, slice(mine.start * size, mine.stop * size))


class RowParallelLinear(WeightLayer, LinearWeights):
    """A projection of what the ranks hold in parts, split by columns of its weight.

    reduce: False gives what this rank adds to the result, for a caller who sums several of these and then over
    the ranks. The bias is on rank 0.

    forward(residual=): what the result is added to, the same [T, out] on all ranks; where not reduced, this rank's.
        Its memory may become the result's.
    """

    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool = False, reduce: bool = True
    ) -> None:
        super().__init__()
        self._whole = out_features, in_features
        self._tp, self._reduce = ctx.tp, reduce
        self.method = linear_method(ctx)
        self._columns = self._columns_of_mine(self.method.group)
        self.method.create(self, out_features, in_features // ctx.tp.size, ctx.dtype, ctx.device)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (out_features,), ctx.hidden_dtype, ctx.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        # x: [T, this rank's columns] -> [T, out]
        first = self._tp.rank == 0
        part = self.method.apply(self, x, self.bias if first else None, residual if first or not self._reduce else None)
        return self._tp.all_reduce(part) if self._reduce else part

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return {**super().expected_weights(), "weight": {None: self._whole}}

    def takes_blocks(self, parameter: str) -> bool:
        return parameter == "weight" and self.method.takes_blocks

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        if parameter != "weight":
            super().load_weight(parameter, tensor, shard)
            return
        whole = self.method.convert(tensor)  # before it is cut: a scale may be of a whole row
        if isinstance(whole, Blocks):
            mine: torch.Tensor | Blocks = whole.columns(self._columns_of_mine(whole.group))
        else:
            mine = whole[:, self._columns]
        self.method.load(self, mine, slice(0, len(mine)))

    def _columns_of_mine(self, group: int) -> slice:
        """ConfigError where ranks would part a group of columns."""
        return self._tp.part(self._whole[1], "columns of a projection", group)

    def finalize_weights(self) -> None:
        self.method.finalize(self)
