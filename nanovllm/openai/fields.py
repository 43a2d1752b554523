"""Reading the body of a request, so that no field of it is overlooked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from nanovllm.openai.errors import APIError

T = TypeVar("T")

# those that SamplingParams knows by the same name, and checks
_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "stop", "stop_token_ids", "bad_words"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "max_tokens", "prompt_logprobs"),
    *("logit_bias", "allowed_token_ids"),
)
_SAMPLING_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
# fields that ask for nothing if they hold one of these values; None stands for any value
_NEUTRAL: dict[str, Collection[Any] | None] = {
    "user": None,
    "metadata": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "service_tier": None,
    "parallel_tool_calls": None,
    "store": (False,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "priority": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "continue_final_message": (False,),
    "spaces_between_special_tokens": (True,),
}
_WORDS = {str: "a string", bool: "true or false", int: "an integer", list: "a list", dict: "an object"}


class Fields:
    """Fields are taken one by one, null being as good as none; `end` refuses those that nobody took."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = dict(body)

    def take(self, name: str, kind: type[T]) -> T | None:
        """The value, or None; APIError if it is of another type."""
        value = self._left.pop(name, None)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise APIError(f"{name} must be {_WORDS[kind]}, got {type(value).__name__}", name)
        return value

    def sampling(self) -> dict[str, Any]:
        """Arguments for SamplingParams, as far as they are given under its names."""
        given = {name: self._left.pop(name, None) for name in _SAMPLING}
        given |= {name: self.take(name, bool) for name in _SAMPLING_FLAGS}
        return {name: value for name, value in given.items() if value is not None}

    def end(self) -> None:
        for name, value in self._left.items():
            if name not in _NEUTRAL:
                raise APIError(f"{name} is not a field that is known here", name, code="unknown_parameter")
            neutral = _NEUTRAL[name]
            if value is not None and neutral is not None and value not in neutral:
                raise APIError(f"{name}={value!r} is not supported; leave it out", name, code="unsupported_value")
