"""Seconds from `python` to the first token."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.report import finish

_PROGRAM = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1])
print(next(llm.stream("The capital of France is", SamplingParams(temperature=0))), flush=True)
"""


def run(args: argparse.Namespace) -> None:
    seconds = []
    for _ in range(args.rounds + 1):  # the first fetches the model and fills the file cache
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", _PROGRAM, args.model], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("the engine did not start")
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    print(f"from `python` to the first token of {args.model}: {median:.2f} s (median of {args.rounds})")
    finish(args, model=args.model, rounds=args.rounds, seconds=median)
