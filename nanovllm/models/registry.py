"""Which class runs which architecture."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from nanovllm.errors import ModelNotSupported
from nanovllm.models.base import CausalLM

_MODELS = {
    "LlamaForCausalLM": "nanovllm.models.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3:Qwen3ForCausalLM",
}


def model_class(architectures: Sequence[str]) -> type[CausalLM]:
    """The class for config.json's `architectures`, imported now; ModelNotSupported lists what exists."""
    for name in architectures:
        if name in _MODELS:
            module, _, cls = _MODELS[name].partition(":")
            return getattr(importlib.import_module(module), cls)
    raise ModelNotSupported(
        f"architecture {', '.join(architectures) or '(none named in config.json)'} is not supported; "
        f"supported: {', '.join(_MODELS)}"
    )
