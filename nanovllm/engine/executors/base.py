"""Executor: where steps are carried out. In-process here; the other files keep the protocol with processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.engine.runner.model_runner import ModelRunner
from nanovllm.engine.step import StepPlan, StepResult
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.weights.checkpoint import Checkpoint

T = TypeVar("T")


class Executor(Protocol):
    """capacity: what every rank can hold. submit: one step; it or its future raises the rank's exception, which
    with processes is the end of all. apply_model: every rank's answer to a function of its model. close:
    releases models, caches and processes; harmless when repeated."""

    @property
    def capacity(self) -> CachePlan: ...

    def submit(self, plan: StepPlan) -> Future[StepResult]: ...

    def apply_model(self, function: Callable[[CausalLM], T]) -> list[T]: ...

    def close(self) -> None: ...


class InProcessExecutor:
    """One rank, called directly."""

    def __init__(
        self, config: EngineConfig, model_class: type[CausalLM], model_config: ModelConfig, checkpoint: Checkpoint
    ) -> None:
        self._runner: ModelRunner | None = ModelRunner(config, model_class, model_config, checkpoint)
        self._capacity = self._runner.cache_plan

    @property
    def capacity(self) -> CachePlan:
        return self._capacity

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        assert self._runner is not None, "closed"
        return self._runner.execute(plan)

    def apply_model(self, function: Callable[[CausalLM], T]) -> list[T]:
        assert self._runner is not None, "closed"
        return [function(self._runner.model)]

    def close(self) -> None:
        self._runner = None
