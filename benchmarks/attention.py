"""Attention over pages by each backend that runs here, and storing keys and values, beside what bounds them.

python bench.py --preset attention
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
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

HEADS, KV_HEADS, HEAD = 16, 8, 128  # of Qwen3 0.6B and 1.7B
BACKENDS = ("triton", "triton, invariant", "flash", "torch_varlen")
PAGE = 256  # tokens: all backends read such pages


class Case(NamedTuple):
    """sequences: tokens in the cache before the step, and of the step."""

    name: str
    sequences: Sequence[tuple[int, int]]
    codes: torch.dtype | None = None

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.sequences)

    def floor(self, probe: dict[str, float]) -> float:
        """Microseconds: of decodes for reading their keys and values, of prompts for multiplying with them."""
        cached = _spec(self.codes).block_bytes(1)
        work = Work(layers=0, head=0, weights=0, cached=cached, attention=4 * HEADS * HEAD, states=0)
        before = [([0] * context, 1) for context, _ in self.sequences]
        after = [([0] * (context + new), 1) for context, new in self.sequences]
        if all(new == 1 for _, new in self.sequences):
            after = [([0] * context, 2) for context, _ in self.sequences]
        return 1e6 * (work.seconds(after, 0, probe) - work.seconds(before, 0, probe))


CASES = (
    Case("64 decodes behind 4096", [(4095, 1)] * 64),
    Case("64 decodes behind 4096, fp8", [(4095, 1)] * 64, torch.float8_e4m3fn),
    Case("1 decode behind 32768", [(32767, 1)]),
    Case("256 decodes behind 1024", [(1023, 1)] * 256),
    Case("8 prompts of 2048", [(0, 2048)] * 8),
    Case("2048 tokens behind 30720", [(30720, 2048)]),
)


def run(args: argparse.Namespace) -> None:
    """Microseconds of a layer's attention within a CUDA graph, over pages in random order; keys and values of the
    step itself are stored before, which has a line of its own."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --preset attention needs a CUDA device, and torch sees none")
    device = torch.device("cuda")
    probe = Probe().run()
    print(f"{torch.cuda.get_device_name()}, {probe_text(probe)}\n{'':<50} {'us':>9} {'floor':>9} {'of floor':>8}")
    results = {}
    for case in CASES:
        for backend in map(load_backend, BACKENDS):
            if backend.unsupported_reason(device, torch.bfloat16, _spec(case.codes), PAGE) is None:
                name = f"{case.name}, {type(backend).__name__}"
                attend, _ = calls(case, backend, device)
                results[name] = _shown(name, in_a_graph(attend, args.rounds), case.floor(probe))
    for case in (case for case in CASES if case.codes is None):
        _, store = calls(case, load_backend("triton"), device)
        moved = 2 * case.tokens * _spec(None).block_bytes(1)
        name = f"storing {case.tokens} tokens"
        results[name] = _shown(name, in_a_graph(store, args.rounds), moved / probe["read_gb_per_s"] / 1e3)
    finish(args, device=torch.cuda.get_device_name(), probe=probe, rounds=args.rounds, microseconds=results)


def calls(
    case: Case, backend: AttentionBackend, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Callable[[], torch.Tensor], Callable[[], Any]]:
    """What attends and stores nothing, and what stores the step's keys and values."""
    from nanovllm.attention.gpu import store

    spec = _spec(case.codes, dtype)
    counts = [-(-(context + new) // PAGE) for context, new in case.sequences]
    pages = iter(np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1)
    plan = StepPlan(
        [
            PlannedSequence(i, np.zeros(new, np.int32), context, np.array([next(pages) for _ in range(count)]), 0, None)
            for i, ((context, new), count) in enumerate(zip(case.sequences, counts, strict=True))
        ]
    )
    batch = build_batch(plan, block_size=PAGE, device=device, backend=backend, with_states=False)
    kv = torch.randn(backend.kv_shape(spec, 1 + sum(counts), PAGE), device=device).to(spec.stored)
    if case.codes is not None:  # scales that are numbers
        kv.view(torch.uint8).bitwise_and_(63)
    q, k, v = (
        torch.randn(case.tokens, heads, HEAD, device=device, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    nowhere = dataclasses.replace(batch, slot_mapping=torch.full_like(batch.slot_mapping, -1))
    return (
        lambda: backend.forward(q, k, v, kv, nowhere, scale=HEAD**-0.5),
        lambda: store(k, v, kv, batch),
    )


def _spec(codes: torch.dtype | None, dtype: torch.dtype = torch.bfloat16) -> PagedKVSpec:
    return PagedKVSpec(KV_HEADS, HEAD, dtype, codes=codes)


def _shown(name: str, found: float, floor: float) -> dict[str, float]:
    print(f"{name:<50} {found:9.1f} {floor:9.1f} {floor / found:8.0%}", flush=True)
    return {"us": found, "floor": floor}
