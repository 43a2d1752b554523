"""Token embedding and the head that maps hidden states back to the vocabulary."""

from __future__ import annotations

import torch

from nanovllm.build_context import BuildContext
from nanovllm.layers.linear import ColumnParallelLinear
from nanovllm.layers.weight_layer import WeightLayer


class VocabParallelEmbedding(WeightLayer):
    """Token ids [T] to vectors [T, H]."""

    weight: torch.Tensor

    def __init__(self, vocab_size: int, hidden_size: int, ctx: BuildContext) -> None:
        super().__init__()
        assert ctx.tp.size == 1, "the configuration admits one rank"
        self._ops, self._hidden_size, self._is_packed = ctx.ops, hidden_size, False
        self.add_parameter("weight", (vocab_size, hidden_size), ctx.dtype, ctx.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            return self._ops.gather_packed(self.weight, input_ids, self._hidden_size)
        return self._ops.gather(self.weight, input_ids)

    def take_packed(self, weight: torch.Tensor) -> None:
        """From now on read a head's packed weight: the embedding's own copy is not needed then."""
        self.weight, self._is_packed = weight, True


class ParallelLMHead(ColumnParallelLinear):
    """Hidden states [R, H] to logits [R, vocabulary].

    tied: the embedding whose weight is used; nothing is loaded then.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, ctx: BuildContext, tied: VocabParallelEmbedding | None = None
    ) -> None:
        super().__init__(hidden_size, vocab_size, ctx)
        self._tied = [tied] if tied is not None else []  # in a list: not a submodule of ours
        self._gathers_packed = ctx.ops.gathers_packed
        if tied is not None:
            self.weight = tied.weight

    def expected_weights(self) -> dict[str, dict[str | None, tuple[int, ...]]]:
        return {} if self._tied else super().expected_weights()

    def finalize_weights(self) -> None:
        super().finalize_weights()
        if self.packed and self._gathers_packed:
            for embedding in self._tied:
                embedding.take_packed(self.weight)
