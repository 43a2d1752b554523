"""How much memory the caches may take on this machine, and what they make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from nanovllm.cache_spec import CachePlan, CacheSpec, plan_cache
from nanovllm.config import EngineConfig, parse_bytes
from nanovllm.engine.runner.control_group import memory_left
from nanovllm.errors import ConfigError
from nanovllm.ops.graph import CannotRecord

_DEFAULT_SHARE = 0.4  # of what is free on the host; pages that are never used cost nothing

WEIGHTS_DO_NOT_FIT = (
    "the model's weights do not fit in the memory that is free on this device: free some, quantise them "
    "(quantization='int8' or 'int4'), or use more GPUs (tensor_parallel_size)"
)
STEP_DOES_NOT_FIT = (
    "no memory left on this device for a step: another process has taken some, or the caches too much; lower "
    "gpu_memory_utilization, max_num_batched_tokens or max_num_seqs"
)


@contextmanager
def says_what_helps(text: str) -> Iterator[None]:
    """ConfigError with this text where the memory of a device does not suffice."""
    try:
        yield
    except (RuntimeError, CannotRecord) as error:
        if _is_out_of_memory(error):
            raise ConfigError(text) from error
        raise


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is where it began: to end a capture that has failed is an error of its own. Only torch's allocator
    has a type for it; CUDA and cuBLAS say it in words."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def host_cache_memory(config: EngineConfig, ranks: int = 1) -> int:
    """Bytes for a rank's pages and states, once the weights are in place. ranks: on this host, which share its
    memory."""
    free = free_host_memory()
    if config.kvcache_memory is None:
        return (free if config.num_kvcache_blocks is not None else int(free * _DEFAULT_SHARE)) // ranks
    asked = parse_bytes("kvcache_memory", config.kvcache_memory)
    if asked > free:
        raise ConfigError(f"kvcache_memory={config.kvcache_memory!r} is more than the {free:,} bytes that are free")
    return asked // ranks


class DeviceMemory:
    """A GPU's, of which this engine may take a share. Others on it keep what they have; two engines fit if their
    shares do."""

    def __init__(self, device: torch.device) -> None:
        """Before anything of this engine is there."""
        self._device = device
        self._before = self._free()

    def left(self, config: EngineConfig, largest_step: Callable[[], None]) -> int:
        """Bytes for pages and states beside the weights, which are in place, and what steps take.

        largest_step: takes as much as steps ever do. ConfigError if nothing is left.
        """
        torch.cuda.empty_cache()
        weights = self._before - self._free()
        with says_what_helps(
            f"no room for a step of {config.max_num_batched_tokens} tokens beside {weights:,} bytes of weights: "
            "lower max_num_batched_tokens or max_num_seqs, or use more GPUs (tensor_parallel_size)"
        ):
            largest_step()
        steps, total = self._before - weights - self._free(), torch.cuda.mem_get_info(self._device)[1]
        share = int(total * config.gpu_memory_utilization)
        left = min(share, self._before) - weights - steps
        if left <= 0:
            raise ConfigError(
                f"gpu_memory_utilization={config.gpu_memory_utilization} of {total:,} bytes, of which {self._before:,} "
                f"were free, leaves no cache beside {weights:,} of weights and {steps:,} for a step: raise it, free "
                "memory on the device, or lower max_num_batched_tokens or max_num_seqs"
            )
        return left

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


def size_caches(specs: Sequence[CacheSpec], memory: int, config: EngineConfig) -> CachePlan:
    """Divide `memory` bytes among the caches of one rank's layers. config: resolved."""
    assert config.max_model_len is not None
    return plan_cache(
        specs,
        memory,
        block_size=config.kvcache_block_size,
        max_num_seqs=config.max_num_seqs,
        max_blocks=config.max_num_seqs * -(-config.max_model_len // config.kvcache_block_size),
        num_blocks=config.num_kvcache_blocks,
        snapshots=config.enable_prefix_caching,
    )


def free_host_memory() -> int:
    """Bytes this process can still get: what the machine has, within its control group's limit."""
    return int(min(psutil.virtual_memory().available, memory_left()))
