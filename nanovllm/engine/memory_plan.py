"""What a model takes, worked out before anything is loaded: the arithmetic of `nanovllm plan`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.attention.base import select_backend
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import CachePlan, CacheSpec, PagedKVSpec, StateSpec
from nanovllm.config import EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.engine.memory import size_caches
from nanovllm.errors import ConfigError
from nanovllm.layers.attention import CachedLayer
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.ops.base import select_ops
from nanovllm.quantization.linear_method import LinearWeights


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model on one rank.

    weights: as they lie in memory once loaded. tables: buffers, such as those of positions.
    replicated: {layer's class: bytes of the weights that every rank has whole}, empty on one rank.
    specs: what its layers keep between steps.
    """

    weights: int
    tables: int
    replicated: dict[str, int]
    specs: tuple[CacheSpec, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(s.block_bytes(1) for s in self.specs if isinstance(s, PagedKVSpec))

    @property
    def state_bytes(self) -> int:
        """Of one sequence."""
        return sum(s.slot_bytes for s in self.specs if isinstance(s, StateSpec))


def footprint(model_class: type[CausalLM], model_config: ModelConfig, config: EngineConfig, tp: int = 1) -> Footprint:
    """Build the model without memory and add up. config: resolved.

    tp > 1 is arithmetic over the layers that tensor parallelism shards: linear layers by rows or
    columns, embedding and head by the vocabulary (padded), key/value pages by heads. Everything
    else is counted whole. ConfigError where heads or rows do not divide.
    """
    assert config.max_model_len is not None
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    backend = select_backend(config.attention_backend, device, dtype, config.kvcache_block_size)
    ops = select_ops(config.kernels, device, dtype)
    model = model_class(model_config, BuildContext(torch.device("meta"), dtype, backend, config.max_model_len, ops=ops))
    group = TPGroup(0, tp)
    check_heads(model, group)
    replicated: Counter[str] = Counter()
    weights: dict[tuple[int, str], int] = {}  # by who owns them: tied ones count once
    for place, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            own = name == "weight" and isinstance(layer, LinearWeights) and layer.method.num_bytes(layer, device)
            whole = own or parameter.numel() * parameter.itemsize
            share = _share(layer, name, whole, group, place)
            place_in_memory = (id(layer), name) if own and not ops.gathers_packed else (id(parameter), "")
            weights[place_in_memory] = max(share, weights.get(place_in_memory, 0))
            if tp > 1 and share == whole:
                replicated[type(layer).__name__] += share
    return Footprint(
        sum(weights.values()),
        sum(b.numel() * b.itemsize for b in model.buffers()),
        dict(replicated),
        tuple(_sharded_spec(m.cache_spec, tp) for m in model.modules() if isinstance(m, CachedLayer)),
    )


def plan_memory(model: Footprint, config: EngineConfig, memory: int) -> CachePlan:
    """Pages and states beside the weights in `memory` bytes of one rank. config: resolved.

    ConfigError if the weights leave nothing, or less than one sequence needs.
    """
    left = memory - model.weights - model.tables
    if left <= 0:
        raise ConfigError(f"the weights take {model.weights + model.tables:,} bytes, and there are {memory:,}")
    return size_caches(model.specs, left, config)


def check_heads(model: nn.Module, group: TPGroup) -> None:
    """ConfigError, with the numbers, where a rank would get a part of a head."""
    for module in model.modules():
        specs = [m.cache_spec for m in module.children() if isinstance(m, CachedLayer)]
        for spec in specs:
            if isinstance(spec, PagedKVSpec):
                group.shard(spec.num_kv_heads, "key/value heads")
                for projection in module.children():
                    if isinstance(projection, QKVParallelLinear):
                        rows = projection.expected_weights()["weight"]["q"][0]
                        group.shard(rows // spec.head_dim, "query heads")


def _share(layer: nn.Module, parameter: str, whole: int, group: TPGroup, place: str) -> int:
    """Bytes of a rank's part of a parameter; of the largest part where they differ. place: for errors."""
    if group.size == 1 or not isinstance(layer, WeightLayer):
        return whole
    if isinstance(layer, (ParallelLMHead, VocabParallelEmbedding)):
        rows = layer.get_parameter(parameter).shape[0]
        return whole // rows * -(-rows // group.size)
    if isinstance(layer, RowParallelLinear):
        if parameter != "weight":
            return whole
        group.shard(layer.weight.shape[1], f"columns of {place}")
        return whole // group.size
    if isinstance(layer, MergedColumnParallelLinear):
        for shape in layer.expected_weights()[parameter].values():
            group.shard(shape[0], f"rows of {place}")
        return whole // group.size
    return whole


def _sharded_spec(spec: CacheSpec, tp: int) -> CacheSpec:
    if isinstance(spec, StateSpec):
        return spec
    return PagedKVSpec(spec.num_kv_heads // tp, spec.head_dim, spec.dtype, spec.window)
