"""How much memory the caches may take on this machine, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from nanovllm.cache_spec import CachePlan, CacheSpec, plan_cache
from nanovllm.config import EngineConfig, parse_bytes
from nanovllm.engine.control_group import memory_left
from nanovllm.errors import ConfigError

_DEFAULT_SHARE = 0.4  # of what is free on the host; pages that are never used cost nothing


def cache_memory(config: EngineConfig, device: torch.device, ranks: int = 1) -> int:
    """Bytes for a rank's pages and states, once the weights are in place. ranks: on this host, which share its
    memory but have a GPU each."""
    if device.type == "cuda":
        return _cuda_memory(config, device)
    free = free_host_memory()
    if config.kvcache_memory is None:
        return (free if config.num_kvcache_blocks is not None else int(free * _DEFAULT_SHARE)) // ranks
    asked = parse_bytes("kvcache_memory", config.kvcache_memory)
    if asked > free:
        raise ConfigError(f"kvcache_memory={config.kvcache_memory!r} is more than the {free:,} bytes that are free")
    return asked // ranks


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


def _cuda_memory(config: EngineConfig, device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    memory = int(total * config.gpu_memory_utilization) - (total - free)
    if memory <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} of {total:,} bytes is below the "
            f"{total - free:,} in use already; raise it, or free memory on the device"
        )
    return memory
