"""What the engine expects of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.weights.rules import Rule


class ModelConfig(Protocol):
    """The sizes that the engine reads; a family's dataclass has many more."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read config.json, of either generation; ModelNotSupported for variants not built."""
        ...


class CausalLM(nn.Module):
    """Base of every model: `config_class` reads its sizes, `weight_rules` map its tensors.

    Most models are a `model` that gives hidden states and an `lm_head`, and need no more than that.
    """

    config_class: ClassVar[type[ModelConfig]]
    weight_rules: Sequence[Rule]
    model: nn.Module
    lm_head: nn.Module

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, H] after the last norm."""
        return self.model(batch)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] -> fp32 [R, vocabulary]."""
        return self.lm_head(hidden).float()
