"""Linear layers: native against torch's."""

from __future__ import annotations

import argparse
import math
import time

import torch

from benchmarks.probe import Probe
from benchmarks.report import finish

_LINEARS: dict[str, dict[tuple[int, int], int]] = {  # {model: {(rows, columns) of a weight: how many there are}}
    "SmolLM2-135M": {(960, 576): 30, (576, 576): 30, (3072, 576): 30, (576, 1536): 30, (49152, 576): 1},
    "Qwen3-0.6B": {(4096, 1024): 28, (1024, 2048): 28, (6144, 1024): 28, (1024, 3072): 28, (151936, 1024): 1},
}


def run(args: argparse.Namespace) -> None:
    """All linear layers of a step in bfloat16, one after the other, for several numbers of rows.

    Weights come from memory, as in a model: copies of each shape take turns. A weight of the head is
    multiplied for at most 64 rows, as no step samples from more. The roof is the probe's: whichever
    takes longer, reading the weights or multiplying.
    """
    results, probe_machine = [], Probe()
    print(f"{'model':<14} {'rows':>5} {'ms':>7} {'GB/s':>6} {'GFLOP/s':>8} {'of roof':>8} {'oneDNN packed':>14} "
          f"{'F.linear':>9}")  # fmt: skip
    for model, shapes in _LINEARS.items():
        for rows in (1, 8, 32, 64, 256, 1024):
            probe, seconds, size, flop = {}, dict.fromkeys(("native", "packed", "plain"), 0.0), 0, 0
            for (n, k), count in shapes.items():
                found = probe_machine.run()
                probe = {key: max(found[key], probe.get(key, 0)) for key in ("read_gb_per_s", "bf16_gflop_per_s")}
                m = min(rows, 64) if n > 40000 else rows
                for name, each in _time_linear(n, k, m, args.rounds).items():
                    seconds[name] += each * count
                size, flop = size + count * n * k * 2, flop + count * n * k * m * 2
            ms = seconds["native"] * 1e3
            roof = max(size / probe["read_gb_per_s"], flop / probe["bf16_gflop_per_s"]) / 1e6
            row = {"model": model, "rows": rows, "ms": ms, "gb_per_s": size / ms / 1e6, "gflop_per_s": flop / ms / 1e6,
                   "of_roof": roof / ms, **probe}  # fmt: skip
            row |= {name: seconds[name] / seconds["native"] for name in ("packed", "plain")}
            results.append(row)
            print(f"{model:<14} {rows:5} {ms:7.2f} {row['gb_per_s']:6.1f} {row['gflop_per_s']:8.0f} {roof / ms:8.0%} "
                  f"{row['packed']:13.2f}x {row['plain']:8.2f}x", flush=True)  # fmt: skip
    finish(args, rounds=args.rounds, results=results)


def _time_linear(n: int, k: int, rows: int, rounds: int) -> dict[str, float]:
    """Seconds of x [rows, k] times a weight [n, k]; the best of the rounds, contenders in turn."""
    from nanovllm.ops.base import select_ops

    cpu = torch.device("cpu")
    copies = max(2, min(60, 100_000_000 // (n * k * 2)))
    weights = [torch.randn(n, k).bfloat16() for _ in range(copies)]
    x = torch.randn(rows, k)
    rounded = x.bfloat16()
    native, packing = (select_ops(name, cpu, torch.bfloat16) for name in ("native", "torch"))
    mine = [native.pack(w, gated=False) for w in weights]
    packed = [packing.pack(w, gated=False) for w in weights]
    contenders = {
        "native": lambda i: native.linear(x, mine[i], n, None),
        "packed": lambda i: packing.linear(rounded, packed[i], n, None),
        "plain": lambda i: torch.nn.functional.linear(rounded, weights[i]),
    }
    best = dict.fromkeys(contenders, math.inf)
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            for i in range(copies):
                call(i)
            best[name] = min(best[name], (time.perf_counter() - start) / copies)
    return best
