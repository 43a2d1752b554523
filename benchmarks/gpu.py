"""All that is claimed of GPUs, measured on this one: models, Triton's kernels, and the tests that need it.

python bench.py --preset gpu                                  # all of it, into gpu.md
python bench.py --preset gpu --part qwen3-8b,tests/ops        # what begins like that, added to gpu.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine

ROOT = Path(__file__).parents[1]
MODELS = {
    "qwen3-0.6b": ("--shape", "qwen3-0.6b", "--preset", "nano,single,batch256", "--ab", "batch_invariant=true"),
    "startup": ("--shape", "qwen3-0.6b", "--preset", "startup"),
    "qwen3-8b": ("--shape", "qwen3-8b", "--preset", "single,batch64"),
    "granite-4.0-h-1b": ("--shape", "granite-4.0-h-1b", "--preset", "prompts16,batch128"),
    "qwen3-1.7b": ("--shape", "qwen3-1.7b", "--preset", "prompts16,batch128"),
}
KERNELS = {name: ("--preset", name) for name in ("attention", "quantized", "kernels", "mixers")}
MODEL_COLUMNS = ("model", "workload", "floor", "measured", "of it", "tokens/s in, out")
Line = dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Each part is a process of its own, so that one that fails harms no other, and the file is written after each. It
    is made of the lines of JSON beside it, to which every call adds; a part's last one counts."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: --preset gpu needs a CUDA device, and torch sees none")
    out, failed = Path(args.out), []
    lines = out.with_suffix(".jsonl")
    for part in _chosen(args.part):
        print(f"--- {part}", flush=True)
        found = _tested(part) if part.startswith("tests/") else _measured(part, args.rounds)
        with lines.open("a") as file:
            print(json.dumps({"part": part, **found}), file=file)
        out.write_text("\n".join(tables([json.loads(line) for line in lines.read_text().splitlines()])) + "\n")
        failed += [part] if found["status"] else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _chosen(wanted: Sequence[str]) -> list[str]:
    """Parts whose names begin with one of these: of MODELS and KERNELS, and files of tests."""
    tests = [file for file in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    parts = [*MODELS, *KERNELS, *(str(file.relative_to(ROOT)) for file in tests)]
    chosen = [part for part in parts if part.startswith(tuple(wanted))]
    return chosen or sys.exit(f"bench.py: --part {','.join(wanted)}: choose from {', '.join(parts)}")


def _measured(part: str, rounds: int) -> Line:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        line = Path(folder, "line")
        command = [sys.executable, str(ROOT / "bench.py"), *{**MODELS, **KERNELS}[part]]
        done = subprocess.run([*command, "--rounds", str(rounds), "--json", str(line)], cwd=ROOT)
        return {"status": done.returncode, **(json.loads(line.read_text()) if line.exists() else machine())}


def _tested(part: str) -> Line:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rf", part]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line.strip())
    failures = [line for line in output if line.startswith("FAILED ")]
    return {"status": process.returncode, **machine(), "tests": output[-1] if output else "", "failures": failures}


def tables(lines: list[Line]) -> list[str]:
    """Markdown, with docs/benchmarks.md's rows and units."""
    last = {line["part"]: line for line in lines}
    of_models = [last[part] for part in MODELS if part in last]
    text = _section("models", of_models, MODEL_COLUMNS, [row for line in of_models for row in _of_model(line)])
    for part in KERNELS:
        if "microseconds" in last.get(part, {}):
            found = last[part]["microseconds"]
            columns = list(dict.fromkeys(name for row in found.values() for name in row))
            rows = [(name, *(_digits(row[c]) if c in row else "" for c in columns)) for name, row in found.items()]
            text += _section(part, [last[part]], (f"{part}, microseconds", *columns), rows)
    tests = [line for line in last.values() if "tests" in line]
    text += _section("tests", tests, ("`pytest -m gpu`", "result"), [(line["part"], line["tests"]) for line in tests])
    text += [f"- {failure}" for line in tests for failure in line["failures"]]
    return text + [f"- failed: {line['part']}" for line in last.values() if line["status"]]


def _section(title: str, lines: list[Line], columns: Sequence[str], rows: list[tuple[str, ...]]) -> list[str]:
    """Below the machines and commits that the lines are of."""
    if not lines:
        return []
    where = dict.fromkeys(f"{line['hardware']}, torch {line['torch']}, commit {line['commit']}" for line in lines)
    header, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [f"## {title}", "", *where, "", header, "|" + "---|" * len(columns), *body, ""]


def _of_model(line: Line) -> Iterator[tuple[str, ...]]:
    """Floors are those of the machine as it was measured in the same run."""
    if "startup" in line:
        yield _name(line), "from `python` to the first token", "", _time(line["startup"]), "", ""
        yield _name(line), "of which graphs are captured", "", _time(line["capture"]), "", ""
    for preset in line.get("presets", {}).values():
        for label, row in preset["results"].items():
            share = row.get("of_roof")
            floor, of_it = (_time(share * row["seconds"]), f"{share:.0%}") if share else ("", "")
            what = preset["shape"] + ("" if label == "nanovllm" else f", {label}")
            yield _name(line), what, floor, _time(row["seconds"]), of_it, f"{row['input']:.0f}, {row['output']:.0f}"


def _name(line: Line) -> str:
    return line["model"].removesuffix(", random weights")


def _time(seconds: float) -> str:
    return f"{_digits(seconds)} s" if seconds >= 1 else f"{_digits(seconds * 1e3)} ms"


def _digits(number: float) -> str:
    """Three of them, all of a whole part."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
