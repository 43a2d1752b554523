"""The prompts of `nanovllm parity` and `nanovllm verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.build import find_model
from nanovllm.errors import ConfigError
from nanovllm.models.base import ModelConfig
from nanovllm.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Prompt:
    label: str
    token_ids: list[int]


def text_prompts(checkpoint: Checkpoint, texts: Sequence[str]) -> list[Prompt]:
    """ModelNotFound if the model has no tokenizer."""
    tokenizer = checkpoint.load_tokenizer()
    return [Prompt(repr(text), tokenizer.encode(text)) for text in texts]


def random_prompts(vocab_size: int, lengths: Sequence[int]) -> list[Prompt]:
    """The same token ids every time."""
    random = np.random.default_rng(5)
    return [Prompt(f"{n} random tokens", random.integers(2, vocab_size, n).tolist()) for n in lengths]


def longest(prompts: Sequence[Prompt]) -> int:
    """Index of the longest."""
    return max(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))


def sizes_with_room(config: EngineConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The model's sizes; ConfigError, before anything is loaded, if max_model_len is beyond its positions."""
    _, sizes = find_model(config, checkpoint)
    positions = sizes.max_position_embeddings
    assert config.max_model_len is not None
    if config.max_model_len > positions:
        raise ConfigError(
            f"the longest prompt with its text takes {config.max_model_len} tokens of {positions} positions; "
            "lower --max-tokens or give shorter prompts"
        )
    return sizes
