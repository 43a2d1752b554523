"""What 32 sequences cost beside plain greedy generation: sampled, and streamed. One engine, in turn.

python bench.py --preset ways32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.report import finish
from benchmarks.workload import PRESETS, Sequences, make_sequences
from nanovllm import LLM, SamplingParams

PRESET = PRESETS["batch32"]
SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


def run(args: argparse.Namespace) -> None:
    with LLM(args.model, dtype=args.dtype) as llm:
        ways: dict[str, Callable[[Sequences], None]] = {
            name: lambda sequences, options=options: _generate(llm, sequences, options)
            for name, options in SAMPLED.items()
        }
        ways["greedy, streamed"] = lambda sequences: _stream(llm, sequences)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            sequences = make_sequences(PRESET, llm.get_tokenizer().vocab_size, args.seed + number)
            for name, way in ways.items():
                llm.reset_prefix_cache()
                start = time.perf_counter()
                way(sequences)
                seconds[name].append(time.perf_counter() - start)
    results = {name: _relative(times[1:], seconds["greedy"][1:]) for name, times in seconds.items()}
    print(f"{PRESET}, {args.model} in {args.dtype}, median of {args.rounds}")
    print(f"{'':<18} {'out tok/s':>9} {'time, of greedy':>16}")
    for name, row in results.items():
        print(f"{name:<18} {row['output']:9.0f} {row['of_greedy']:16.3f}")
    finish(args, model=args.model, dtype=args.dtype, seed=args.seed, rounds=args.rounds, ways=results)


def _relative(times: list[float], greedy: list[float]) -> dict[str, float]:
    """of_greedy: the median of the rounds' ratios, as the machine's speed changes from round to round."""
    tokens = PRESET.num_seqs * PRESET.output[1]
    ratios = [mine / theirs for mine, theirs in zip(times, greedy, strict=True)]
    return {"output": tokens / statistics.median(times), "of_greedy": statistics.median(ratios)}


def _params(sequences: Sequences, options: dict[str, Any]) -> list[SamplingParams]:
    return [SamplingParams(ignore_eos=True, max_tokens=n, seed=i, **options) for i, (_, n) in enumerate(sequences)]


def _generate(llm: LLM, sequences: Sequences, options: dict[str, Any]) -> None:
    llm.generate([prompt for prompt, _ in sequences], _params(sequences, options), use_tqdm=False)


def _stream(llm: LLM, sequences: Sequences) -> None:
    """All at once: a piece of each in turn, as a server with 32 clients would ask for them."""
    params = _params(sequences, SAMPLED["greedy"])
    streams = [llm.stream(prompt, each) for (prompt, _), each in zip(sequences, params, strict=True)]
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
