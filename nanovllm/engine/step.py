"""StepPlan and StepResult: all that crosses between scheduler and model runner, in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nanovllm.sample_row import SampleRow, TokenLogprobs


@dataclass(slots=True, eq=False)
class PlannedSequence:
    """One sequence's part in a step: tokens [start, start + num_tokens) are computed.

    A sequence has one such object, which is moved on from step to step rather than made anew: a plan holds
    until the next one is made.

    block_table: the sequence's pages, 0 for those behind its window; another object once they change.
    state_slot: of the sequence's recurrent state, 0 for models without.
    resume_from: slot to copy the state from before the step, capture_to: slot to copy it to
        after the step; 0 for none.
    sample: None while the prompt is incomplete after this step.
    prompt_targets: for prompt logprobs: the tokens that rows start.. predict; may be shorter
        than token_ids (the last prompt token predicts output).
    follows: the row of the step before whose token is this sequence's only one, which was not known when
        this step was planned; -1 where all tokens are known.
    """

    seq_id: int
    token_ids: np.ndarray  # int32 [n]
    start: int
    block_table: np.ndarray  # int32 [pages]
    state_slot: int
    sample: SampleRow | None
    resume_from: int = 0
    capture_to: int = 0
    num_prompt_logprobs: int | None = None
    prompt_targets: np.ndarray | None = None  # int32 [<= n]
    follows: int = -1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Who runs in a step, how many tokens each, in which pages."""

    sequences: list[PlannedSequence]

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced: one token for each planned sequence that samples, in plan order."""

    token_ids: np.ndarray  # int64 [R]
    logprobs: list[TokenLogprobs | None]  # [R]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by seq_id


def fill_in(plan: StepPlan, sampled: np.ndarray) -> None:
    """Put tokens that the step before has sampled, int64 [R], to where the plan's sequences wait for them."""
    for s in plan.sequences:
        if s.follows >= 0:
            assert s.sample is not None
            s.token_ids[-1] = s.sample.output[-1] = sampled[s.follows]
