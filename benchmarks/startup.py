"""Seconds from `python` to the first token, and those of them that capture decoding steps as CUDA graphs."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import models
from benchmarks.report import finish

_PROGRAM = """
import logging, sys
from nanovllm import LLM, SamplingParams
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
llm = LLM(sys.argv[1])
print("first:", next(llm.stream("The capital of France is", SamplingParams(temperature=0))), flush=True)
"""
_RANDOM = """
import logging, sys
from nanovllm import LLM, SamplingParams
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True)
print("first:", llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1), use_tqdm=False)[0]["token_ids"], flush=True)
"""


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        name, program, model = args.model, _PROGRAM, args.model
        if args.shape:
            found = models.shape(args.shape, Path(folder))
            name, program, model = found.name, _RANDOM, found.paths["own"]
        # the first fetches the model and fills the file cache
        found = [_seconds(program, model) for _ in range(args.rounds + 1)][1:]
    started, captured = (statistics.median(part) for part in zip(*found, strict=True))
    print(f"from `python` to the first token of {name}: {started:.2f} s (median of {args.rounds})")
    if captured:
        print(f"of which graphs of decoding steps: {captured:.2f} s")
    finish(args, model=name, rounds=args.rounds, startup=started, capture=captured)


def _seconds(program: str, model: str) -> tuple[float, float]:
    """To the first token, and to capture graphs, 0.0 where there are none."""
    start, captured = time.perf_counter(), 0.0
    with subprocess.Popen([sys.executable, "-c", program, model], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("first:"):
                return time.perf_counter() - start, captured
            if graphs := re.match(r"captured decoding steps of .* in (\d+\.\d+) s", line):
                captured = float(graphs[1])
    raise SystemExit("the engine did not start")
