"""Seconds from `python` to the first token."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import models
from benchmarks.report import finish

_PROGRAM = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1])
print(next(llm.stream("The capital of France is", SamplingParams(temperature=0))), flush=True)
"""
_RANDOM = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True)
print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1), use_tqdm=False)[0]["token_ids"], flush=True)
"""


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        name, program, model = args.model, _PROGRAM, args.model
        if args.shape:
            found = models.shape(args.shape, Path(folder))
            name, program, model = found.name, _RANDOM, found.paths["own"]
        # the first fetches the model and fills the file cache
        seconds = [_seconds(program, model) for _ in range(args.rounds + 1)]
    median = statistics.median(seconds[1:])
    print(f"from `python` to the first token of {name}: {median:.2f} s (median of {args.rounds})")
    finish(args, model=name, rounds=args.rounds, startup=median)


def _seconds(program: str, model: str) -> float:
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", program, model], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the engine did not start")
        return time.perf_counter() - start
