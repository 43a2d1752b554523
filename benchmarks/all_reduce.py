"""Sums between two ranks of one thread each, through shared memory and by gloo.

python bench.py --preset all_reduce
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.report import finish

RANKS = 2
SHAPES = [(1, 576), (32, 576), (32, 4096), (1024, 576)]


def run(args: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = spawn.Pipe()
        ranks = [spawn.Process(target=measure, args=(rank, directory, args.rounds, theirs)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        found: dict[str, float] = ours.recv()
        for process in ranks:
            process.join()
    for case, microseconds in found.items():
        print(f"{case:<28} {microseconds:9.1f} us")
    finish(args, ranks=RANKS, rounds=args.rounds, microseconds=found)


def measure(rank: int, directory: str, rounds: int, pipe: Any) -> None:
    """Medians; what each rank finds is the same, and one answer is read."""
    from nanovllm.distributed.join import join_group
    from nanovllm.distributed.torch_group import GlooCommunicator

    torch.set_num_threads(1)
    group = join_group(rank, RANKS, init_method=f"file://{directory}/meet", device=torch.device("cpu"), timeout_s=60)
    assert group.comm is not None
    gloo = GlooCommunicator(torch.distributed.FileStore(f"{directory}/gloo", RANKS), rank, RANKS, 60)
    native = torch.distributed.ProcessGroupGloo(torch.distributed.FileStore(f"{directory}/plain", RANKS), rank, RANKS)
    ways = {
        "shared memory": group.comm.all_reduce,
        "gloo, in order": gloo.all_reduce,
        "gloo's own": lambda x: native.allreduce([x]).wait(),
    }
    found = {}
    for shape in SHAPES:
        x = torch.ones(shape)
        for name, reduce in ways.items():
            reduce(x.clone())
            count = 10 if "gloo" in name else 100
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(count):
                    reduce(x)
                times.append((time.perf_counter() - start) / count * 1e6)
            found[f"{list(shape)}: {name}"] = statistics.median(times)
    pipe.send(found)
