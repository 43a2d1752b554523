"""Throughput of nanovllm and of its peers on the same token ids.

    python bench.py --preset batch32
    python bench.py --preset single,prefill,batch32 --engine nanovllm,hf --plot chart.png
    python bench.py --preset batch32 --engine nanovllm,vllm --python vllm=/path/to/venv/bin/python
    python bench.py --preset batch32 --ab enable_prefix_caching=false --ab max_num_batched_tokens=8192
    python bench.py --preset single --shape qwen3-0.6b --engine nanovllm,hf
    python bench.py --preset accuracy

Sequences of random tokens (seeded) run greedily to their full length. Each engine lives in a process of its
own; they take turns, `--rounds` times, and medians are shown, so that a machine that changes speed changes it
for all; what it gives is measured in each round. The tables are followed by one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import signal
import sys

from benchmarks.compare import run
from benchmarks.engines import ENGINES
from benchmarks.models import SHAPES
from benchmarks.workload import PRESETS, Preset

OTHERS = {
    "startup": "seconds from python to the first token",
    "load": "memory of a process that loads a model (Linux)",
    "pool": "page pools of 1,000 and 1,000,000 pages",
    "linear": "linear layers, native against torch's",
    "host_cost": "microseconds of a decoding step beside the model",
    "sampling": "drawing tokens, native against torch",
    "kernels": "Triton's kernels against torch's (needs a CUDA device)",
    "quantized": "linear layers by quantised weights (needs a CUDA device)",
    "attention": "attention's backends, beside what bounds them",
    "gpu": "all that is claimed of GPUs, and their tests, into --out's file (needs one)",
    "mixers": "Mamba2 and mixtures of experts, beside what bounds them (needs a CUDA device)",
    "ways32": "32 sequences sampled and streamed, against greedy generation",
    "all_reduce": "sums between two ranks, through shared memory and by gloo",
    "ranks": "bytes between the processes of a step, and its milliseconds",
    "context": "a decoding step behind 8,000 tokens (--max-input), against reading what it needs",
    "accuracy": "KL divergence to transformers in fp32: of bfloat16, int8, int4 and ggml's Q4_1",
}
NAMES = (*ENGINES, "nanovllm-torch")
CUSTOM = Preset(64, (100, 1024), (100, 1024))


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped engines end with us
    if args.preset[0] in OTHERS:
        importlib.import_module(f"benchmarks.{args.preset[0]}").run(args)
    else:
        run(args, {name: _adapted(PRESETS.get(name, CUSTOM), args) for name in args.preset})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = "; ".join(f"{name}: {preset}" for name, preset in PRESETS.items())
    others = "; ".join(f"{name}: {text}" for name, text in OTHERS.items())
    parser.add_argument("--preset", type=_list, default=["custom"], help=f"one or several of {presets}. Or {others}")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=SHAPES, help="instead of --model: its published sizes, random weights")
    parser.add_argument(
        "--load-format", default="auto", help="dummy: random weights for a config.json; gguf: a --shape as such a file"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", type=_list, default=["nanovllm"], help=f"one or several of {', '.join(NAMES)}")
    parser.add_argument(
        "--ab", action="append", default=[], metavar="OPTION=VALUE[,...]", help="another nanovllm with these options"
    )
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="its interpreter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="to append the JSON line to")
    parser.add_argument("--plot", metavar="FILE", help="a chart of this run, or of all in --json's file")
    parser.add_argument("--out", metavar="FILE", default="gpu.md", help="of --preset gpu: where its tables are written")
    parser.add_argument(
        "--part", type=_list, default=[""], help="of --preset gpu: those that begin so: qwen3-8b,tests/ops"
    )
    for name in ("num-seqs", "min-input", "max-input", "min-output", "max-output"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    args = parser.parse_args()
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for what, given, known in (("engine", args.engine, NAMES), ("preset", args.preset, (*PRESETS, *OTHERS, "custom"))):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    if len(args.preset) > 1 and set(args.preset) & set(OTHERS):
        parser.error(f"{', '.join(OTHERS)} run alone")
    if args.load_format == "gguf" and not args.shape:
        parser.error("--load-format gguf writes a --shape; a GGUF file is a --model")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if wrong := [part for change in args.ab for part in change.split(",") if "=" not in part]:
        parser.error(f"--ab {wrong[0]}: give OPTION=VALUE")


def _adapted(preset: Preset, args: argparse.Namespace) -> Preset:
    """With what the command line says instead."""
    lengths = {
        "input": (args.min_input or preset.input[0], args.max_input or preset.input[1]),
        "output": (args.min_output or preset.output[0], args.max_output or preset.output[1]),
    }
    return dataclasses.replace(preset, num_seqs=args.num_seqs or preset.num_seqs, **lengths)


def _list(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
