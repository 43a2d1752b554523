"""Sequence: one completion of one prompt, as the scheduler sees it."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Tokens

import numpy as np

from nanovllm.sample_row import PENDING
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
    ) -> None:
        self.seq_id = seq_id  # also the order of arrival
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.priority = priority
        self.cache_salt = cache_salt
        self.stop_ids = stop_ids
        self.bad_words = bad_words
        self.leader = leader  # the sibling that computes the shared prompt first
        self.status = SequenceStatus.WAITING
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt)
        self.num_pending = 0
        self.row = 0  # of the last planned step's result that the last pending token comes in
        self.num_computed = 0
        self.num_cached = 0  # prompt tokens that came from the prefix cache, at first admission
        self.num_preemptions = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._tokens = np.array(prompt, dtype=np.int32)
        self.prompt_token_ids = self._tokens  # outlives the array that grows

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [num_tokens], a view."""
        return self._tokens[: self.num_tokens]

    @property
    def output_token_ids(self) -> np.ndarray:
        return self._tokens[self.num_prompt_tokens : self.num_tokens]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_known(self) -> int:
        return self.num_tokens - self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def prompt_computed(self) -> bool:
        return self.num_computed >= self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def expect(self, row: int) -> None:
        """Room for the token that a planned step will sample."""
        if self.num_tokens == len(self._tokens):
            grown = np.empty(2 * len(self._tokens) + 16, dtype=np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = PENDING
        self.num_tokens += 1
        self.num_pending += 1
        self.row = row

    def resolve(self, token_id: int) -> None:
        """The oldest pending token is known."""
        self._tokens[self.num_known] = token_id
        self.num_pending -= 1

    def forget_pending(self) -> None:
        self.num_tokens = self.num_known
        self.num_pending = 0
