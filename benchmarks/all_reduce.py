"""Microseconds of a sum between two ranks of one thread each, through shared memory and by gloo.

python -m benchmarks.all_reduce
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch

SHAPES = [(1, 576), (32, 576), (32, 4096), (1024, 576)]
ROUNDS = 7


def measure(rank: int, size: int, directory: str, pipe: Any) -> None:
    from nanovllm.distributed.join import join_group
    from nanovllm.distributed.torch_group import GlooCommunicator

    torch.set_num_threads(1)
    group = join_group(rank, size, init_method=f"file://{directory}/meet", device=torch.device("cpu"), timeout_s=60)
    assert group.comm is not None
    gloo = GlooCommunicator(torch.distributed.FileStore(f"{directory}/gloo", size), rank, size, 60)
    native = torch.distributed.ProcessGroupGloo(torch.distributed.FileStore(f"{directory}/plain", size), rank, size)
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
            for _ in range(ROUNDS):
                start = time.perf_counter()
                for _ in range(count):
                    reduce(x)
                times.append((time.perf_counter() - start) / count * 1e6)
            found[f"{list(shape)}: {name}"] = round(statistics.median(times), 1)
    pipe.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    size = parser.parse_args().ranks
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = spawn.Pipe()
        ranks = [spawn.Process(target=measure, args=(rank, size, directory, theirs)) for rank in range(size)]
        for process in ranks:
            process.start()
        found = ours.recv()
        for process in ranks:
            process.join()
    for case, microseconds in found.items():
        print(f"{case:<28} {microseconds:9.1f} us")
    print(json.dumps({"ranks": size, "torch": torch.__version__, "us": found}))


if __name__ == "__main__":
    main()
