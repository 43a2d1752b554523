"""Token embedding and the head that maps hidden states back to the vocabulary, split by the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanovllm.build_context import BuildContext
from nanovllm.distributed.group import TPGroup
from nanovllm.layers.linear import MergedColumnParallelLinear, Shard
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.select import head_method


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
        self._ops, self._tp = ctx.ops, ctx.tp
        self._head: list[ParallelLMHead] = []  # in a list: not a submodule of ours
        self._convert: Callable[[torch.Tensor | Blocks], torch.Tensor | Blocks] | None = None
        self._whole = vocab_size, hidden_size
        rows, self._tokens = vocabulary_part(vocab_size, ctx.tp)
        self._shape = rows, hidden_size
        self.add_parameter("weight", self._shape, ctx.dtype, ctx.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        first = self._tokens.start
        mine = self._head[0].embed(input_ids, first) if self._head else self._ops.embed(self.weight, input_ids, first)
        return self._tp.all_reduce(mine)  # zeros from all ranks but one

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return {"weight": {None: self._whole}}

    def takes_blocks(self, parameter: str) -> bool:
        return any(head.takes_blocks(parameter) for head in self._head)

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        if self._head:
            self._head[0].load_weight(parameter, tensor, shard)
            return
        mine = tensor[self._tokens] if self._convert is None else self._convert(tensor[self._tokens])
        assert isinstance(mine, torch.Tensor)
        self.weight[: len(mine)].copy_(mine)
        self.weight[len(mine) :].zero_()

    def tie(self, head: ParallelLMHead, *, reads: bool) -> None:
        """The head has the same weight. reads: it is loaded there, and rows are read from there; else the head's
        method says what becomes of it."""
        if reads:
            self._head = [head]
            del self.weight
        else:
            self._convert = head.method.convert


class ParallelLMHead(MergedColumnParallelLinear):
    """Hidden states [R, H] to logits [R, vocabulary] on rank 0, which samples; to [R, 0] on the others.

    tied: the embedding that has the same weight; it is on disk once. Where packed weights can be read by row, as those
    that are quantised, it is the head's; else the embedding's, of which the head packs its own copy.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, ctx: BuildContext, tied: VocabParallelEmbedding | None = None
    ) -> None:
        rows, tokens = vocabulary_part(vocab_size, ctx.tp)
        shards: dict[str | None, Shard] = {None: Shard(vocab_size, slice(0, rows))}
        super().__init__(hidden_size, shards, ctx, bias=False, method=head_method(ctx))
        self._vocab_size, self._tokens, self._tp = vocab_size, tokens, ctx.tp
        self._is_tied = tied is not None
        if tied is not None:
            if not self.method.embeds:
                self.weight = tied.weight
            tied.tie(self, reads=self.method.embeds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._tp.gather(super().forward(x), self._vocab_size, root=0)

    def embed(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Rows of the weight; see LinearMethod."""
        return self.method.embed(self, ids, first)

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return {} if self._is_tied else super().expected_weights()

    def load_weight(self, parameter: str, tensor: torch.Tensor | Blocks, shard: str | None) -> None:
        mine = tensor[self._tokens]
        self.method.load(self, self.method.convert(mine), slice(0, len(mine)))
