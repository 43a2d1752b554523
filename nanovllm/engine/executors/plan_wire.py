"""StepPlans between processes: what a rank knows already does not cross again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.sample_row import PENDING, SampleRow


class WirePlan(NamedTuple):
    """A plan in few large objects, as pickle takes microseconds for each small array.

    rows: of each sequence: seq_id, tokens, start, pages, state_slot, resume_from, capture_to, and its
        stop_ids if it samples, else None, and the row that it follows.
    token_ids, pages: of all sequences, int32, end to end.
    samples: {row: SampleRow} of those that the reader does not know.
    resolved: of each other one that samples: the last output token but one, which may have been pending when it
        crossed; int32.
    prompts: {row: (num_prompt_logprobs, prompt_targets)}.
    """

    rows: list[tuple[int, int, int, int, int, int, int, tuple[int, ...] | None, int]]
    token_ids: bytes
    pages: bytes
    samples: dict[int, SampleRow]
    resolved: bytes
    prompts: dict[int, tuple[int | None, np.ndarray]]


class PlanWriter:
    """Remembers who sampled in the last plan: in this one the reader adds the token to compute to what it
    knows of them. Everybody else's parameters, prompt and output are written in full."""

    def __init__(self) -> None:
        self._indices: dict[int, int] = {}  # by seq_id

    def write(self, plan: StepPlan) -> WirePlan:
        sequences, indices, samples, prompts = plan.sequences, {}, {}, {}
        resolved: list[int] = []
        known = self._indices
        for i, s in enumerate(sequences):
            if s.sample is not None:
                index = indices[s.seq_id] = s.sample.index
                if known.get(s.seq_id) != index - 1 or len(s.token_ids) != 1:
                    samples[i] = s.sample
                else:
                    resolved.append(s.sample.output[-2] if index > 1 else PENDING)
            if s.prompt_targets is not None:
                prompts[i] = s.num_prompt_logprobs, s.prompt_targets
        self._indices = indices
        return WirePlan(
            [
                (
                    *(s.seq_id, len(s.token_ids), s.start, len(s.block_table)),
                    *(s.state_slot, s.resume_from, s.capture_to),
                    None if s.sample is None else s.sample.stop_ids,
                    s.follows,
                )
                for s in sequences
            ],
            np.concatenate([s.token_ids for s in sequences]).tobytes(),
            np.concatenate([s.block_table for s in sequences]).tobytes(),
            samples,
            np.array(resolved, dtype=np.int32).tobytes(),
            prompts,
        )


class PlanReader:
    """The other end of a PlanWriter: every plan that was written, in order."""

    def __init__(self) -> None:
        self._known: dict[int, SampleRow] = {}  # of the last plan
        self._tokens: dict[int, np.ndarray] = {}  # their output, with room to grow

    def read(self, wire: WirePlan) -> StepPlan:
        token_ids = np.frombuffer(wire.token_ids, np.int32).copy()  # pending ones are to be filled in
        pages = np.frombuffer(wire.pages, np.int32)
        resolved = iter(np.frombuffer(wire.resolved, np.int32))
        known: dict[int, SampleRow] = {}
        tokens: dict[int, np.ndarray] = {}
        planned: list[PlannedSequence] = []
        token, page = 0, 0
        for i, row in enumerate(wire.rows):
            seq_id, count, start, length, state_slot, resume_from, capture_to, stop_ids, follows = row
            ids, table = token_ids[token : token + count], pages[page : page + length]
            token, page = token + count, page + length
            sample = None
            if stop_ids is not None:
                sample = wire.samples.get(i)
                if sample is None:
                    last, tokens[seq_id] = self._known[seq_id], self._appended(seq_id, next(resolved), ids)
                    index = last.index + 1
                    sample = SampleRow(
                        *(last.params, last.seed, index, last.prompt, tokens[seq_id][:index], stop_ids, last.bad_words)
                    )
                known[seq_id] = sample
            planned.append(
                PlannedSequence(
                    *(seq_id, ids, start, table, state_slot, sample, resume_from, capture_to, None, None, follows)
                )
            )
        for i, (logprobs, targets) in wire.prompts.items():
            planned[i].num_prompt_logprobs, planned[i].prompt_targets = logprobs, targets
        self._known, self._tokens = known, tokens
        return StepPlan(planned)

    def _appended(self, seq_id: int, resolved: int, token_id: np.ndarray) -> np.ndarray:
        """The sequence's output with one more token, behind one that is known now."""
        index = self._known[seq_id].index
        room = self._tokens.get(seq_id)
        if room is None or index == len(room):
            room = np.empty(2 * index + 16, dtype=np.int32)
            room[:index] = self._known[seq_id].output
        if index:
            room[index - 1] = resolved
        room[index] = token_id[0]
        return room
