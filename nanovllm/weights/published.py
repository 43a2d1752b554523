"""Tensors of a quantised checkpoint: those of a weight become one, with the weight's name."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from nanovllm.errors import ModelNotSupported
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.published import Published, Scheme, Weight
from nanovllm.quantization.raw import Raw
from nanovllm.weights.shards import as_lazy
from nanovllm.weights.tensor_source import LazyTensor

logger = logging.getLogger(__name__)
_OF_CACHES = ("q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point", "prob_scale")
_OF_WEIGHTS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
_CODES = (torch.int8, torch.float8_e4m3fn)


def plain(raws: Iterable[Raw]) -> Iterator[LazyTensor]:
    """Tensors of a checkpoint that does not say that it is quantised; ModelNotSupported if it is."""
    for raw in raws:
        last = raw.name.rpartition(".")[2]
        if last in _OF_WEIGHTS or (last == "weight" and raw.dtype in _CODES):
            raise ModelNotSupported(
                f"{raw.file}: {raw.name} is of a quantised weight, but config.json has no quantization_config; write "
                "there what quantize_config.json or quant_config.json holds, with its quant_method, or use a version "
                "that has it"
            )
        yield as_lazy(raw)


def joined(raws: Iterable[Raw], scheme: Scheme) -> Iterator[LazyTensor]:
    """WeightError for weights of which a tensor is missing or does not fit, ModelNotSupported for what there is no
    code for; scales of keys and values are left out with a notice. AutoGPTQ gives every layer a bias, of zeros where
    the model has none."""
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
    packed = {module for module, parts in modules.items() if "qweight" in parts}
    for raw in wanted:
        module, _, last = raw.name.rpartition(".")
        if last not in scheme.companions:
            is_spare = last == "bias" and module in packed and not raw.load().any()
            yield dataclasses.replace(as_lazy(raw), spare=is_spare)
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
