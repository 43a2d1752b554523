"""Peak memory of loading a model (Linux)."""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import finish

_PROGRAM = """
import sys
from nanovllm import LLM
LLM(sys.argv[1], dtype=sys.argv[2], load_format=sys.argv[3], max_model_len=64, max_num_seqs=1,
    kvcache_memory="64MiB", skip_tokenizer_init=True)
"""


def run(args: argparse.Namespace) -> None:
    """Peak memory of a process that loads the model, with hardly any cache.

    Anonymous memory is what the process owns; pages of mapped files come on top of it in the
    total, and go back to the system when it needs them.
    """
    from nanovllm.weights.checkpoint import open_checkpoint
    from nanovllm.weights.hub import resolve_model

    path = resolve_model(args.model)
    elements = sum(math.prod(tensor.shape) for tensor in open_checkpoint(path, args.load_format).tensors())
    size = elements * (4 if args.dtype == "float32" else 2)
    runs = [_peak_memory([sys.executable, "-c", _PROGRAM, str(path), args.dtype, args.load_format])
            for _ in range(args.rounds)]  # fmt: skip
    found = {key: max(run[key] for run in runs) for key in ("anonymous", "total")}
    seconds = statistics.median(run["seconds"] for run in runs)
    print(f"{args.model}, {args.dtype}: weights of {size / 2**30:.2f} GiB; peak {found['anonymous'] / 2**30:.2f} GiB "
          f"anonymous, {found['total'] / 2**30:.2f} GiB with mapped files; {seconds:.1f} s")  # fmt: skip
    finish(args, model=args.model, dtype=args.dtype, model_bytes=size, peak_bytes=found, seconds=seconds)


def _peak_memory(command: list[str]) -> dict[str, float]:
    """Bytes and seconds of a process: the kernel keeps the peak of the total, its parts are sampled."""
    start, peaks = time.perf_counter(), {"RssAnon": 0, "VmHWM": 0}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"loading ended with status {process.returncode}")
    return {"anonymous": peaks["RssAnon"], "total": peaks["VmHWM"], "seconds": time.perf_counter() - start}
