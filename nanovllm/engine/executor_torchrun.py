"""TorchrunExecutor: this process is one of the ranks that torchrun has started."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import xxhash

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.distributed.join import join_group
from nanovllm.engine.executor_mp import require_devices, smallest
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step import StepPlan, StepResult
from nanovllm.errors import RanksDiffer
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.weights.checkpoint import Checkpoint

T = TypeVar("T")


def launched_processes() -> int | None:
    """How many torchrun has started; None if it did not start this one."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) else None


class TorchrunExecutor:
    """Every process runs the same script and plans the same steps. Before a step they compare digests of the
    plan; after it all take the tokens that rank 0 has drawn, so that only different calls make them differ."""

    def __init__(
        self, config: EngineConfig, model_class: type[CausalLM], model_config: ModelConfig, checkpoint: Checkpoint
    ) -> None:
        """config: resolved."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, host_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        require_devices(config, host_ranks)
        device = torch.device("cuda", local_rank) if config.device == "cuda" else torch.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._group = join_group(rank, size, init_method="env://", device=device, timeout_s=config.worker_timeout)
        self._ranks = _Ranks(rank, size, config.worker_timeout)
        self._runner: ModelRunner | None = ModelRunner(
            *(config, model_class, model_config, checkpoint),
            tp=self._group,
            host_ranks=host_ranks,
            agree=lambda plan: smallest(self._ranks.gather(plan)),
        )
        self._capacity = self._runner.cache_plan

    @property
    def capacity(self) -> CachePlan:
        return self._capacity

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        assert self._runner is not None, "closed"
        self._ranks.compare(digest(plan))
        future: Future[StepResult] = Future()
        future.set_result(self._ranks.broadcast(self._runner.execute(plan)))
        return future

    def apply_model(self, function: Callable[[CausalLM], T]) -> list[T]:
        assert self._runner is not None, "closed"
        return self._ranks.gather(function(self._runner.model))

    def close(self) -> None:
        if self._runner is not None and self._group.comm is not None:
            self._group.comm.close()
        self._runner = None


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


class _Ranks:
    """A group of CPUs beside the model's own, for few bytes at a time."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        dist: Any = torch.distributed
        seconds = timedelta(seconds=timeout)
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=seconds))
        nth = store.add(f"nanovllm/engines/{rank}", 1)  # a script may have several, one after the other
        self._rank, self._size = rank, size
        self._broadcast_options: Any = dist.BroadcastOptions
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore(f"nanovllm/engine{nth}", store), rank, size, seconds)

    def compare(self, mine: int) -> None:
        """RanksDiffer unless all ranks have the same number."""
        all_of_them = torch.zeros(self._size, dtype=torch.int64)
        all_of_them[self._rank] = mine
        self._group.allreduce([all_of_them]).wait()
        found = all_of_them.tolist()
        other = next((rank for rank, number in enumerate(found) if number != found[0]), None)
        if other is not None:
            raise RanksDiffer(
                f"rank {other} has planned another step than rank 0: with executor='torchrun' every process must "
                "make the same calls, with the same arguments, in the same order"
            )

    def broadcast(self, mine: T) -> T:
        """Rank 0's."""
        return self._of(0, mine)

    def gather(self, mine: Any) -> list[Any]:
        """Of all ranks, in order."""
        return [self._of(rank, mine) for rank in range(self._size)]

    def _of(self, rank: int, mine: T) -> T:
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._broadcast(length, rank)
        if rank != self._rank:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(data, rank)
        return pickle.loads(data.numpy().tobytes())

    def _broadcast(self, data: torch.Tensor, rank: int) -> None:
        options = self._broadcast_options()
        options.rootRank = rank
        self._group.broadcast([data], options).wait()
