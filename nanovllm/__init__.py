"""nanovllm: a small, exact LLM inference engine."""

from nanovllm.errors import (
    ConfigError,
    EngineClosed,
    ModelNotFound,
    ModelNotSupported,
    NanoVLLMError,
    RequestError,
    WeightError,
)
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams

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
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "WeightError",
]
