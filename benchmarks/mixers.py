"""Mamba2 and mixtures of experts by Triton's kernels, beside what they should not take much longer than.

python bench.py --preset mixers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.kernels import in_a_graph, random
from benchmarks.report import finish
from nanovllm.batch import Batch
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights

MAMBA = Mamba2Sizes(1536, 48, 64, 1, 128, 4, 1e-5)  # of Granite 4.0 H 1B
HIDDEN, INNER, EXPERTS, CHOICES = 2048, 768, 128, 8  # of Qwen3 30B A3B
DECODES, PROMPTS, TOKENS = (1, 16, 128), ((1, 2048), (16, 2048)), (1, 128, 4096)


class Case(NamedTuple):
    name: str
    call: Callable[[], Any]
    beside: Callable[[], Any]


def run(args: argparse.Namespace) -> None:
    """Microseconds of a call within a CUDA graph: of decodes beside a copy of their states, of prompts beside the
    layer's two projections, of a mixture beside a dense MLP that multiplies as often."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --preset mixers needs a CUDA device, and torch sees none")
    print(f"{torch.cuda.get_device_name()}\n{'':<34} {'us':>9} {'beside':>9} {'ratio':>6}")
    results = {}
    for case in cases():
        ours, beside = (in_a_graph(call, args.rounds) for call in (case.call, case.beside))
        results[case.name] = {"us": ours, "beside": beside}
        print(f"{case.name:<34} {ours:9.1f} {beside:9.1f} {ours / beside:6.2f}", flush=True)
    finish(args, device=torch.cuda.get_device_name(), rounds=args.rounds, microseconds=results)


def cases() -> Iterator[Case]:
    for count in DECODES:
        states = random(count + 1, MAMBA.num_heads, MAMBA.head_dim, MAMBA.state_size).float()
        target = torch.empty_like(states[1:])
        yield Case(
            f"mamba2, {count} decodes",
            _mamba2(count, 1, states),
            lambda states=states, target=target: target.copy_(states[1:]),
        )
    into = random(sum(MAMBA.in_proj_shards.values()), MAMBA.hidden_size)
    out = random(MAMBA.hidden_size, MAMBA.inner_size)
    for count, length in PROMPTS:
        states = random(count + 1, MAMBA.num_heads, MAMBA.head_dim, MAMBA.state_size).float()
        x, y = random(count * length, MAMBA.hidden_size), random(count * length, MAMBA.inner_size)
        yield Case(
            f"mamba2, {count} prompts of {length}",
            _mamba2(count, length, states),
            lambda x=x, y=y: (F.linear(x, into), F.linear(y, out)),
        )
    gate_up, down = random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)
    wide, narrow = random(2 * INNER * CHOICES, HIDDEN), random(HIDDEN, INNER * CHOICES)
    for tokens in TOKENS:
        x, scores, fed = random(tokens, HIDDEN), random(tokens, EXPERTS).float(), random(tokens, INNER * CHOICES)
        yield Case(
            f"mixture, {tokens} tokens",
            _mixture(x, scores, gate_up, down),
            lambda x=x, fed=fed: (F.linear(x, wide), F.linear(fed, narrow)),
        )


def _mamba2(count: int, length: int, states: torch.Tensor) -> Callable[[], Any]:
    """Sequences that go on from slots 1 to count."""
    from nanovllm.ops.triton_ops import TritonOps

    ops, fp32 = TritonOps(), torch.float32
    projected = random(count * length, sum(MAMBA.in_proj_shards.values()))
    filters, bias = random(MAMBA.conv_kernel, MAMBA.conv_size).to(fp32), random(MAMBA.conv_size).to(fp32)
    A, D, dt_bias = -random(MAMBA.num_heads).to(fp32).exp(), *random(2, MAMBA.num_heads).to(fp32)
    weights = Mamba2Weights(MAMBA, filters, bias, A, D, dt_bias, random(MAMBA.inner_size).to(fp32))
    conv_states = random(count + 1, MAMBA.conv_kernel - 1, MAMBA.conv_size)
    plan = ops.plan_mamba2(_batch(count, length, projected.device), MAMBA)
    return lambda: ops.mamba2(projected, weights, conv_states, states, plan)


def _batch(count: int, length: int, device: torch.device) -> Batch:
    none = torch.empty(0, dtype=torch.int64, device=device)
    ones = torch.ones(count, dtype=torch.int32, device=device)
    return Batch(
        input_ids=none,
        positions=torch.arange(4096, 4096 + length, device=device).repeat(count),
        query_start=torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device),
        seq_lens=ones * (4096 + length),
        slot_mapping=none,
        block_tables=none,
        state_slots=ones.cumsum(0, dtype=torch.int32),
        logits_rows=none,
        max_query_len=length,
        max_seq_len=4096 + length,
    )


def _mixture(
    x: torch.Tensor, scores: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> Callable[[], torch.Tensor]:
    from nanovllm.ops.triton_ops import TritonOps

    ops = TritonOps()
    return lambda: ops.mixture(x, *ops.route(scores, CHOICES, normalise=True), gate_up, down, INNER, "silu")
