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
    ("--preset", "attention"),
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
    found += [
        "| model or kernel | workload | floor | measured | of it | tokens/s in, out |",
        "|---|---|---|---|---|---|",
    ]
    return found + [row for line in lines for row in _rows(json.loads(line))]


def _rows(line: dict[str, Any]) -> Iterator[str]:
    """Floors are those of the machine as it was measured in the same run."""
    if "startup" in line:
        yield f"| {line['model']} | from `python` to the first token | | {line['startup']:.2f} s | | |"
        yield f"| {line['model']} | of which graphs are captured | | {line['capture']:.2f} s | | |"
    for name, preset in line.get("presets", {}).items():
        for label, row in preset["results"].items():
            what = f"{name}: {preset['shape']}" + ("" if label == "nanovllm" else f", {label}")
            share, speeds = row.get("of_roof"), f"{row['input']:.0f}, {row['output']:.0f}"
            floor = (
                f"{share * row['seconds']:.3g} s | {row['seconds']:.3g} s | {share:.0%}"
                if share
                else (f"| {row['seconds']:.3g} s |")
            )
            yield f"| {line['model']} | {what} | {floor} | {speeds} |"
    for name, found in line.get("microseconds", {}).items():
        yield _kernel(name, found)


def _kernel(name: str, found: dict[str, float]) -> str:
    """A line of `attention`, `mixers` or `kernels`: beside its floor, or what else it should not take longer than."""
    ours = found["us"] if "us" in found else found["triton"]
    beside = next(found[key] for key in ("floor", "beside", "torch") if key in found)
    what = "" if "floor" in found else " (other kernels)"
    return f"| {name} | | {beside:.3g} us{what} | {ours:.3g} us | {beside / ours:.0%} | |"


def _bench(*options: str) -> bool:
    return subprocess.run([sys.executable, str(ROOT / "bench.py"), *options], cwd=ROOT).returncode == 0
