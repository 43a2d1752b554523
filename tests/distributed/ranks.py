"""Ranks of a group as processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanovllm.distributed.join import join_group

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def torchrun(ranks: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What a script and its arguments, or "-m" and a module and its, print and return."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run([*launch, *arguments], check=check, env=env, timeout=600, stdout=subprocess.PIPE, text=True)


class Ranks:
    """`size` processes that run function(group, *args) and send what it returns."""

    def __init__(self, size: int, tmp_path: Path, function: Callable, *args: Any, timeout_s: float = 60) -> None:
        self._pipes, self._processes = [], []
        init_method = f"file://{tmp_path / 'meet'}"
        for rank in range(size):
            ours, theirs = SPAWN.Pipe()
            target = (rank, size, init_method, timeout_s, theirs, function, args)
            process = SPAWN.Process(target=_run, args=target, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def receive(self, rank: int, within_s: float = 300) -> Any:
        """What the rank sent; whatever it raised is raised here."""
        assert self._pipes[rank].poll(within_s), "nothing came"
        result = self._pipes[rank].recv()
        if isinstance(result, _Failure):
            raise AssertionError(f"rank {rank}: {result.text}")
        return result

    def results(self) -> list[Any]:
        found = [self.receive(rank) for rank in range(len(self._pipes))]
        assert self.exit_codes() == [0] * len(found)
        return found

    def exit_codes(self) -> list[int | None]:
        for process in self._processes:
            process.join(30)
        return [process.exitcode for process in self._processes]


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _run(rank: int, size: int, init_method: str, timeout_s: float, pipe: Any, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        group = join_group(rank, size, init_method=init_method, device=CPU, timeout_s=timeout_s)
        pipe.send(function(group, *args))
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))
