"""Declarative rules from the names on disk to the parameters of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pack:
    """The disk's module `part` is shard `shard` of our module `target` (q_proj of qkv_proj)."""

    part: str
    target: str
    shard: str


@dataclass(frozen=True, slots=True)
class Skip:
    """Tensors that are on disk and not wanted; a shell pattern over the whole name."""

    pattern: str


Rule = Pack | Skip


def resolve(name: str, rules: Sequence[Rule]) -> tuple[str, str | None] | None:
    """(parameter name, shard) for a name on disk; None to skip it."""
    parts = name.split(".")
    for rule in rules:
        if isinstance(rule, Skip):
            if fnmatch.fnmatchcase(name, rule.pattern):
                return None
        elif rule.part in parts:
            return ".".join(rule.target if p == rule.part else p for p in parts), rule.shard
    return name, None


def disk_name(parameter: str, shard: str | None, rules: Sequence[Rule]) -> str:
    """Inverse of `resolve`, for messages."""
    parts = parameter.split(".")
    for rule in rules:
        if isinstance(rule, Pack) and rule.shard == shard and rule.target in parts:
            return ".".join(rule.part if p == rule.target else p for p in parts)
    return parameter
