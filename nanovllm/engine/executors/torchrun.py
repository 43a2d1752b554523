"""TorchrunExecutor: this process is one of the ranks that torchrun has started."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch
import xxhash

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.distributed.join import join_group
from nanovllm.engine.executors.mp import require_devices
from nanovllm.engine.executors.workers import smallest
from nanovllm.engine.runner.model_runner import ModelRunner
from nanovllm.engine.step import StepPlan, StepResult
from nanovllm.errors import RanksDiffer
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.weights.checkpoint import Checkpoint

T = TypeVar("T")

_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_CALL = 0  # of apply_model, where a step has its digest


def launched_processes() -> int | None:
    """How many torchrun has started; None if it did not start this one."""
    return int(os.environ["WORLD_SIZE"]) if set(os.environ) >= _VARIABLES else None


class TorchrunExecutor:
    """Every process runs the same script and plans the same steps. Before a step they compare digests of the
    plan; after it all take the tokens that rank 0 has drawn, so that only different calls make them differ."""

    def __init__(
        self, config: EngineConfig, model_class: type[CausalLM], model_config: ModelConfig, checkpoint: Checkpoint
    ) -> None:
        """config: resolved."""
        host_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        require_devices(config, host_ranks)
        self._device = torch.device(config.device)
        if config.device == "cuda":
            self._device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self._device)
        self._group = join_group(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            init_method="env://",
            device=self._device,
            timeout_s=config.worker_timeout,
        )
        self._runner: ModelRunner | None = None
        try:
            self._runner = ModelRunner(
                *(config, model_class, model_config, checkpoint),
                tp=self._group,
                host_rank=int(os.environ["LOCAL_RANK"]),
                host_ranks=host_ranks,
                agree=lambda plan: smallest(self._gather(plan)),
            )
        except BaseException:
            self.close()  # so that nobody waits for this rank
            raise
        self._capacity = self._runner.cache_plan

    @property
    def capacity(self) -> CachePlan:
        return self._capacity

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        assert self._runner is not None, "closed"
        self._compare(digest(plan))
        result = self._runner.execute(plan).result()
        future: Future[StepResult] = Future()
        future.set_result(self._gather(result)[0])
        return future

    def apply_model(self, function: Callable[[CausalLM], T]) -> list[T]:
        assert self._runner is not None, "closed"
        self._compare(_CALL)
        return self._gather(function(self._runner.model))

    def close(self) -> None:
        if self._group.comm is not None:
            self._group.comm.close()
        self._runner = None

    def _compare(self, mine: int) -> None:
        """RanksDiffer unless all ranks have the same number, of 63 bits."""
        numbers = torch.tensor([[mine]], device=self._device)
        found = self._group.gather(numbers, self._group.size)[0].tolist()
        other = next((rank for rank, number in enumerate(found) if number != found[0]), None)
        if other is not None:
            raise RanksDiffer(
                f"rank {other} makes another step than rank 0: with executor='torchrun' every process must "
                "make the same calls, with the same arguments, in the same order"
            )

    def _gather(self, mine: T) -> list[T]:
        """Of all ranks, in order."""
        size, data = self._group.size, pickle.dumps(mine)
        lengths = self._group.gather(torch.tensor([[len(data)]], device=self._device), size)[0].tolist()
        padded = torch.frombuffer(bytearray(data.ljust(max(lengths))), dtype=torch.uint8)[None]
        found = self._group.gather(padded.to(self._device), size * max(lengths))
        return [pickle.loads(part.tobytes()) for part in found.cpu().view(size, -1).numpy()]


def digest(plan: StepPlan) -> int:
    """63 bits of what must be equal on all ranks: not seeds, as rank 0 alone draws."""
    seen = xxhash.xxh3_64()
    numbers = [(s.seq_id, len(s.token_ids), s.start, len(s.block_table), s.state_slot) for s in plan.sequences]
    seen.update(repr(numbers).encode())
    seen.update(repr([(s.resume_from, s.capture_to, s.sample is None) for s in plan.sequences]).encode())
    for s in plan.sequences:
        seen.update(s.token_ids.tobytes())
        seen.update(s.block_table.tobytes())
    return seen.intdigest() >> 1
