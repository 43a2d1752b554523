"""Strict loading: every tensor of the model from exactly one tensor on disk."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from nanovllm.errors import WeightError
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.quantization.blocks import Blocks
from nanovllm.weights.rules import Convert, Destination, Rule, disk_name, resolve
from nanovllm.weights.tensor_source import LazyTensor

_LISTED = 20
logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, tensors: Iterable[LazyTensor], rules: Sequence[Rule]) -> None:
    """Fill the model's parameters, then let each layer finalise (pack) what it got.

    Raises WeightError that names every missing, unexpected and misshapen tensor.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, WeightLayer)}
    wanted = {
        (f"{name}.{parameter}", shard): shape
        for name, layer in layers.items()
        for parameter, shards in layer.expected_weights().items()
        for shard, shape in shards.items()
    }
    missing = dict(wanted)
    unexpected, misshapen = [], []
    widened: set[str] = set()
    for tensor in tensors:
        destination = resolve(tensor.name, rules)
        if destination is None:
            continue
        if any(target not in missing for target in destination.targets):
            if not tensor.spare:
                unexpected.append(tensor.name)
            continue
        shapes = [missing.pop(target) for target in destination.targets]
        if _shapes_after(destination.convert, tensor.shape) != shapes:
            misshapen.append(f"{tensor.name} (is {tensor.shape}, should {_disk_shape(destination.convert, shapes)})")
        elif not (unexpected or misshapen):
            parts = _parts(tensor, destination, shapes, layers, widened)
            for (name, shard), part in zip(destination.targets, parts, strict=True):
                layer_name, _, parameter = name.rpartition(".")
                layers[layer_name].load_weight(parameter, part, shard)
    if widened:
        logger.warning("no kernels for %s: such weights are widened while loading", ", ".join(sorted(widened)))
    require_fit(list(dict.fromkeys(disk_name(name, shard, rules) for name, shard in missing)), unexpected, misshapen)
    for layer in layers.values():
        layer.finalize_weights()


def load_shapes(model: nn.Module, tensors: Iterable[LazyTensor], rules: Sequence[Rule]) -> None:
    """`load_weights` of a model on the meta device: nothing is read, and layers whose size depends on the types on
    disk have it."""
    load_weights(model, (_without_data(tensor) for tensor in tensors), rules)


def _without_data(tensor: LazyTensor) -> LazyTensor:
    read = tensor.load_blocks
    return dataclasses.replace(
        tensor,
        load=functools.partial(torch.empty, tensor.shape, device="meta"),
        load_blocks=None if read is None else lambda device: read("meta"),
    )


def _parts(
    tensor: LazyTensor,
    destination: Destination,
    shapes: Sequence[tuple[int, ...]],
    layers: Mapping[str, WeightLayer],
    widened: set[str],
) -> Sequence[torch.Tensor | Blocks]:
    """What the targets get: blocks if all of them take these, and rules only rearrange rows. widened: gets the kinds
    that would be taken if there were code for them."""
    owners = [(layers[layer], parameter) for layer, _, parameter in (n.rpartition(".") for n, _ in destination.targets)]
    if tensor.kind is not None and all(layer.takes_blocks(parameter) for layer, parameter in owners):
        if tensor.load_blocks is not None:
            found = destination.convert(_row_numbers(tensor))
            if all(tuple(part.shape) == (shape[0], 1) for part, shape in zip(found, shapes, strict=True)):
                blocks = tensor.load_blocks("cpu")
                return [blocks[_as_range(part[:, 0])] for part in found]
        widened.add(tensor.kind)
    return destination.convert(tensor.load())


def _row_numbers(tensor: LazyTensor) -> torch.Tensor:
    """In the place of rows: conversions that rearrange rows rearrange these."""
    *rows, cols = tensor.shape
    shape = (1, cols) if tensor.transposed else (*rows, 1)
    return torch.arange(math.prod(shape)).view(shape)


def _as_range(numbers: torch.Tensor) -> slice | torch.Tensor:
    first, count = int(numbers[0]), len(numbers)
    in_turn = torch.equal(numbers, torch.arange(first, first + count))
    return slice(first, first + count) if in_turn else numbers


def require_fit(missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    """WeightError that names the tensors of each list, if there are any."""
    problems = [
        _listing("missing", missing),
        _listing("unexpected", unexpected),
        _listing("misshapen", misshapen),
    ]
    if any(problems):
        raise WeightError("the weights do not fit the model: " + "; ".join(filter(None, problems)))


def fill_dummy_weights(model: nn.Module, seed: int = 0) -> None:
    """Seeded random weights of a harmless size, for benchmarks without a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, WeightLayer)]
    for layer in layers:
        for parameter, shards in layer.expected_weights().items():
            for shard, shape in shards.items():
                values = torch.randn(shape, generator=generator) * 0.02
                is_norm = parameter == "weight" and len(shape) == 1
                layer.load_weight(parameter, values + 1 if is_norm else values, shard)
    for layer in layers:
        layer.finalize_weights()


def _shapes_after(convert: Convert, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that a conversion gives, found out without data; empty if it cannot take this one."""
    try:
        return [tuple(part.shape) for part in convert(torch.empty(shape, device="meta"))]
    except (RuntimeError, TypeError):  # the second from a loop over a scalar
        return []


def _disk_shape(convert: Convert, shapes: list[tuple[int, ...]]) -> str:
    if len(shapes) > 1:
        return f"give {', '.join(map(str, shapes))}"
    return f"be {_shapes_after(convert, shapes[0])[0]}"  # whole or transposed: its own inverse


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_LISTED])}{more}"
