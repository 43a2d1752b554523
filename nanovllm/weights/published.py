"""Tensors of a quantised checkpoint: those of a weight become one, with the weight's name."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator

from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.published import Published, Raw, Scheme, Weight
from nanovllm.weights.shards import as_lazy
from nanovllm.weights.tensor_source import LazyTensor

logger = logging.getLogger(__name__)
_OF_CACHES = ("q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point", "prob_scale")


def joined(raws: Iterable[Raw], scheme: Scheme) -> Iterator[LazyTensor]:
    """WeightError for weights of which a tensor is missing or does not fit, ModelNotSupported for what there is no
    code for; scales of keys and values are left out with a notice."""
    wanted, left_out = [], 0
    modules: defaultdict[str, dict[str, Raw]] = defaultdict(dict)
    for raw in raws:
        module, _, last = raw.name.rpartition(".")
        if last in scheme.companions:
            modules[module][last] = raw
        if last in _OF_CACHES:
            left_out += 1
        else:
            wanted.append(raw)
    if left_out:
        logger.warning("%d scales of keys and values are not used: these stay in the model's dtype", left_out)
    for raw in wanted:
        module, _, last = raw.name.rpartition(".")
        if last not in scheme.companions:
            yield as_lazy(raw)
        elif parts := modules.pop(module, None):
            weight = scheme.weight(module, parts)
            yield from (as_lazy(part) for part in parts.values()) if weight is None else [_lazy(weight, scheme.method)]


def _lazy(weight: Weight, method: str) -> LazyTensor:
    whole = Published.whole(weight)
    return LazyTensor(
        f"{weight.module}.weight", weight.shape, whole.dequantize, method, functools.partial(_blocks, weight)
    )


def _blocks(weight: Weight, device: str) -> Blocks:
    return Published.whole(weight, is_there=device != "meta")
