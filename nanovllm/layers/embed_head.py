"""Token embedding and the head that maps hidden states back to the vocabulary, split by the vocabulary."""

from __future__ import annotations

import torch

from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.layers.linear import MergedColumnParallelLinear, Shard
from nanovllm.layers.weight_layer import WeightLayer


def vocabulary_part(vocab_size: int, tp: TPGroup) -> tuple[int, slice]:
    """Rows of every rank's matrix, and the tokens that this rank has: fewer on the last ones, where the
    vocabulary does not divide; the rows behind them are zeros."""
    rows = -(-vocab_size // tp.size)
    return rows, slice(min(tp.rank * rows, vocab_size), min((tp.rank + 1) * rows, vocab_size))


class VocabParallelEmbedding(WeightLayer):
    """Token ids [T] to vectors [T, H]."""

    weight: torch.Tensor

    def __init__(self, vocab_size: int, hidden_size: int, ctx: BuildContext) -> None:
        super().__init__()
        self._ops, self._tp, self._is_packed = ctx.ops, ctx.tp, False
        self._whole = vocab_size, hidden_size
        rows, self._tokens = vocabulary_part(vocab_size, ctx.tp)
        self._shape = rows, hidden_size
        self.add_parameter("weight", self._shape, ctx.dtype, ctx.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        first = self._tokens.start
        if self._is_packed:
            found = self._ops.embed_packed(self.weight, input_ids, first, self._shape)
        else:
            found = self._ops.embed(self.weight, input_ids, first)
        return self._tp.all_reduce(found)  # zeros from all ranks but one

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return {"weight": {None: self._whole}}

    def load_weight(self, parameter: str, tensor: torch.Tensor, shard: str | None) -> None:
        mine = tensor[self._tokens]
        self.weight[: len(mine)].copy_(mine)
        self.weight[len(mine) :].zero_()

    def take_packed(self, weight: torch.Tensor) -> None:
        """From now on read a head's packed weight: the embedding's own copy is not needed then."""
        self.weight, self._is_packed = weight, True


class ParallelLMHead(MergedColumnParallelLinear):
    """Hidden states [R, H] to logits [R, vocabulary] on rank 0, which samples; to [R, 0] on the others.

    tied: the embedding whose weight is used; nothing is loaded then.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, ctx: BuildContext, tied: VocabParallelEmbedding | None = None
    ) -> None:
        rows, tokens = vocabulary_part(vocab_size, ctx.tp)
        super().__init__(hidden_size, {None: Shard(vocab_size, slice(0, rows))}, ctx, bias=False)
        self._vocab_size, self._tokens, self._tp = vocab_size, tokens, ctx.tp
        self._tied = [tied] if tied is not None else []  # in a list: not a submodule of ours
        self._embeds_packed = ctx.ops.embeds_packed
        if tied is not None:
            self.weight = tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._tp.gather(super().forward(x), self._vocab_size, root=0)

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return {} if self._tied else super().expected_weights()

    def load_weight(self, parameter: str, tensor: torch.Tensor, shard: str | None) -> None:
        mine = tensor[self._tokens]
        self.method.load(self, mine, slice(0, len(mine)))

    def finalize_weights(self) -> None:
        super().finalize_weights()
        if self.packed and self._embeds_packed:
            for embedding in self._tied:
                embedding.take_packed(self.weight)
