"""What the engine expects of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported, NanoVLLMError
from nanovllm.weights.loader import fill_dummy_weights, load_weights
from nanovllm.weights.rules import Rule

if TYPE_CHECKING:
    from nanovllm.weights.checkpoint import Checkpoint


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

    row_by_row: whether a token's bits depend on the others through its layers alone, for `batch_invariant`.
    """

    row_by_row: ClassVar[bool] = True
    config_class: ClassVar[type[ModelConfig]]
    weight_rules: Sequence[Rule]
    model: nn.Module
    lm_head: nn.Module

    def __init__(self, config: Any, ctx: BuildContext) -> None:
        super().__init__()

    @classmethod
    def read_config(cls, config: dict[str, Any]) -> ModelConfig:
        """`config_class.from_hf`, with ModelNotSupported for whatever is wrong with config.json."""
        try:
            return cls.config_class.from_hf(config)
        except NanoVLLMError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelNotSupported(f"config.json: a value makes no {cls.__name__}: {error!r}") from error

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, H] after the last norm."""
        return self.model(batch)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] -> fp32 [R, vocabulary] on rank 0, [R, 0] on others."""
        return self.lm_head(hidden).float()

    def load(self, checkpoint: Checkpoint) -> None:
        """Fill every parameter from the files, or raise WeightError."""
        load_weights(self, checkpoint.tensors(), self.weight_rules)

    def load_dummy(self, seed: int) -> None:
        """Fill every parameter with seeded random numbers."""
        fill_dummy_weights(self, seed)
