"""Triton's kernels against torch's, on a CUDA device.

python bench.py --preset kernels
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.report import finish
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams

TOKENS = (1, 64, 4096)
HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB = 4096, 14336, 32, 8, 128, 151936  # of an 8B model
CALLS = 20  # between two looks at the clock
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1},
}


class Case(NamedTuple):
    """size: bytes that have to be read and written at least."""

    name: str
    size: int
    call: Callable[[TorchOps], Any]


def run(args: argparse.Namespace) -> None:
    """Microseconds of a call within a CUDA graph, with inputs that were just used, as in a model; of drawing, which
    the host takes part in, until the tokens are there. GB/s are of what has to be moved; the roof is a copy's."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --preset kernels needs a CUDA device, and torch sees none")
    from nanovllm.ops.triton_ops import TritonOps

    makers, copy = {"triton": TritonOps(), "torch": TorchOps()}, _copy_gb_per_s(args.rounds)
    print(f"{torch.cuda.get_device_name()}, a copy moves {copy:.0f} GB/s")
    print(f"{'':<34} {'us':>9} {'GB/s':>7} {'of copy':>8} {'torch us':>9} {'ratio':>6}")
    results: dict[str, dict[str, float]] = {}
    for timed, cases in ((in_a_graph, _layers()), (_with_the_host, _draws())):
        for case in cases:
            found = {
                name: timed(lambda ops=ops, case=case: case.call(ops), args.rounds) for name, ops in makers.items()
            }
            speed = case.size / found["triton"] / 1e3
            results[case.name] = {**found, "gb_per_s": speed}
            print(f"{case.name:<34} {found['triton']:9.1f} {speed:7.0f} {speed / copy:8.0%} {found['torch']:9.1f} "
                  f"{found['torch'] / found['triton']:6.2f}", flush=True)  # fmt: skip
    finish(args, device=torch.cuda.get_device_name(), copy_gb_per_s=copy, rounds=args.rounds, microseconds=results)


def _layers() -> Iterator[Case]:
    weight, bias = random(HIDDEN), random(HIDDEN)
    square, table = random(HIDDEN, HIDDEN) / HIDDEN, random(VOCAB, HIDDEN)
    q_weight, k_weight = random(HEAD), random(HEAD)
    for tokens in TOKENS:
        x, gates = random(tokens, HIDDEN), random(tokens, 2 * INNER)
        qkv = random(tokens, HEADS + 2 * KV_HEADS, HEAD)
        q, k, _ = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        qk = qkv[:, : HEADS + KV_HEADS]
        angles = random(tokens, 1, HEAD // 2).float()
        turn = angles.cos(), angles.sin()
        ids = torch.randint(0, VOCAB, (tokens,), device="cuda")
        both, heads, products = 2 * x.nbytes, 2 * qk.numel() * 2, square.nbytes + 3 * x.nbytes
        yield Case(f"rms_norm, {tokens}", both, lambda ops, x=x: ops.rms_norm(x, weight, 1e-6))
        yield Case(f"layer_norm, {tokens}", both, lambda ops, x=x: ops.layer_norm(x, weight, bias, 1e-6))
        yield Case(f"rotate, {tokens}", heads, lambda ops, qk=qk, turn=turn: ops.rotate(qk, *turn))
        yield Case(
            f"norm_and_rotate, {tokens}",
            heads,
            lambda ops, q=q, k=k, turn=turn: ops.norm_and_rotate(q, k, q_weight, k_weight, 1e-6, *turn),
        )
        yield Case(
            f"silu and multiply, {tokens}",
            gates.nbytes * 3 // 2,
            lambda ops, g=gates: ops.activate(g, "silu", gated=True),
        )
        yield Case(f"embed, {tokens}", both, lambda ops, ids=ids: ops.embed(table, ids, 0))
        yield Case(
            f"linear + residual, {tokens}", products, lambda ops, x=x, r=x * 0: ops.plain_linear(x, square, None, r)
        )


def _draws() -> Iterator[Case]:
    tokens = np.random.default_rng(0).integers(VOCAB, size=(2, 500)).astype(np.int32)
    for count in (1, 64, 256):
        logits = torch.randn(count, VOCAB, device="cuda") * 2.5
        uniforms = np.linspace(0.01, 0.99, count)
        for name, options in DRAWS.items():
            rows = [SampleRow(SamplingParams(**options), 0, 0, *tokens)] * count
            yield Case(
                f"{name}, {count} rows",
                logits.nbytes,
                lambda ops, logits=logits, rows=rows, uniforms=uniforms: _drawn(ops, logits, rows, uniforms),
            )
        ids = torch.arange(count, device="cuda")
        yield Case(f"20 logprobs, {count} rows", logits.nbytes, lambda ops, x=logits, ids=ids: _logprobs(ops, x, ids))


def _drawn(ops: TorchOps, logits: torch.Tensor, rows: list[SampleRow], uniforms: np.ndarray) -> np.ndarray:
    if rows[0].params.uses_penalties:
        ops.sampling.penalise(logits, dict(enumerate(rows)))
    greedy = rows[0].params.greedy
    return (ops.sampling.argmax(logits) if greedy else ops.sampling.draw(logits, rows, uniforms)).cpu().numpy()


def _logprobs(ops: TorchOps, logits: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    found = ops.sampling.log_softmax(logits)
    return ops.sampling.token_logprobs(found, ids, [20] * len(ids)).values.cpu().numpy()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _copy_gb_per_s(rounds: int) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_a_graph(lambda: target.copy_(source), rounds) / 1e3


def in_a_graph(call: Callable[[], Any], rounds: int) -> float:
    """Microseconds of a call, the median of the rounds."""
    for _ in range(3):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def _with_the_host(call: Callable[[], Any], rounds: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)
