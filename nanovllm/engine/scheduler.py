"""Scheduler: one token budget a step, shared by decodes and prompt chunks."""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.step import PlannedSequence, StepPlan, StepResult
from nanovllm.sample_row import TokenLogprobs


class Chunk(NamedTuple):
    """Tokens [start, end) of a sequence were computed at once: a prompt's, or again what a preempted one had.

    prompt_logprobs[i] belongs to the prompt token at start + 1 + i.
    """

    seq: Sequence
    start: int
    end: int
    prompt_logprobs: list[TokenLogprobs] | None = None


class StepUpdate(NamedTuple):
    """What a step brought: the chunks that it computed, and who sampled which token. These are lists side by side, as a
    tuple a token would set the garbage collector to work, which now and then looks at everything there is."""

    chunks: list[Chunk]
    sequences: list[Sequence]
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class _Planned:
    """Of a step that is not done. sampling: in the order of its result's rows."""

    sampling: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


class Scheduler:
    """Decides who runs. Pure Python: it knows tokens and pages, not tensors or text.

    Running sequences come first, in order of (priority, arrival), then waiting ones are
    admitted in the same order. When pages run out, the last running sequence is preempted:
    its pages go back and it will recompute its tokens, or find them in the prefix cache.

    The next step may be planned before the last one is done: who sampled in it goes on with a pending
    token. Steps are carried out in the order of their plans, so that pages and slots that one plan gives
    back are the next one's to hand out.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        policy: str = "fcfs",
    ) -> None:
        assert max_num_seqs <= max_num_batched_tokens
        self.cache = cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self._by_priority = policy == "priority"
        self.running: list[Sequence] = []  # sorted by _order
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap; may hold finished ones
        self._num_waiting = 0
        self._planned: deque[_Planned] = deque()  # the last one may be in the making
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running) or self._num_waiting > 0

    def add(self, seq: Sequence) -> None:
        assert seq.status is SequenceStatus.WAITING and seq.num_known < seq.most_tokens
        self._num_waiting += 1
        heapq.heappush(self._waiting, (self._order(seq), seq))

    def finish(self, seq: Sequence, reason: str, stop_reason: str | int | None = None) -> None:
        """End a sequence at any time between steps; harmless if it has ended."""
        if seq.finished:
            return
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
        else:
            self._num_waiting -= 1  # its heap entry is skipped when it surfaces
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        seq.forget_pending()
        self.cache.forget(seq)

    def schedule(self) -> StepPlan:
        """Plan one step; empty only when there is nothing to do before a planned step is done."""
        parts: list[PlannedSequence] = []
        self._planned.append(_Planned())
        self.cache.begin_step()
        preempted_before = self.num_preemptions
        budget = self._schedule_running(parts)
        if self.num_preemptions == preempted_before:  # else the victim would come straight back
            self._admit_waiting(parts, budget)
        if not parts:
            self._planned.pop()
        return StepPlan(parts)

    def update(self, result: StepResult) -> StepUpdate:
        """Book the tokens of the oldest step that is not done, and finish what has come to its end. What it
        brought sequences that have ended since it was planned is dropped."""
        step = self._planned.popleft()
        found = result.prompt_logprobs
        chunks = [c._replace(prompt_logprobs=found.get(c.seq.seq_id)) for c in step.chunks if not c.seq.finished]
        sequences, token_ids, logprobs = step.sampling, result.token_ids.tolist(), result.logprobs
        ended = set()
        for row, (seq, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
            if seq.finish_reason is None:
                seq.resolve(token_id)
                self._finish_if_ended(seq, token_id)
            else:
                ended.add(row)
        if ended:
            kept = [row for row in range(len(sequences)) if row not in ended]
            sequences, token_ids = [sequences[row] for row in kept], [token_ids[row] for row in kept]
            logprobs = [logprobs[row] for row in kept]
        return StepUpdate(chunks, sequences, token_ids, logprobs)

    def abandon_steps(self) -> None:
        """A step broke off half-way: pages may be half-written, so nothing in them is trusted.

        No planned step will be done. Running sequences go back to the queue and will be recomputed; every
        prefix is forgotten.
        """
        for planned in self._planned:
            for seq in planned.sampling:
                seq.forget_pending()
        self._planned.clear()
        self.cache.reset_prefix_cache()
        while self.running:
            self._preempt(self.running.pop())

    def _order(self, seq: Sequence) -> tuple[int, int]:
        return (seq.priority if self._by_priority else 0, seq.seq_id)

    def _schedule_running(self, parts: list[PlannedSequence]) -> int:
        """Plan what runs already; returns the budget that is left."""
        budget, running = self.max_num_batched_tokens, self.running
        decodes_left = [seq.num_tokens - seq.num_computed for seq in running].count(1)
        i = 0
        while i < len(running):
            seq = running[i]
            i += 1
            if seq.num_tokens - seq.num_computed == 1:
                decodes_left -= 1
                if seq.num_pending and seq.num_tokens == seq.most_tokens:
                    continue  # its last token is on its way
                count = 1
            else:  # a long prompt leaves one token for each decode behind it
                count = self.cache.cut(seq, budget - decodes_left)
                if count == 0:
                    continue
            if not (self.cache.advance(seq, count) or self._make_room(seq, count)):
                break  # seq was the last one and has been preempted itself
            parts.append(self._plan(seq, count))
            budget -= count
        return budget

    def _make_room(self, seq: Sequence, count: int) -> bool:
        """Advance seq by preempting from the end of the running list."""
        while (victim := self.running.pop()) is not seq:
            self._preempt(victim)
            if self.cache.advance(seq, count):
                return True
        self._preempt(seq)
        return False

    def _plan(self, seq: Sequence, count: int) -> PlannedSequence:
        """A part in the step for the `count` tokens that have found their places."""
        step, start = self._planned[-1], seq.num_computed - count
        part = seq.plan(start, len(step.sampling))
        if part.sample is not None:
            step.sampling.append(seq)
        if count > 1 or start < seq.num_prompt_tokens:
            step.chunks.append(Chunk(seq, start, start + count))
        return part

    def _preempt(self, seq: Sequence) -> None:
        self.cache.free(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        self.add(seq)

    def _admit_waiting(self, parts: list[PlannedSequence], budget: int) -> None:
        held_back = []
        while self._waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            entry = heapq.heappop(self._waiting)
            seq = entry[1]
            if seq.finished:
                continue
            if seq.leader is not None and not (seq.leader.prompt_computed or seq.leader.finished):
                held_back.append(entry)  # its prompt is on the way in the leader's pages
                continue
            count = self.cache.admit(seq, budget, spare=len(self.running))
            if count is None:
                held_back.append(entry)
                break  # first come, first served: nobody overtakes for want of pages
            self._num_waiting -= 1
            if seq.num_preemptions == 0:
                seq.num_cached = min(seq.num_computed, seq.num_prompt_tokens)
            seq.status = SequenceStatus.RUNNING
            bisect.insort(self.running, seq, key=self._order)
            found = self.cache.advance(seq, count)
            assert found, "it was admitted without pages"
            parts.append(self._plan(seq, count))
            budget -= count
        for entry in held_back:
            heapq.heappush(self._waiting, entry)

    def _finish_if_ended(self, seq: Sequence, token_id: int) -> None:
        if token_id in seq.stop_ids and seq.num_known - seq.num_prompt_tokens >= seq.params.min_tokens:
            assert seq.params.stop_token_ids is not None
            self.finish(seq, "stop", token_id if token_id in seq.params.stop_token_ids else None)
        elif not seq.num_pending:
            if seq.num_tokens == seq.most_tokens:
                self.finish(seq, "length")
        elif seq.num_known % self.cache.block_size == 0:
            self.cache.commit(seq)  # the token that its page lacked, when its computation was planned, is known

    def check_invariants(self) -> None:
        waiting = [seq for _, seq in self._waiting if not seq.finished]
        assert len(waiting) == self._num_waiting
        assert all(s.status is SequenceStatus.WAITING and s.num_computed == 0 for s in waiting)
        assert all(s.status is SequenceStatus.RUNNING and s.num_computed < s.num_tokens for s in self.running)
        assert len(self.running) <= self.max_num_seqs
        assert [self._order(s) for s in self.running] == sorted(self._order(s) for s in self.running)
        assert not any(self.cache.holds(s) for s in waiting), "a waiting sequence holds pages"
        self.cache.check_invariants(waiting + self.running)
