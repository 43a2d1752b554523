"""WorkersExecutor: what executors share whose ranks are processes of their own."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.engine.executors.plan_wire import PlanWriter
from nanovllm.engine.executors.worker import Call, Place, WorkerTask
from nanovllm.engine.executors.worker_pool import WorkerPool
from nanovllm.engine.step import StepPlan, StepResult
from nanovllm.errors import ConfigError, RequestError
from nanovllm.models.base import CausalLM
from nanovllm.weights.checkpoint import Checkpoint

T = TypeVar("T")


class WorkersExecutor:
    """All ranks are workers, rank 0 too: while one of them waits for a rank that is gone, this process does
    not, and can say so. Every rank gets every plan; rank 0 answers."""

    def __init__(self, pool: WorkerPool, tasks: Sequence[bytes], end: Callable[[], None]) -> None:
        """tasks: as from worker_tasks, one a rank. end: releases all; harmless when repeated. Raises what a rank
        raises; all is released then."""
        self._size = len(tasks)
        self._writer = PlanWriter()
        self._pool = pool
        self._end = weakref.finalize(self, end)  # also when the interpreter ends
        try:
            self._capacity = smallest(pool.ask(tasks, self._size, patient=True).result())
            self._ask_all(self._capacity).result()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> CachePlan:
        return self._capacity

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        try:
            message = pickle.dumps(self._writer.write(plan), pickle.HIGHEST_PROTOCOL)
            answers = self._pool.ask([message] * self._size, 1)
        except BaseException:
            self._writer = PlanWriter()  # nobody has read what it thinks that it wrote
            raise
        return _first(answers)

    def apply_model(self, function: Callable[[CausalLM], T]) -> list[T]:
        """RequestError if workers cannot import `function`, or it raises."""
        return self._ask_all(Call(_pickled(function))).result()

    def close(self) -> None:
        self._end()

    def _ask_all(self, message: object) -> Future[list[T]]:
        return self._pool.ask([pickle.dumps(message)] * self._size, self._size)


def worker_tasks(
    config: EngineConfig, model_class: type[CausalLM], checkpoint: Checkpoint, places: Sequence[Place]
) -> list[bytes]:
    """The first message of each rank, pickled. config: resolved. ConfigError for a model that ranks cannot import."""
    model = None if config.model_plugin else model_class
    if model_class.__module__ == "__main__":
        raise ConfigError(f"workers cannot import {model_class.__name__} from the script itself: use model_plugin")
    level = logging.getLogger("nanovllm").getEffectiveLevel()
    try:
        return [
            pickle.dumps(WorkerTask(rank, len(places), place, config, model, checkpoint.path, level))
            for rank, place in enumerate(places)
        ]
    except (pickle.PicklingError, AttributeError) as error:
        raise ConfigError(f"workers cannot import {model_class.__name__} ({error}): use model_plugin") from error


def smallest(plans: Sequence[CachePlan]) -> CachePlan:
    """What every rank can hold."""
    return dataclasses.replace(
        plans[0],
        num_blocks=min(plan.num_blocks for plan in plans),
        num_slots=min(plan.num_slots for plan in plans),
        num_bytes=min(plan.num_bytes for plan in plans),
    )


def _first(answers: Future[list[StepResult]]) -> Future[StepResult]:
    result: Future[StepResult] = Future()

    def settle(done: Future[list[StepResult]]) -> None:
        error = done.exception()
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result()[0])

    answers.add_done_callback(settle)
    return result


def _pickled(function: Callable) -> bytes:
    advice = "workers import it by name, so define it at the top of a module that is not the script itself"
    try:
        if function.__module__ == "__main__":
            raise RequestError(f"apply_model({function.__qualname__}): {advice}")
        return pickle.dumps(function)
    except (pickle.PicklingError, AttributeError) as error:
        raise RequestError(f"apply_model({function!r}): {advice}") from error
