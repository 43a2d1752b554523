"""What an engine computes for each token, known by the tokens up to it: bits of logits, and of modules' outputs."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.cli.trace import Divergence, first_divergence, token_rows, watching
from nanovllm.engine.runner import model_runner
from nanovllm.engine.runner.step_graphs import StepGraphs
from nanovllm.engine.step import StepPlan
from nanovllm.layers.sampler import Sampled
from nanovllm.models.base import CausalLM
from nanovllm.ops.base import SamplingOps
from nanovllm.sample_row import SampleRow

Prefix = tuple[int, int]
"""A token with all before it: how many, and a hash of them. It names a row in every batch."""

Logits = dict[Prefix, list[torch.Tensor]]
"""fp32 [V] on the CPU, as often as the token was sampled from."""

ModuleBits = dict[str, dict[Prefix, list[tuple[int | None, int]]]]
"""By module, in the order in which they end: hashes of a row that it got (None: not by tokens) and gave."""

_START: Prefix = (0, 0)


@contextmanager
def recorded_logits(known: Container[Prefix] | None = None) -> Iterator[Logits]:
    """Of all engines of this process, before anything changes them. known: no others are kept."""
    seen: Logits = {}
    sample, tokens = vars(model_runner)["sample"], StepGraphs.tokens

    def note(logits: torch.Tensor, rows: Iterable[SampleRow]) -> None:
        for values, row in zip(logits, rows, strict=True):
            prefix = _extend(_START, [*row.prompt.tolist(), *row.output.tolist()])
            if known is None or prefix in known:
                seen.setdefault(prefix, []).append(values.detach().to("cpu", copy=True))

    def watched_sample(
        logits: torch.Tensor, rows: Sequence[SampleRow], ops: SamplingOps, last: torch.Tensor | None
    ) -> Sampled:
        note(logits, rows)
        return sample(logits, rows, ops, last)

    def watched_tokens(graphs: StepGraphs, plan: StepPlan) -> np.ndarray:
        token_ids = tokens(graphs, plan)
        note(graphs.last_logits(), [s.sample for s in plan.sequences if s.sample is not None])
        return token_ids

    with (
        mock.patch.object(model_runner, "sample", watched_sample),
        mock.patch.object(StepGraphs, "tokens", watched_tokens),
    ):
        yield seen


@contextmanager
def recorded_modules(model: CausalLM, block_size: int, known: Container[Prefix] | None = None) -> Iterator[ModuleBits]:
    """Of a model whose engine has computed nothing that it will find in its cache. known: as above."""
    seen: ModuleBits = {}
    in_pages: dict[int, Prefix] = {}  # by slot of the cache
    rows: list[Prefix] = []  # of the tensors that pass now

    def begin(module: torch.nn.Module, args: tuple[Batch]) -> None:
        rows[:] = _prefixes(args[0], block_size, in_pages)

    def end(module: torch.nn.Module, args: tuple[Batch], hidden: Any) -> None:
        rows[:] = [rows[i] for i in args[0].logits_rows.tolist()]  # the head gets these

    def note(name: str, given: Any, output: Any) -> None:
        gave = token_rows(output, len(rows)) if rows else None  # none where no sequence samples
        if gave is None:
            return
        got = token_rows(given, len(rows))
        found = seen.setdefault(name, {})
        for i, prefix in enumerate(rows):
            if known is None or prefix in known:
                found.setdefault(prefix, []).append((None if got is None else _digest(got[i]), _digest(gave[i])))

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        with watching(model, note):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of fp32: zeros of unlike sign differ, NaNs of equal bits do not."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def first_module(reference: ModuleBits, found: ModuleBits) -> Divergence | None:
    """The first whose output has other bits though its input has the same; None if all agree."""
    modules = []
    for name, expected in reference.items():
        if name not in found:
            continue
        given = output = 0.0
        for prefix, rows in found[name].items():
            got, gave = expected.get(prefix, rows)[0]
            given = max(given, *(float(None not in (g, got) and g != got) for g, _ in rows))
            output = max(output, *(float(o != gave) for _, o in rows))
        modules.append(Divergence(name, given, output))
    return first_divergence(modules, 0.0)


def _prefixes(batch: Batch, block_size: int, in_pages: dict[int, Prefix]) -> list[Prefix]:
    """Of each of the batch's tokens: the one before it is in a page, or is written to it in this step."""
    tokens, positions, slots = (t.tolist() for t in (batch.input_ids, batch.positions, batch.slot_mapping))
    starts, found = batch.query_start.tolist(), []
    for table, start, end in zip(batch.block_tables.tolist(), starts, starts[1:], strict=False):
        for t in range(start, end):
            before = positions[t] - 1
            prefix = _START if before < 0 else in_pages[table[before // block_size] * block_size + before % block_size]
            in_pages[slots[t]] = _extend(prefix, tokens[t : t + 1])
            found.append(in_pages[slots[t]])
    return found


def _extend(prefix: Prefix, tokens: Iterable[int]) -> Prefix:
    return functools.reduce(lambda before, token: (before[0] + 1, hash((before[1], token))), tokens, prefix)


def _digest(row: torch.Tensor) -> int:
    return hash(row.numpy().tobytes())
