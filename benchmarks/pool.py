"""Page pools of 1,000 and of 1,000,000 pages."""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.report import finish


def run(args: argparse.Namespace) -> None:
    """Allocate, name, free and evict pages: the cost of one must not depend on the pool's size."""
    from nanovllm.engine.block_manager import BlockManager

    def one_round(num_blocks: int, pages: int = 500, times: int = 400) -> float:
        pool = BlockManager(num_blocks)
        start = time.perf_counter()
        for i in range(times):
            blocks = pool.allocate(pages)
            for block in blocks:
                pool.register(block, b"%d-%d" % (i, block))
            pool.free(reversed(blocks))
        return (time.perf_counter() - start) / (pages * times) * 1e9

    results = {size: statistics.median(one_round(size) for _ in range(args.rounds)) for size in (1_000, 1_000_000)}
    for size, nanoseconds in results.items():
        print(f"{size:>9,} pages: {nanoseconds:.0f} ns to allocate, name and free one")
    finish(args, rounds=args.rounds, nanoseconds=results)
