"""What a model takes, worked out before anything is loaded: the arithmetic of `nanovllm plan`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from nanovllm.attention.codes import KV_CODES
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import CachePlan, CacheSpec, PagedKVSpec, StateSpec
from nanovllm.config import STORED, EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.engine.runner.memory import size_caches
from nanovllm.errors import ConfigError
from nanovllm.layers.attention import CachedLayer
from nanovllm.models.base import CausalLM, ModelConfig
from nanovllm.ops.base import select_ops
from nanovllm.quantization.linear_method import LinearWeights
from nanovllm.weights.checkpoint import Checkpoint
from nanovllm.weights.loader import load_shapes


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


def footprint(
    model_class: type[CausalLM],
    model_config: ModelConfig,
    config: EngineConfig,
    tp: int = 1,
    checkpoint: Checkpoint | None = None,
) -> Footprint:
    """Build the model of one rank without memory and add up. config: resolved. checkpoint: needed where its own
    quantisation stays.

    All ranks have as much, or less where experts do not divide. ConfigError where heads or rows do not divide.
    """
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    invariant, codes = config.batch_invariant, KV_CODES[config.kv_cache_dtype]
    ops = select_ops(
        config.kernels, device, dtype, batch_invariant=invariant, quantize_activations=config.quantize_activations
    )

    def build(rank: int, size: int) -> CausalLM:
        assert config.max_model_len is not None
        meta, group, experts = torch.device("meta"), TPGroup(rank, size), config.enable_expert_parallel
        layout = (meta, dtype, config.max_model_len, group, ops, experts, config.quantization, codes)
        model = model_class(model_config, BuildContext(*layout))
        if config.quantization in STORED and checkpoint is not None:
            load_shapes(model, checkpoint.tensors(), model.weight_rules)
        return model

    last, other, whole = build(tp - 1, tp), build(0, tp), build(0, 1)  # the last one has the most experts
    replicated: Counter[str] = Counter()
    weights: dict[tuple[int, str], int] = {}  # by who owns them: tied ones count once
    for layer, other_layer, whole_layer in zip(last.modules(), other.modules(), whole.modules(), strict=True):
        for name, parameter in layer.named_parameters(recurse=False):
            own = name == "weight" and isinstance(layer, LinearWeights) and layer.method.num_bytes(layer, device)
            size = own or parameter.numel() * parameter.itemsize
            place_in_memory = (id(layer), name) if own and not ops.embeds_packed else (id(parameter), "")
            weights[place_in_memory] = max(size, weights.get(place_in_memory, 0))
            is_whole = parameter.shape == whole_layer.get_parameter(name).shape
            if tp > 1 and is_whole and name in other_layer._parameters:
                replicated[type(layer).__name__] += size
    return Footprint(
        sum(weights.values()),
        sum(b.numel() * b.itemsize for b in last.buffers()),
        dict(replicated),
        tuple(m.cache_spec for m in last.modules() if isinstance(m, CachedLayer)),
    )


def plan_memory(model: Footprint, config: EngineConfig, memory: int) -> CachePlan:
    """Pages and states beside the weights in `memory` bytes of one rank. config: resolved.

    ConfigError if the weights leave nothing, or less than one sequence needs.
    """
    left = memory - model.weights - model.tables
    if left <= 0:
        raise ConfigError(f"the weights take {model.weights + model.tables:,} bytes, and there are {memory:,}")
    return size_caches(model.specs, left, config)
