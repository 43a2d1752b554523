"""Steps that are recorded before they run; those that decode are kept, one for each number of sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.engine.runner.decode_batch import DecodeBatch, decodes
from nanovllm.engine.step import StepPlan
from nanovllm.layers.sampler import uniforms
from nanovllm.ops.graph import Graph, Recorder
from nanovllm.ops.native_sampling import NativeSampling


class StepGraphs:
    """build: from a plan to its batch. forward: from a batch to the logits of its `logits_rows`. decoding: as many
    sequences as may run.

    A step that gives each sequence one token and samples the next is written into tensors that stay, from
    which the recorded calls read. Every other step is recorded for itself: this takes no longer than to
    make its calls one by one, and they then run without waiting for Python, in memory that is used again.
    """

    def __init__(
        self,
        build: Callable[[StepPlan], Batch],
        forward: Callable[[Batch], torch.Tensor],
        sampling: NativeSampling,
        recorder: Recorder,
        decoding: DecodeBatch,
    ) -> None:
        self._build, self._forward, self._sampling, self._recorder = build, forward, sampling, recorder
        self._decoding = decoding
        self._draws = sampling.table(decoding.max_num_seqs)
        self._kept: dict[int, tuple[torch.Tensor, Graph]] = {}
        self._drawing: dict[tuple[int, bool], tuple[np.ndarray, torch.Tensor, Graph]] = {}

    def takes(self, plan: StepPlan) -> bool:
        return all(s.prompt_targets is None for s in plan.sequences)

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """fp32 [R, vocabulary], to be used before the next step overwrites it. CannotRecord if the model
        does what cannot be recorded; nothing has happened then."""
        if decodes(plan):
            count = len(plan.sequences)
            self._decoding.write(plan.sequences)
            if count not in self._kept:
                self._kept[count] = self._record(self._decoding.view(count))
            logits, graph = self._kept[count]
        else:
            batch = self._build(plan)  # has to outlive the replay
            logits, graph = self._record(batch)
        graph.replay()
        return logits

    def samples(self, plan: StepPlan) -> bool:
        """Whether it decodes, every sequence's parameters alone say how its token is drawn, and no state is copied."""
        return decodes(plan) and not any(
            s.resume_from or s.capture_to or s.sample is None or not s.sample.plain or s.sample.stop_ids
            for s in plan.sequences
        )

    def tokens(self, plan: StepPlan) -> tuple[np.ndarray, torch.Tensor]:
        """Of a step that `samples`: int64 [R], and the logits. It is recorded with its draws: once weights have gone
        through the caches, a call of torch's takes some 50 us, and this makes none. CannotRecord as above."""
        count, rows = len(plan.sequences), [s.sample for s in plan.sequences if s.sample is not None]
        greedy = all(row.params.greedy for row in rows)
        draws = None if greedy else self._draws[:count]
        if draws is not None:
            self._sampling.fill(draws, rows, uniforms(rows))
        self._decoding.write(plan.sequences)
        if (count, greedy) not in self._drawing:
            self._drawing[count, greedy] = self._record_draws(self._decoding.view(count), draws)
        token_ids, logits, graph = self._drawing[count, greedy]
        graph.replay()
        return token_ids.copy(), logits

    @torch.inference_mode()
    def _record_draws(self, batch: Batch, draws: np.ndarray | None) -> tuple[np.ndarray, torch.Tensor, Graph]:
        logits = torch.empty(0)

        def run() -> torch.Tensor:
            nonlocal logits
            logits = self._forward(batch)
            return self._sampling.draw_by(logits, draws)

        token_ids, graph = self._recorder.record(run)
        return token_ids.numpy(), logits, graph

    def _record(self, batch: Batch) -> tuple[torch.Tensor, Graph]:
        return self._recorder.record(lambda: self._forward(batch))
