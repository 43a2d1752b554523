"""Bars from lines of JSON that bench.py wrote, a panel for each preset.

python -m benchmarks.plot RUNS.jsonl CHART.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Speeds = dict[str, dict[str, float]]
"""{title of a panel: {engine: tokens a second}}"""


def read_lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines() if line.strip()]


def collect(lines: list[dict[str, Any]]) -> Speeds:
    """Of all runs that compared engines; a later run of an engine takes the place of an earlier one."""
    found: Speeds = {}
    several = len({line["model"] for line in lines if "presets" in line}) > 1
    for line in lines:
        for name, preset in line.get("presets", {}).items():
            counted = "input" if preset["shape"].endswith(", 1 out)") else "output"
            title = f"{name}: {preset['shape']}\n{counted} tok/s" + (f", {line['model']}" if several else "")
            speeds = {engine: row[counted] for engine, row in preset["results"].items()}
            found.setdefault(title, {}).update(speeds)
    return found


def plot(lines: list[dict[str, Any]], file: str) -> None:
    """SystemExit if there is nothing to draw, or no matplotlib."""
    speeds = collect(lines)
    if not speeds:
        raise SystemExit("--plot draws comparisons of engines, and there is none")
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib ({error}): pip install 'nanovllm[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    engines = list(dict.fromkeys(engine for row in speeds.values() for engine in row))
    columns = min(3, len(speeds))
    rows = -(-len(speeds) // columns)
    size = (5 * columns, (0.9 + 0.32 * len(engines)) * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(speeds) :]:
        axis.set_visible(False)
    for axis, (title, row) in zip(axes.flat, speeds.items(), strict=False):
        names = [engine for engine in engines if engine in row]
        bars = axis.barh(names, [row[n] for n in names], color=[f"C{engines.index(n) % 10}" for n in names])
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(len(engines) - 0.5, -0.5)  # the first on top, and bars of one height everywhere
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    plot(read_lines(sys.argv[1]), sys.argv[2])
