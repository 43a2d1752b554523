"""Family: what llama.cpp's converter does to one family of models.

Its rules are in convert_hf_to_gguf.py (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from nanovllm.weights.gguf.config import Config, GGUFKeys

Undo = Callable[[torch.Tensor, Config], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """config: from the metadata to Hugging Face's config.
    names: {GGUF's module: Hugging Face's}; {e} stands for the expert that a slice belongs to.
    layer: Hugging Face's name of layer {}.
    joined: {module: the one that follows it in the same tensor of Hugging Face's}, along dim -2.
    undo: {module: from GGUF's values to Hugging Face's}, for weights and biases; shapes follow.
    """

    config: Callable[[GGUFKeys], Config]
    names: Mapping[str, str]
    layer: str = "model.layers.{}"
    joined: Mapping[str, str] = field(default_factory=dict)
    undo: Mapping[str, Undo] = field(default_factory=dict)
