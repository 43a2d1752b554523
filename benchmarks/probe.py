"""What this machine gives at this moment: it is shared, and drifts by a factor of two within an hour."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workload import Job, Sequences

_CSRC = Path(__file__).parents[1] / "nanovllm" / "csrc"
_MEETINGS = """
#include <omp.h>
#include "team.h"
extern "C" double nanoseconds(int threads, long times) {
    nanovllm::Commons commons;
    double found = 0;
    #pragma omp parallel num_threads(threads)
    {
        nanovllm::Team team(commons, omp_get_thread_num(), threads);
        team.barrier();
        const double start = omp_get_wtime();
        for (long i = 0; i < times; ++i) team.barrier();
        if (team.thread == 0) found = (omp_get_wtime() - start) / times * 1e9;
    }
    return found;
}
"""


class Probe:
    """GB/s read, GFLOP/s in bfloat16 and, without a GPU, nanoseconds of a barrier of all threads; the best of a few
    times."""

    def __init__(self, job: Job | None = None) -> None:
        """The job is not looked at: the machine is the same for all."""
        import torch

        on_gpu = torch.cuda.is_available()
        device, size, width = ("cuda", 1 << 30, 8192) if on_gpu else ("cpu", 1 << 27, 2048)
        self._wait = torch.cuda.synchronize if on_gpu else lambda: None
        self._data = torch.ones(size, device=device)  # fp32
        self._square = torch.randn(width, width, device=device).bfloat16()  # a GPU is faster on equal numbers
        self._multiply = _multiplications(self._square)
        self._barrier = None if on_gpu else _barrier()

    def run(self, sequences: Sequences | None = None) -> dict[str, Any]:
        read = min(self._timed(self._data.sum) for _ in range(5))
        multiply = min(self._timed(way) for way in self._multiply for _ in range(5))
        found: dict[str, Any] = {
            "read_gb_per_s": self._data.nbytes / read / 1e9,
            "bf16_gflop_per_s": 2 * len(self._square) ** 3 / multiply / 1e9,
        }
        if self._barrier is not None:
            found["barrier_ns"] = min(self._barrier(os.cpu_count(), 20_000) for _ in range(3))
        return found

    def _timed(self, call: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start


def probe_text(found: dict[str, float]) -> str:
    barrier = f", barrier {found['barrier_ns']:.0f} ns" if "barrier_ns" in found else ""
    return f"{found['read_gb_per_s']:.0f} GB/s, {found['bf16_gflop_per_s']:.0f} GFLOP/s{barrier}"


def _multiplications(square: Any) -> list[Callable[[], Any]]:
    """torch's and, where they were built, ours: neither is the faster one everywhere."""
    from nanovllm.ops.base import select_ops

    ops = select_ops("auto", square.device, square.dtype)
    if ops.name != "native":
        return [lambda: square @ square]
    packed, rows = ops.pack(square, gated=False), square.float()
    return [lambda: square @ square, lambda: ops.linear(rows, packed, len(square), None)]


def _barrier() -> Any:
    """The engine's own, compiled here; None without a compiler."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source, library = Path(folder, "barrier.cpp"), Path(folder, "barrier.so")
        source.write_text(_MEETINGS)
        command = ["c++", "-std=c++17", "-O2", "-fopenmp", "-shared", "-fPIC", f"-I{_CSRC}", str(source), "-o"]
        try:
            subprocess.run([*command, str(library)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        function = ctypes.CDLL(str(library)).nanoseconds
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long]
    return function
