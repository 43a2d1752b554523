"""A layer's attention over pages, beside what bounds it: on a CUDA device by each backend that runs there, and storing
keys and values; else native attention, with bfloat16 and int8 pages.

python bench.py --preset attention
OMP_NUM_THREADS=1 python bench.py --preset attention        # one thread
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.kernels import in_a_graph
from benchmarks.probe import Probe, probe_text
from benchmarks.report import finish
from benchmarks.roof import Work
from nanovllm.attention.base import AttentionBackend, load_backend
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.engine.runner.batch_builder import build_batch
from nanovllm.engine.step import PlannedSequence, StepPlan

PAGES = {"cuda": 256, "cpu": 16}  # tokens: all backends read such ones
LAYERS = 30  # of SmolLM2: on CPUs each call reads another layer's pages, as in a step


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    head: int


QWEN3, SMOLLM2 = Sizes(16, 8, 128), Sizes(9, 3, 64)  # Qwen3's 0.6B and 1.7B, and 135M
BACKENDS = {"cuda": ("triton", "triton, invariant", "flash", "torch_varlen"), "cpu": ("native",)}


class Case(NamedTuple):
    """sequences: tokens in the cache before the step, and of the step."""

    name: str
    sequences: Sequence[tuple[int, int]]
    codes: torch.dtype | None = None
    sizes: Sizes = QWEN3

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.sequences)

    def spec(self, dtype: torch.dtype = torch.bfloat16) -> PagedKVSpec:
        return PagedKVSpec(self.sizes.kv_heads, self.sizes.head, dtype, codes=self.codes)

    def floor(self, probe: dict[str, float]) -> float:
        """Microseconds: of decodes for reading their keys and values, of prompts for multiplying with them."""
        cached, attention = self.spec().block_bytes(1), 4 * self.sizes.heads * self.sizes.head
        work = Work(layers=0, head=0, weights=0, cached=cached, attention=attention, states=0)
        before = [([0] * context, 1) for context, _ in self.sequences]
        after = [([0] * (context + new), 1) for context, new in self.sequences]
        if all(new == 1 for _, new in self.sequences):
            after = [([0] * context, 2) for context, _ in self.sequences]
        return 1e6 * (work.seconds(after, 0, probe) - work.seconds(before, 0, probe))


CASES = {
    "cuda": (
        Case("64 decodes behind 4096", [(4095, 1)] * 64),
        Case("64 decodes behind 4096, fp8", [(4095, 1)] * 64, torch.float8_e4m3fn),
        Case("1 decode behind 32768", [(32767, 1)]),
        Case("256 decodes behind 1024", [(1023, 1)] * 256),
        Case("8 prompts of 2048", [(0, 2048)] * 8),
        Case("2048 tokens behind 30720", [(30720, 2048)]),
    ),
    "cpu": tuple(
        Case(f"{name}{what}", sequences, codes, SMOLLM2)
        for name, sequences in (
            ("32 decodes behind 1024", [(1023, 1)] * 32),
            ("32 decodes behind 128", [(127, 1)] * 32),
            ("1 decode behind 8000", [(7999, 1)]),
            ("a prompt of 1024", [(0, 1024)]),
        )
        for what, codes in (("", None), (", int8", torch.int8))
    ),
}


def run(args: argparse.Namespace) -> None:
    """Microseconds, on GPUs within a CUDA graph, over pages in random order; keys and values of the step itself are
    stored before, which has a line of its own on GPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe, backends = Probe().run(), {name: load_backend(name) for name in BACKENDS[device.type]}
    print(f"{probe_text(probe)}\n{'microseconds':<30}" + "".join(f"{name:>18}" for name in ("floor", *backends)))
    results = {}
    for case in CASES[device.type]:
        found = results[case.name] = {"floor": case.floor(probe)}
        for name, backend in backends.items():
            if backend.unsupported_reason(device, torch.bfloat16, case.spec(), PAGES[device.type]) is None:
                found[name] = _microseconds(case, backend, device, args.rounds)
        _show(case.name, found, backends)
    if device.type == "cuda":
        case = max(CASES["cuda"], key=lambda case: case.tokens)
        moved, (_, store) = 2 * case.tokens * case.spec().block_bytes(1), calls(case, backends["triton"], device)
        found = {"floor": moved / probe["read_gb_per_s"] / 1e3, "triton": in_a_graph(store, args.rounds)}
        results[name := f"storing {case.tokens} tokens"] = found
        _show(name, found, backends)
    finish(args, probe=probe, rounds=args.rounds, microseconds=results)


def _microseconds(case: Case, backend: AttentionBackend, device: torch.device, rounds: int) -> float:
    if device.type == "cuda":
        return in_a_graph(calls(case, backend, device)[0], rounds)
    layers = [calls(case, backend, device, hidden=torch.float32)[0] for _ in range(LAYERS)]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for attend in layers:
            attend()
        times.append((time.perf_counter() - start) / LAYERS * 1e6)
    return statistics.median(times[1:])


def calls(
    case: Case,
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    hidden: torch.dtype | None = None,
) -> tuple[Callable[[], torch.Tensor], Callable[[], Any]]:
    """What attends and stores nothing, and what stores the step's keys and values as on a GPU. hidden: what queries are
    in, if that is not the pages' dtype."""
    from nanovllm.attention.gpu import store

    spec, page = case.spec(dtype), PAGES[device.type]
    counts = [-(-(context + new) // page) for context, new in case.sequences]
    pages = iter(np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1)
    plan = StepPlan(
        [
            PlannedSequence(i, np.zeros(new, np.int32), context, np.array([next(pages) for _ in range(count)]), 0, None)
            for i, ((context, new), count) in enumerate(zip(case.sequences, counts, strict=True))
        ]
    )
    batch = build_batch(plan, block_size=page, device=device, backend=backend, with_states=False)
    kv = torch.randn(backend.kv_shape(spec, 1 + sum(counts), page), device=device).to(spec.stored)
    if case.codes is not None:  # as scales, words are numbers about 0.01
        kv.view(torch.int32).bitwise_and_(0x003F3F3F).bitwise_or_(0x3C000000)
    heads, kv_heads, head = case.sizes
    q, k, v = (
        torch.randn(case.tokens, n, head, device=device, dtype=hidden or dtype) for n in (heads, kv_heads, kv_heads)
    )
    # CPUs' kernels take no slot for none: nothing is to be stored there
    old = (
        (k[:0], v[:0], batch.slot_mapping[:0])
        if device.type == "cpu"
        else (k, v, torch.full_like(batch.slot_mapping, -1))
    )
    nowhere = dataclasses.replace(batch, slot_mapping=old[2])
    return (
        lambda: backend.forward(q, *old[:2], kv, nowhere, scale=head**-0.5),
        lambda: store(k, v, kv, batch),
    )


def _show(name: str, found: dict[str, float], backends: Iterable[str]) -> None:
    shown = (f"{found[b]:11.1f} {found['floor'] / found[b]:6.0%}" if b in found else f"{'-':>18}" for b in backends)
    print(f"{name:<30}{found['floor']:18.1f}{''.join(shown)}", flush=True)
