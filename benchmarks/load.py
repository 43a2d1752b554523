"""Memory of a process that loads a model (Linux).

python bench.py --preset load --ab quantization=int8
python bench.py --preset load --shape llama-3.2-1b --load-format gguf --ab quantization=gguf
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import contenders, model_of
from benchmarks.models import unquantized
from benchmarks.report import finish

_PROGRAM = """
import json, re, sys
from nanovllm import LLM

def anonymous():
    return int(re.search("RssAnon: *(.*) kB", open("/proc/self/status").read())[1]) * 1024

imported = anonymous()
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
(weights,) = llm.apply_model(lambda model: {id(p): p.numel() * p.itemsize for p in model.parameters()})
print(json.dumps({"weights": sum(weights.values()), "imported": imported, "loaded": anonymous()}))
"""
_SMALL = {"max_model_len": 64, "max_num_seqs": 1, "kvcache_memory": "4MiB", "skip_tokenizer_init": True}
_COLUMNS = ("weights", "imported", "peak", "loaded", "resident")


def run(args: argparse.Namespace) -> None:
    """By contender, the largest of the rounds: weights, and anonymous memory, which the process owns: once nanovllm is
    imported, at its peak, and when the model is loaded. Pages of mapped files, which go back to the system when it
    needs them, are in the peak of all resident memory beside it."""
    wanted = contenders(["nanovllm"], args.ab)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = model_of(args, wanted, Path(scratch))
        path = model.paths["own"]
        common = {**_SMALL, **unquantized(path), "dtype": args.dtype}
        common |= {"load_format": "dummy"} if model.random else {}
        for _ in range(args.rounds):
            for c in wanted:
                found, old = _measure(path, common | c.options), results.get(c.label, {})
                results[c.label] = {key: max(value, old.get(key, 0)) for key, value in found.items()}
    width = max(map(len, results))
    print(f"{model.name} in {args.dtype}, MiB; largest of {args.rounds}")
    print(f"{'':{width}} {' '.join(f'{column:>8}' for column in _COLUMNS)}  seconds")
    for label, row in results.items():
        sizes = " ".join(f"{row[column] / 2**20:8.0f}" for column in _COLUMNS)
        print(f"{label:{width}} {sizes} {row['seconds']:8.1f}")
    finish(args, model=model.name, dtype=args.dtype, results=results)


def _measure(path: str, options: dict[str, Any]) -> dict[str, float]:
    """Bytes and seconds of a process: the kernel keeps the peak of the total, its parts are sampled."""
    start, peaks = time.perf_counter(), {"RssAnon": 0, "VmHWM": 0}
    command = [sys.executable, "-c", _PROGRAM, path, json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            time.sleep(0.005)
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"loading ended with status {process.returncode}")
    found = json.loads(printed.splitlines()[-1])
    seconds = time.perf_counter() - start
    return {**found, "peak": peaks["RssAnon"], "resident": peaks["VmHWM"], "seconds": seconds}
