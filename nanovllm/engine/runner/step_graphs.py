"""Steps that are recorded before they run: once, for as many tokens and sequences as a step may have."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.engine.runner.step_batch import StepBatch
from nanovllm.engine.step import StepPlan
from nanovllm.layers.sampler import uniforms
from nanovllm.ops.native_sampling import NativeSampling
from nanovllm.ops.recorder import NativeGraph, NativeRecorder


class _Draws(Enum):
    """What a recorded step ends with."""

    NONE = "logits"
    GREEDY = "the likeliest tokens"
    BY_TABLE = "tokens drawn as a table says"


class StepGraphs:
    """forward: from a batch to the logits of its `logits_rows`.

    Every step is written into tensors that stay, from which the recorded calls read, and the calls are resized to it:
    nothing is recorded anew, and no step waits for Python between its layers.
    """

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        sampling: NativeSampling,
        recorder: NativeRecorder,
        batch: StepBatch,
    ) -> None:
        self._forward, self._sampling, self._recorder, self._batch = forward, sampling, recorder, batch
        self._table = sampling.table(batch.sizes.sampled)
        self._recorded: dict[_Draws, tuple[torch.Tensor, np.ndarray, NativeGraph]] = {}
        self._last = torch.empty(0), 0  # logits of the last step, and how many

    def takes(self, plan: StepPlan) -> bool:
        return all(s.prompt_targets is None for s in plan.sequences)

    def samples(self, plan: StepPlan) -> bool:
        """Whether every sequence's parameters alone say how its token is drawn, and no state is copied."""
        return not any(
            s.prompt_targets is not None
            or s.resume_from
            or s.capture_to
            or (s.sample is not None and (not s.sample.plain or s.sample.stop_ids))
            for s in plan.sequences
        )

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """fp32 [R, vocabulary], to be used before the next step overwrites it. CannotRecord if the model
        does what cannot be recorded; nothing has happened then."""
        self._replay(plan, _Draws.NONE)
        return self.last_logits()

    def tokens(self, plan: StepPlan) -> np.ndarray:
        """Of a step that `samples`: int64 [R]. It is recorded with its draws: once weights have gone through the
        caches, a call of torch's takes some 50 us, and this makes none. CannotRecord as above."""
        rows = [s.sample for s in plan.sequences if s.sample is not None]
        greedy = all(row.params.greedy for row in rows)
        if not greedy:
            self._sampling.fill(self._table[: len(rows)], rows, uniforms(rows))
        return self._replay(plan, _Draws.GREEDY if greedy else _Draws.BY_TABLE)[: len(rows)].copy()

    def last_logits(self) -> torch.Tensor:
        """Those of the step before, `tokens` or `logits`."""
        logits, count = self._last
        return logits[:count]

    def _replay(self, plan: StepPlan, draws: _Draws) -> np.ndarray:
        """Room for tokens, with the step's in front if any are drawn."""
        sizes = self._batch.write_step(plan)
        if draws not in self._recorded:
            self._recorded[draws] = self._record(draws)
        logits, token_ids, graph = self._recorded[draws]
        graph.resize(sizes)
        graph.replay()
        self._last = logits, sizes.sampled
        return token_ids

    @torch.inference_mode()
    def _record(self, draws: _Draws) -> tuple[torch.Tensor, np.ndarray, NativeGraph]:
        token_ids = torch.empty(0, dtype=torch.int64)

        def run() -> torch.Tensor:
            nonlocal token_ids
            logits = self._forward(self._batch.largest())
            if draws is not _Draws.NONE:
                token_ids = self._sampling.draw_by(logits, self._table if draws is _Draws.BY_TABLE else None)
            return logits

        logits, graph = self._recorder.record(run)
        graph.fit(self._batch.sizes)
        return logits, token_ids.numpy(), graph
