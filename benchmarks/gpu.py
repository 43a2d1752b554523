"""All that is claimed of GPUs, on this one: the presets, Triton's kernels, the tests; then docs/benchmarks.md's table.

python bench.py --preset gpu
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import commit

ROOT = Path(__file__).parents[1]
RUNS = (
    ("--shape", "qwen3-0.6b", "--preset", "nano,single,batch256", "--ab", "batch_invariant=true"),
    ("--shape", "qwen3-8b", "--preset", "single,batch64"),
    ("--shape", "granite-4.0-h-1b", "--preset", "prompts16,batch128"),
    ("--shape", "qwen3-1.7b", "--preset", "prompts16,batch128"),
    ("--shape", "qwen3-0.6b", "--preset", "startup"),
    ("--preset", "kernels"),
    ("--preset", "mixers"),
)


def run(args: argparse.Namespace) -> None:
    """Each run is a process of its own, so that one that fails harms no other."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --preset gpu needs a CUDA device, and torch sees none")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        lines = Path(folder, "lines")
        failed = [
            options for options in RUNS if not _bench(*options, "--json", str(lines), "--rounds", str(args.rounds))
        ]
        print("\n".join(table(lines.read_text().splitlines() if lines.exists() else [])))
    for options in failed:
        print(f"failed: bench.py {' '.join(options)}")
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q"]
    sys.exit(subprocess.run(tests, cwd=ROOT).returncode or bool(failed))


def table(lines: list[str]) -> list[str]:
    """Markdown of the JSON lines that `bench.py` writes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = [f"{device}, torch {torch.__version__}, commit {commit()}", ""]
    found += ["| model | workload | seconds | tokens/s in, out | share of the roof |", "|---|---|---|---|---|"]
    return found + [row for line in lines for row in _rows(json.loads(line))]


def _rows(line: dict[str, Any]) -> Iterator[str]:
    if "startup" in line:
        yield f"| {line['model']} | from `python` to the first token | {line['startup']:.2f} | | |"
    for name, preset in line.get("presets", {}).items():
        for label, row in preset["results"].items():
            change = "" if label == "nanovllm" else f", {label}"
            share = f"{row['of_roof']:.0%}" if "of_roof" in row else ""
            speeds = f"{row['input']:.0f}, {row['output']:.0f}"
            yield f"| {line['model']} | {name}: {preset['shape']}{change} | {row['seconds']:.2f} | {speeds} | {share} |"


def _bench(*options: str) -> bool:
    return subprocess.run([sys.executable, str(ROOT / "bench.py"), *options], cwd=ROOT).returncode == 0
