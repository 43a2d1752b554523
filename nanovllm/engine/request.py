"""Request: one prompt with its parameters, checked and tokenised, before the queue."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TypedDict

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import RequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer.tokenizer import Tokenizer


class PromptDict(TypedDict, total=False):
    """A prompt with options: exactly one of prompt and prompt_token_ids.

    cache_salt: only prompts with the same salt share cached prefixes.
    """

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str


Prompt = str | list[int] | PromptDict


@dataclass(frozen=True, slots=True)
class Request:
    """What `RequestPreparer` made of a prompt; `sequences` are its n completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[Sequence]
    arrival_time: float = field(default_factory=time.monotonic)

    def with_text(self, prompt: str) -> Request:
        """The same request, whose prompt tokens were made from this text by the caller."""
        return dataclasses.replace(self, prompt=prompt)


class RequestPreparer:
    """Turns prompts into requests or refuses them with RequestError; knows the model's limits.

    eos_ids: the model's end-of-sequence tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, *, vocab_size: int, max_model_len: int, eos_ids: Tokens[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        # a checkpoint may name an end that its vocabulary has not, which nothing can sample and no row can forbid
        self._eos_ids = tuple(token for token in eos_ids if 0 <= token < vocab_size)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        first_seq_id: int,
        seed: int,
        priority: int = 0,
    ) -> Request:
        """seed: for the random stream if params has none."""
        text, token_ids, salt = self._read_prompt(prompt)
        self._check_length(token_ids)
        self._check_token_ids("prompt", token_ids)
        self._check_params(params)
        seed = params.seed if params.seed is not None else seed
        stop_ids = (*(() if params.ignore_eos else self._eos_ids), *(params.stop_token_ids or ()))
        sequences: list[Sequence] = []
        for index in range(params.n):
            sequences.append(
                Sequence(
                    first_seq_id + index,
                    token_ids,
                    # the leader alone reports the prompt's logprobs
                    params if index == 0 else dataclasses.replace(params, prompt_logprobs=None),
                    request_id=request_id,
                    index=index,
                    seed=seed + index,
                    priority=priority,
                    cache_salt=salt,
                    stop_ids=stop_ids,
                    bad_words=self._bad_words(params),
                    leader=sequences[0] if sequences else None,
                    max_model_len=self._max_model_len,
                )
            )
        return Request(request_id, text, token_ids, params, sequences)

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        salt = None
        if isinstance(prompt, dict):
            unknown = set(prompt) - set(PromptDict.__annotations__)
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise RequestError(
                    "a prompt dict holds either 'prompt' or 'prompt_token_ids', and optionally 'cache_salt'; "
                    f"got {', '.join(map(repr, prompt)) or 'nothing'}"
                )
            salt = prompt.get("cache_salt")
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError("this engine has no tokenizer (skip_tokenizer_init=True): pass token ids")
            return prompt, self._tokenizer.encode(prompt), salt
        if not isinstance(prompt, (list, tuple)):
            raise RequestError(f"a prompt is a string, a list of token ids or a dict, got {type(prompt).__name__}")
        return None, list(prompt), salt

    def _check_length(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty: at least one token is needed")
        if len(token_ids) >= self._max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and max_model_len={self._max_model_len} must also hold "
                "at least one new token; shorten the prompt or raise max_model_len (and the cache memory)"
            )

    def _check_token_ids(self, what: str, token_ids: Tokens[int]) -> None:
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise RequestError(f"{what}: token ids are integers, got {token_id!r}")
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(f"{what}: token id {token_id} is outside the vocabulary of {self._vocab_size}")

    def _check_params(self, params: SamplingParams) -> None:
        self._check_token_ids("logit_bias", list(params.logit_bias or ()))
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_token_ids("stop_token_ids", params.stop_token_ids or ())
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > self._vocab_size:
                raise RequestError(f"{name}={count} exceeds the vocabulary of {self._vocab_size}; use -1 for all")
        if self._tokenizer is None and (params.stop_strings or params.bad_words):
            raise RequestError("stop and bad_words are strings, and this engine has no tokenizer; use stop_token_ids")

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each word, at the start of a text and after a space."""
        if not params.bad_words or self._tokenizer is None:
            return ()
        spellings = (space + word.lstrip() for word in params.bad_words for space in ("", " "))
        encoded = (tuple(self._tokenizer.encode(s, add_special_tokens=False)) for s in spellings)
        return tuple(dict.fromkeys(ids for ids in encoded if ids))
