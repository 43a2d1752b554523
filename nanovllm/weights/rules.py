"""Declarative rules from the names on disk to the parameters of a model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Target = tuple[str, str | None]
"""(parameter name, shard of it or None)."""
Convert = Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Skip:
    """Tensors that are on disk and not wanted; a shell pattern over the whole name."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Rename:
    """Rewrite the name once by a regular expression; the rules that follow see the new name."""

    pattern: str
    replacement: str


@dataclass(frozen=True, slots=True)
class Pack:
    """The disk's module `part` is shard `shard` of our module `target` (q_proj of qkv_proj), or all of it (None)."""

    part: str
    target: str
    shard: str | None


@dataclass(frozen=True, slots=True)
class Split:
    """One tensor on disk is several of ours: `convert` cuts it, in the order of `targets`,
    (module in the place of `part`, shard). It gets weights and biases alike, on any device."""

    part: str
    targets: tuple[Target, ...]
    convert: Convert


@dataclass(frozen=True, slots=True)
class Transpose:
    """The disk has the weight of module `part` as [in, out]; vectors stay as they are."""

    part: str


Rule = Skip | Rename | Pack | Split | Transpose

LLAMA_RULES: tuple[Rule, ...] = (
    Pack("q_proj", "qkv_proj", "q"),
    Pack("k_proj", "qkv_proj", "k"),
    Pack("v_proj", "qkv_proj", "v"),
    Pack("gate_proj", "gate_up_proj", "gate"),
    Pack("up_proj", "gate_up_proj", "up"),
    Skip("*rotary_emb.inv_freq"),
)
"""For the layout that most families have taken over from Llama."""


def head_rules(tied: bool) -> tuple[Rule, ...]:
    """A head that is tied to the embedding may be on disk again."""
    return (Skip("lm_head.weight"),) if tied else ()


def fused_expert_rules(moe: str, num_experts: int) -> tuple[Rule, ...]:
    """For Granite's mixtures: all experts of module `moe` in `input_linear` [E, gate | up, H] and
    `output_linear` [E, H, I], and the router in `router.layer`."""
    halves = [(f"{moe}.experts.{e}.gate_up_proj", half) for e in range(num_experts) for half in ("gate", "up")]
    return (
        Pack(f"{moe}.router.layer", f"{moe}.gate", None),
        Split(f"{moe}.input_linear", tuple(halves), lambda fused: [h for expert in fused for h in expert.chunk(2)]),
        Split(f"{moe}.output_linear", tuple((f"{moe}.experts.{e}.down_proj", None) for e in range(num_experts)), tuple),
    )


def grouped_qkv_rule(part: str, num_kv_heads: int, head_dim: int) -> Split:
    """For GPT-NeoX and Falcon: module `part` has its rows in groups, one a key/value head: the query
    heads that read it, the key head, the value head."""

    def cut(fused: torch.Tensor) -> Sequence[torch.Tensor]:
        groups = fused.unflatten(0, (num_kv_heads, -1, head_dim))
        return [heads.flatten(0, 2) for heads in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]

    return Split(part, ((part, "q"), (part, "k"), (part, "v")), cut)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tensor goes: converted, its parts are these targets in order."""

    targets: tuple[Target, ...]
    convert: Convert


def resolve(name: str, rules: Sequence[Rule]) -> Destination | None:
    """The first rule that knows the name decides; None to skip the tensor."""
    for rule in rules:
        if isinstance(rule, Skip):
            if fnmatch.fnmatchcase(name, rule.pattern):
                return None
        elif isinstance(rule, Rename):
            name = re.sub(rule.pattern, rule.replacement, name, count=1)
        elif _has_part(name, rule.part):
            if isinstance(rule, Pack):
                return Destination(((_replace(name, rule.part, rule.target), rule.shard),), _whole)
            if isinstance(rule, Split):
                targets = tuple((_replace(name, rule.part, module), shard) for module, shard in rule.targets)
                return Destination(targets, rule.convert)
            return Destination(((name, None),), _transposed)
    return Destination(((name, None),), _whole)


def disk_name(parameter: str, shard: str | None, rules: Sequence[Rule]) -> str:
    """Inverse of `resolve` but for renamed prefixes, for messages."""
    for rule in rules:
        if isinstance(rule, Pack):
            sources: Sequence[Target] = ((rule.target, rule.shard),)
        elif isinstance(rule, Split):
            sources = rule.targets
        else:
            continue
        for module, its_shard in sources:
            if its_shard == shard and _has_part(parameter, module):
                return _replace(parameter, module, rule.part)
    return parameter


def _has_part(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _replace(name: str, part: str, target: str) -> str:
    return f".{name}.".replace(f".{part}.", f".{target}.", 1)[1:-1]


def _whole(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return (tensor,)


def _transposed(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return (tensor.t(),)
