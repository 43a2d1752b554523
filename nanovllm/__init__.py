"""nanovllm: a small, exact LLM inference engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm.errors import (
    ConfigError,
    EngineClosed,
    ModelNotFound,
    ModelNotSupported,
    NanoVLLMError,
    PeerLost,
    RanksDiffer,
    RequestError,
    WeightError,
    WorkerDied,
)
from nanovllm.models.registry import register_model
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineClosed",
    "Logprob",
    "ModelNotFound",
    "ModelNotSupported",
    "NanoVLLMError",
    "PeerLost",
    "RanksDiffer",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "WeightError",
    "WorkerDied",
    "register_model",
]


def __getattr__(name: str) -> Any:
    """LLM brings torch, which takes over a second to import: not for `nanovllm --help`."""
    if name == "LLM":
        from nanovllm.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
