"""What a run shows: a table for people, then one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.workload import Preset, Sequences


def speed(preset: Preset, sequences: Sequences, seconds: float) -> float:
    """Tokens a second: of output, or of input where there is hardly any output."""
    counted = "input" if preset.output[1] == 1 else "output"
    tokens = sum(len(p) for p, _ in sequences) if counted == "input" else sum(n for _, n in sequences)
    return tokens / seconds


def print_table(title: str, results: dict[str, dict[str, Any]]) -> None:
    """ratio: how many times faster the first one is."""
    width = max([14, *map(len, results)])
    print(f"\n{title}")
    print(
        f"{'engine':<{width}} {'seconds':>8} {'in tok/s':>9} {'out tok/s':>9} {'of roof':>8} {'load s':>7} {'ratio':>6}"
    )
    first = next(iter(results.values()))["seconds"]
    for label, row in results.items():
        share = f"{row['of_roof']:.0%}" if "of_roof" in row else "-"
        print(
            f"{label:<{width}} {row['seconds']:8.2f} {row['input']:9.0f} {row['output']:9.0f} {share:>8} "
            f"{row['load']:7.1f} {row['seconds'] / first:6.2f}"
        )
    print(flush=True)


def finish(args: argparse.Namespace, **measured: Any) -> None:
    """Print the line of JSON, append it to --json's file and draw --plot's."""
    line = {**machine(), **_rounded(measured)}
    print(json.dumps(line))
    if args.json:
        with open(args.json, "a") as file:
            print(json.dumps(line), file=file)
    if args.plot:
        from benchmarks.plot import plot, read_lines

        plot(read_lines(args.json) if args.json else [line], args.plot)


def machine() -> dict[str, str]:
    """What every figure depends on."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {"hardware": f"{cpu_name()} x {os.cpu_count()}{gpu}", "torch": torch.__version__, "commit": _commit()}


def _rounded(value: Any) -> Any:
    """Four digits of every float are more than a measurement has."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
