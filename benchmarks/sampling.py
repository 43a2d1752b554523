"""A token for each of 32 rows over SmolLM2's vocabulary: the native kernels and torch's in turn."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish
from nanovllm.layers.sampler import sample
from nanovllm.ops.base import SamplingOps
from nanovllm.ops.library import load_library
from nanovllm.ops.native_sampling import NativeSampling
from nanovllm.ops.torch_sampling import TorchSampling
from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams

ROWS, VOCAB, SEEN = 32, 49152, 500
ROUNDS = 7
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda x: x * 2.5,
    "flat": lambda x: x * 0.01,
    "equal": lambda x: x * 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_p 0.999": {"temperature": 0.8, "top_p": 0.999},
    "top_k 50, top_p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
}


def run(args: argparse.Namespace) -> None:
    noise = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    makers: dict[str, SamplingOps] = {"native": NativeSampling(load_library()), "torch": TorchSampling()}
    tokens = np.random.default_rng(0).integers(VOCAB, size=(2, SEEN)).astype(np.int32)
    results: dict[str, dict[str, float]] = {}
    print(f"milliseconds for {ROWS} rows of {VOCAB}" + " " * 4 + "  ".join(f"{name:>7}" for name in makers))
    for kind, options in KINDS.items():
        rows = [SampleRow(SamplingParams(**options), i, 0, *tokens) for i in range(ROWS)]
        for shape, change in SHAPES.items():
            logits = change(noise)
            times: dict[str, list[float]] = {name: [] for name in makers}
            for _ in range(ROUNDS):
                for name, ops in makers.items():
                    times[name].append(_seconds(ops, logits.clone(), rows))
            found = results[f"{kind}, {shape}"] = {name: statistics.median(t) * 1e3 for name, t in times.items()}
            print(f"{kind + ', ' + shape:<35}" + "  ".join(f"{ms:7.2f}" for ms in found.values()), flush=True)
    finish(args, milliseconds=results)


def _seconds(ops: SamplingOps, logits: torch.Tensor, rows: list[SampleRow]) -> float:
    start = time.perf_counter()
    sample(logits, rows, ops)
    return time.perf_counter() - start


if __name__ == "__main__":
    run(argparse.Namespace(json=None, plot=None))
