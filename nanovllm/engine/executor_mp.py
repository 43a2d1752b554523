"""MultiprocessExecutor: a process for each rank, on this host."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.engine.plan_wire import PlanWriter
from nanovllm.engine.step import StepPlan, StepResult
from nanovllm.engine.worker import Call, WorkerTask
from nanovllm.engine.worker_pool import WorkerPool
from nanovllm.errors import ConfigError, RequestError
from nanovllm.models.base import CausalLM
from nanovllm.weights.checkpoint import Checkpoint

T = TypeVar("T")


class MultiprocessExecutor:
    """All ranks are workers, rank 0 too: while one of them waits for a rank that is gone, this process does
    not, and can say so. Every rank gets every plan; rank 0 answers."""

    def __init__(self, config: EngineConfig, model_class: type[CausalLM], checkpoint: Checkpoint) -> None:
        """config: resolved. Raises what a rank raises; no process is left then."""
        assert config.tensor_parallel_size is not None
        require_devices(config, config.tensor_parallel_size)
        self._size = config.tensor_parallel_size
        self._writer = PlanWriter()
        self._pool = WorkerPool(self._size, config.worker_timeout)
        self._end = weakref.finalize(self, self._pool.close)  # also when the interpreter ends
        try:
            plans = self._pool.ask(self._tasks(config, model_class, checkpoint), self._size, patient=True).result()
            self._capacity = smallest(plans)
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

    def _tasks(self, config: EngineConfig, model_class: type[CausalLM], checkpoint: Checkpoint) -> list[bytes]:
        model = None if config.model_plugin else model_class
        if model_class.__module__ == "__main__":
            raise ConfigError(f"workers cannot import {model_class.__name__} from the script itself: use model_plugin")
        level = logging.getLogger("nanovllm").getEffectiveLevel()
        try:
            return [
                pickle.dumps(WorkerTask(rank, self._size, config, model, checkpoint.path, level))
                for rank in range(self._size)
            ]
        except (pickle.PicklingError, AttributeError) as error:
            raise ConfigError(f"workers cannot import {model_class.__name__} ({error}): use model_plugin") from error


def require_devices(config: EngineConfig, ranks: int) -> None:
    """ConfigError for what this machine cannot do. ranks: on this host."""
    if os.name != "posix":
        raise ConfigError("more than one process needs Linux or macOS; set tensor_parallel_size=1")
    if config.device == "cuda" and ranks > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs {ranks} GPUs here, and torch sees "
            f"{torch.cuda.device_count()}: lower it, or set device='cpu'"
        )


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
