"""What every module of a model got and gave, and where two models part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.layers.linear import ActivatedLinear, GatedLinear, MergedColumnParallelLinear
from nanovllm.models.base import CausalLM
from nanovllm.weights.rules import resolve


@dataclass(frozen=True, slots=True)
class Call:
    """fp32 [T, ...] flattened to [T, N]; None for what is no tensor with a row for each token."""

    given: torch.Tensor | None
    output: torch.Tensor | None


Trace = dict[str, Call]
"""By module name, in the order in which the modules finish; the first call of each."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Largest differences of a module's input and output, as shares of a token's largest value.

    given: 0 where the inputs cannot be compared.
    """

    module: str
    given: float
    output: float

    @property
    def is_block(self) -> bool:
        """One of the model's layers: what it gives depends on everything before."""
        return re.fullmatch(r"\D+\.\d+", self.module) is not None


@contextmanager
def watching(model: nn.Module, see: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call see(name, what it got, what it gave) as each module ends: the first floating-point tensor of
    its arguments or None, and its output or the first of its outputs, without the `residual` that it was given to
    add this to."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given, residual = next((v for v in (*args, *kwargs.values()) if _is_float(v)), None), kwargs.get("residual")
            see(name, given, _first(output) if residual is None else output - residual)

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(model: nn.Module, num_tokens: int) -> Iterator[Trace]:
    """Trace the modules that hold parameters while one prompt of num_tokens runs through."""
    trace: Trace = {}
    held = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}

    def note(name: str, given: Any, output: Any) -> None:
        if name in held and name not in trace:
            trace[name] = Call(token_rows(given, num_tokens), token_rows(output, num_tokens))

    with watching(model, note):
        yield trace


def compare_traces(reference: Trace, ours: Trace, model: CausalLM) -> list[Divergence]:
    """Differences of the modules that both models have, by the reference's names and order.

    The reference's names lead to ours as those of weights on disk do, and so do the parts of
    projections that are fused here. model: ours.
    """
    found = []
    for name, call in reference.items():
        place = _place(name, call, model)
        mine = ours.get(place.module) if place is not None else None
        if place is None or mine is None or mine.output is None or call.output is None:
            continue
        output = mine.output
        if place.columns is not None:
            output = output[:, place.columns]
        expected = call.output if place.order is None else call.output[:, place.order]
        if output.shape == expected.shape:
            found.append(Divergence(name, _difference(call.given, mine.given), _difference(expected, output)))
    return found


def num_settled(modules: Sequence[Divergence], tolerance: float) -> int:
    """How many modules at the beginning cannot be at fault: a block that they lead to agrees, in
    its output or, for those before it, in its input."""
    settled = 0
    for i, m in enumerate(modules):
        if m.is_block:
            inside = [j for j in range(i) if modules[j].module.startswith(f"{m.module}.")]
            if m.output <= tolerance:
                settled = i + 1
            elif m.given <= tolerance:
                settled = max(settled, inside[0] if inside else i)
    return settled


def first_divergence(modules: Sequence[Divergence], tolerance: float) -> Divergence | None:
    """The innermost module that may be at fault whose output differs and whose input does not;
    failing that, the first whose output differs; None if none does."""
    differ = [m for m in modules[num_settled(modules, tolerance) :] if not m.output <= tolerance]
    return next((m for m in differ if m.given <= tolerance), differ[0] if differ else None)


@dataclass(frozen=True, slots=True)
class _Place:
    """Our module, the columns of its output, and the order in which it wants the reference's."""

    module: str
    columns: torch.Tensor | None = None
    order: torch.Tensor | None = None


def _place(name: str, call: Call, model: CausalLM) -> _Place | None:
    destination = resolve(f"{name}.weight", model.weight_rules)
    if destination is None:  # a tied head's weight is skipped, the head is not
        return _Place(name)
    modules = {target.removesuffix(".weight") for target, _ in destination.targets}
    shards = [shard for _, shard in destination.targets]
    if len(modules) > 1:
        return None
    (module,) = modules
    layer = dict(model.named_modules()).get(module)
    if isinstance(layer, (ActivatedLinear, GatedLinear)):  # its output is not the projection's
        return None
    if shards == [None]:
        return _Place(module)
    if not isinstance(layer, MergedColumnParallelLinear) or call.output is None:
        return None
    columns: dict[str | None, torch.Tensor] = {}
    end = 0
    for shard, shape in layer.expected_weights()["weight"].items():
        columns[shard] = torch.arange(end, end + shape[0])
        end += shape[0]
    mine = torch.cat([columns[shard] for shard in shards])
    if len(shards) == 1:
        return _Place(module, mine)
    # a rule that cuts biases cuts their indices as well
    return _Place(module, mine, torch.cat(list(destination.convert(torch.arange(call.output.shape[1])))))


def token_rows(value: Any, num_tokens: int) -> torch.Tensor | None:
    """A copy, fp32 [T, N] on the CPU; None for what is no floating-point tensor with a row for each token."""
    if not _is_float(value):
        return None
    if value.dim() > 2 and value.shape[0] == 1:  # a batch of one
        value = value[0]
    if value.dim() == 3 and value.shape[0] != num_tokens and value.shape[1] == num_tokens:  # heads first
        value = value.transpose(0, 1)
    if value.dim() < 2 or value.shape[0] != num_tokens:
        return None
    return value.detach().reshape(num_tokens, -1).to("cpu", torch.float32, copy=True)


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _difference(expected: torch.Tensor | None, found: torch.Tensor | None) -> float:
    if expected is None or found is None or expected.shape != found.shape:
        return 0.0
    # token by token: first tokens can be a thousand times larger than the others, and would hide them
    scale = expected.abs().amax(dim=1).clamp_min(1e-30)
    return ((found - expected).abs().amax(dim=1) / scale).max().item()
