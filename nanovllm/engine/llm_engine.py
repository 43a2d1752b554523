"""LLMEngine: schedule, execute, update; everything else is somebody else's job."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.executors.base import Executor
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import Prompt, Request, RequestPreparer
from nanovllm.engine.scheduler import Scheduler, StepUpdate
from nanovllm.engine.step import StepResult
from nanovllm.errors import EngineClosed, RequestError, WorkerDied
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine started. prompt_tokens: computed, not taken from the prefix cache."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0


class _Step(NamedTuple):
    result: Future[StepResult]
    start: float  # time.monotonic's


class LLMEngine:
    """Synchronous, single-threaded, abortable between steps.

    `prepare` only checks and may be called from the caller's side of a queue; `add`, `step`
    and `abort` belong to the one thread that drives the engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        executor: Executor,
        *,
        vocab_size: int,
        eos_ids: list[int],
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """config: resolved, with a max_model_len that the executor's pages hold. executor: loaded.
        sampling_defaults: arguments for the SamplingParams of requests that bring none."""
        self._executor: Executor | None = executor
        capacity = executor.capacity
        assert config.max_model_len is not None and config.max_num_batched_tokens is not None
        grid_fits = config.max_num_batched_tokens >= config.max_num_seqs + capacity.chunk_grid  # while all decode
        cache = CacheManager(
            capacity.num_blocks,
            config.kvcache_block_size,
            num_slots=capacity.num_slots,
            enable_prefix_caching=config.enable_prefix_caching,
            window=capacity.window,
            state_grid=capacity.state_grid,
            chunk_grid=capacity.chunk_grid if grid_fits else 1,
            snapshot_interval=capacity.snapshot_interval,
        )
        self.config = config
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self.sampling_defaults = dict(sampling_defaults or {})
        self.scheduler = Scheduler(
            cache,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            policy=config.scheduling_policy,
        )
        self._outputs = OutputProcessor(tokenizer)
        self._preparer = RequestPreparer(
            tokenizer, vocab_size=vocab_size, max_model_len=config.max_model_len, eos_ids=eos_ids
        )
        self._random = np.random.default_rng(secrets.randbits(64) if config.seed is None else config.seed)
        self._next_seq_id = 0
        self._ahead = int(bool(config.async_scheduling))
        self._running: deque[_Step] = deque()
        self._died: WorkerDied | None = None

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> Request:
        """Check and tokenise a prompt; RequestError if it can never be served."""
        first = self._next_seq_id
        self._next_seq_id += params.n
        request_id = request_id if request_id is not None else str(first)
        seed = int(self._random.integers(2**63))
        return self._preparer.prepare(
            prompt, params, request_id=request_id, first_seq_id=first, seed=seed, priority=priority
        )

    def add(self, request: Request) -> None:
        self._open()
        if self._outputs.request(request.request_id) is not None:
            raise RequestError(f"request_id {request.request_id!r} is in use; choose another")
        self._outputs.add(request)
        for seq in request.sequences:
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at once; None if it is unknown or has finished."""
        request = self._outputs.request(request_id)
        if request is None:
            return None
        for seq in request.sequences:
            self.scheduler.finish(seq, "abort")
        return self._outputs.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def step(self) -> list[RequestOutput]:
        """One forward pass for everybody who runs; the outputs that it changed. With async_scheduling it is
        begun here, and the outputs are those of the pass before.

        WorkerDied ends the engine: no request is left, and every further call raises it again.
        """
        executor = self._open()
        plan, start = self.scheduler.schedule(), time.monotonic()
        try:
            if plan.sequences:
                self._running.append(_Step(executor.submit(plan), start))
            if not self._running or (plan.sequences and len(self._running) <= self._ahead):
                return []
            step = self._running.popleft()
            result = step.result.result()
        except WorkerDied as error:
            self._died = error
            for request_id in self._outputs.request_ids:
                self.abort(request_id)
            raise
        except BaseException:
            self._running.clear()
            self.scheduler.abandon_steps()
            raise
        update = self.scheduler.update(result)
        outputs, stopped = self._outputs.process(update, step.start)
        for seq, stop in stopped:
            self.scheduler.finish(seq, "stop", stop)
        self._count(update)
        return outputs

    def apply_model(self, function: Callable[[Any], T]) -> list[T]:
        """What `function` says of the model, on each rank; vLLM's name. For looking and measuring."""
        return self._open().apply_model(function)

    def close(self) -> None:
        """Release the model and its caches; harmless when repeated."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _open(self) -> Executor:
        if self._executor is None:
            raise EngineClosed("this engine is closed; create a new LLM")
        if self._died is not None:
            raise self._died.with_traceback(None)
        return self._executor

    def _count(self, update: StepUpdate) -> None:
        stats = self.stats
        stats.steps += 1
        stats.preemptions = self.scheduler.num_preemptions
        stats.generation_tokens += len(update.token_ids)
        for seq, start, end, _ in update.chunks:
            stats.prompt_tokens += max(0, min(end, seq.num_prompt_tokens) - start)
