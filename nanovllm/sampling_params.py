"""What a request asks of the sampler. Names and defaults are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanovllm.errors import RequestError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request; immutable and validated (`RequestError`) on construction.

    n: completions of the prompt; they share the prompt's pages.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of tokens whose mass reaches top_p (nucleus sampling,
        Holtzman et al. 2019).
    min_p: drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024).
    typical_p: keep the locally typical set of this mass (Meister et al. 2022); 1 keeps all.
        Tokens that tie at a cut stay in, so the kept set never depends on how ties were sorted.
    repetition_penalty: > 1 discourages tokens of prompt and output (Keskar et al. 2019).
    presence_penalty, frequency_penalty: OpenAI's, over the output alone; in [-2, 2].
    seed: the request's own random stream: the same text whatever else is in the batch.
    stop: strings that end the text; cut off unless include_stop_str_in_output.
    stop_token_ids: tokens that end the text, beside the model's end-of-sequence tokens.
    min_tokens: neither end-of-sequence nor stop tokens nor stop strings before this many.
    max_tokens: None runs to max_model_len.
    ignore_eos: do not end the text at the model's end-of-sequence tokens.
    logprobs: None, or the number of likeliest tokens to report a token (-1: the vocabulary);
        the sampled one is always among them. Taken before penalties and temperature.
    prompt_logprobs: the same for the prompt's tokens.
    logit_bias: {token id: bias}, clamped to [-100, 100].
    allowed_token_ids: sample only these.
    bad_words: words that are never completed.
    detokenize: False leaves `text` empty.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._normalise()
        self._check_ranges()
        self._check_stops()

    def _normalise(self) -> None:
        """Turn every collection into an immutable one, and vLLM's spellings into one."""
        put = object.__setattr__  # the dataclass is frozen; this is its construction
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        put(self, "stop", _tuple_of("stop", stop, str))
        put(self, "stop_token_ids", _tuple_of("stop_token_ids", self.stop_token_ids or (), int))
        put(self, "bad_words", _tuple_of("bad_words", self.bad_words or (), str))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _tuple_of("allowed_token_ids", self.allowed_token_ids, int))
        if self.top_k == -1:
            put(self, "top_k", 0)
        if self.logit_bias is not None:
            put(self, "logit_bias", _clamped_bias(self.logit_bias))

    def _check_ranges(self) -> None:
        _require_int("n", self.n, 1)
        _require_int("top_k", self.top_k, 0, note=" (0 or -1 keeps all tokens)")
        _require_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), -1, note=" (-1 is the whole vocabulary)")
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63))
            if self.seed >= 2**64:
                raise RequestError(f"seed={self.seed} does not fit in 64 bits")
        _require_float("temperature", self.temperature, 0.0, math.inf)
        _require_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_float("min_p", self.min_p, 0.0, 1.0)
        _require_float("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _require_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _require_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_stops(self) -> None:
        assert isinstance(self.stop, tuple) and self.bad_words is not None
        if any(not s for s in self.stop):
            raise RequestError("stop holds an empty string; remove it")
        if any(not w.strip() for w in self.bad_words):
            raise RequestError("bad_words holds an empty word; remove it")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text: set detokenize=True or use stop_token_ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: no token could be sampled")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _tuple_of(name: str, values: Iterable, kind: type) -> tuple:
    if isinstance(values, str):
        raise RequestError(f"{name} must be a list, not a string: write {name}=[{values!r}]")
    if not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list, got {values!r}")
    values = tuple(values)
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RequestError(f"{name} must hold {kind.__name__}s, got {value!r}")
    return values


def _clamped_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {bias!r}")
    clamped = {}
    for key, value in bias.items():
        try:  # the OpenAI API spells token ids as strings
            token_id, number = int(str(key)), float(value)
        except (TypeError, ValueError):
            raise RequestError(f"logit_bias must map token ids to numbers, got {key!r}: {value!r}") from None
        if math.isnan(number):
            raise RequestError(f"logit_bias of token {token_id} is not a number")
        clamped[token_id] = min(100.0, max(-100.0, number))
    return clamped


def _require_int(name: str, value: object, low: int, note: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise RequestError(f"{name} must be an integer of at least {low}{note}, got {value!r}")


def _require_float(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low <= value <= high) or value == math.inf or (open_low and value == low):  # type: ignore[operator]
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be a number in {bracket}{low}, {high}], got {value!r}")
