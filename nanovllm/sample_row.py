"""SampleRow and TokenLogprobs: what the sampler is told about a row, and what it tells back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nanovllm.sampling_params import SamplingParams

PENDING = -1  # in place of a token that is not known


@dataclass(slots=True, eq=False)
class SampleRow:
    """How to draw one sequence's next token. A sequence has one, which its plans move on.

    seed: of the sequence's random stream; index: the token's place in it, so that a draw
        depends on nothing else (not the batch, not a preemption).
    prompt, output: token ids so far, int32; views into the sequence, valid for this step. The last one of the output
        is PENDING where only the device knows it yet.
    stop_ids: tokens that min_tokens forbids for now; empty when none.
    bad_words: token sequences that must not be completed.
    plain: whether its token is drawn from the logits as they are, without a sort, and nothing else is asked, unless
        there are stop_ids.
    """

    params: SamplingParams
    seed: int
    index: int
    prompt: np.ndarray
    output: np.ndarray
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        changed = params.uses_penalties or params.allowed_token_ids is not None or params.logit_bias or self.bad_words
        self.plain = not changed and params.logprobs is None and (params.greedy or params.typical_p == 1.0)


def awaits_token(row: SampleRow) -> bool:
    return len(row.output) > 0 and row.output[-1] == PENDING


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: the actual token first, then the likeliest in order."""

    token_ids: np.ndarray  # int64 [1 + k]
    logprobs: np.ndarray  # float32 [1 + k]
    rank: int  # of the actual token, 1 is the likeliest
