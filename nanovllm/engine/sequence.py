"""Sequence: one completion of one prompt, as the scheduler sees it."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Tokens

import numpy as np

from nanovllm.engine.step import PlannedSequence
from nanovllm.sample_row import PENDING, SampleRow
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Owns its tokens and says how far they are computed; its pages belong to the CacheManager.

    tokens:   |---- prompt ----|---- output ----|- pending -|
              0 <= num_cached <= num_computed <= num_tokens
    Tokens before num_computed have their keys and values in pages (or in a state), or will have them once
    the planned steps are done; the last token is always one that still has to be computed while the
    sequence runs. Pending tokens are those that planned steps will sample: they count, and are not known.
    """

    def __init__(
        self,
        seq_id: int,
        prompt: Tokens[int],
        params: SamplingParams,
        *,
        request_id: str = "",
        index: int = 0,
        seed: int = 0,
        priority: int = 0,
        cache_salt: str | None = None,
        stop_ids: tuple[int, ...] = (),
        bad_words: tuple[tuple[int, ...], ...] = (),
        leader: Sequence | None = None,
        max_model_len: int,
    ) -> None:
        self.seq_id = seq_id  # also the order of arrival
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.priority = priority
        self.cache_salt = cache_salt
        self.stop_ids = stop_ids
        self.leader = leader  # the sibling that computes the shared prompt first
        self.status = SequenceStatus.WAITING
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt)
        self.most_tokens = max_model_len  # it ends once it has so many
        if params.max_tokens is not None:
            self.most_tokens = min(len(prompt) + params.max_tokens, max_model_len)
        self.num_pending = 0
        self.row = 0  # of the last planned step's result that the last pending token comes in
        self.num_computed = 0
        self.num_cached = 0  # prompt tokens that came from the prefix cache, at first admission
        self.num_preemptions = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._tokens = np.array(prompt, dtype=np.int32)
        self.prompt_token_ids = self._tokens  # outlives the array that grows
        nothing = self._tokens[:0]
        self.part = PlannedSequence(seq_id, nothing, 0, nothing, 0, None)  # in the last planned step
        self.sample_row = SampleRow(params, seed, 0, self._tokens, nothing, (), bad_words)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [num_tokens], a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_known(self) -> int:
        return self.num_tokens - self.num_pending

    @property
    def prompt_computed(self) -> bool:
        return self.num_computed >= self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def plan(self, start: int, row: int) -> PlannedSequence:
        """Its part in the step that computes its tokens from `start` to num_computed. If there are no more, the step
        samples the next one, in this row of its result."""
        part, end = self.part, self.num_computed
        part.token_ids = self._tokens[start:end]
        part.start = start
        part.sample = None
        part.follows = self.row if self.num_pending else -1
        if end == self.num_tokens:
            sample = part.sample = self.sample_row
            sample.index = end - self.num_prompt_tokens
            sample.output = self._tokens[self.num_prompt_tokens : end]
            sample.stop_ids = self.stop_ids if sample.index < self.params.min_tokens else ()
            self._expect(row)
        if self.params.prompt_logprobs is not None:
            self._ask_about_prompt(start, end)
        return part

    def _ask_about_prompt(self, start: int, end: int) -> None:
        part = self.part
        part.num_prompt_logprobs = part.prompt_targets = None
        if start < self.num_prompt_tokens - 1:
            part.num_prompt_logprobs = self.params.prompt_logprobs
            part.prompt_targets = self.prompt_token_ids[start + 1 : end + 1]

    def _expect(self, row: int) -> None:
        """Room for the token that a planned step will sample."""
        place = self.num_tokens
        if place == len(self._tokens):
            grown = np.empty(2 * place + 16, dtype=np.int32)
            grown[:place] = self._tokens
            self._tokens = grown
        self._tokens[place] = PENDING
        self.num_tokens = place + 1
        self.num_pending += 1
        self.row = row

    def resolve(self, token_id: int) -> None:
        """The oldest pending token is known."""
        self._tokens[self.num_tokens - self.num_pending] = token_id
        self.num_pending -= 1

    def forget_pending(self) -> None:
        self.num_tokens = self.num_known
        self.num_pending = 0
