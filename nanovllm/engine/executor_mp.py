"""MultiprocessExecutor: a process for each rank, on this host."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Pipe

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.executor_workers import WorkersExecutor, worker_tasks
from nanovllm.engine.worker import Place
from nanovllm.engine.worker_pool import WorkerPool
from nanovllm.errors import ConfigError, WorkerDied
from nanovllm.models.base import CausalLM
from nanovllm.weights.checkpoint import Checkpoint

# not multiprocessing's spawn, which runs the user's script again in each process
_START = """
import sys
_, link, lifeline, folder, *sys.path[:] = sys.argv
from nanovllm.engine.worker import main
main(int(link), int(lifeline), folder)
"""
_LAST_WORDS = 3.0  # seconds for a process to end whose link is closed


class MultiprocessExecutor(WorkersExecutor):
    """Ranks meet in a folder that is private to the engine."""

    def __init__(self, config: EngineConfig, model_class: type[CausalLM], checkpoint: Checkpoint) -> None:
        """config: resolved. Raises what a rank raises; no process is left then."""
        assert config.tensor_parallel_size is not None
        size = config.tensor_parallel_size
        require_devices(config, size)
        folder = tempfile.mkdtemp(prefix="nanovllm-")
        tidy = functools.partial(shutil.rmtree, folder, ignore_errors=True)
        try:
            places = [Place(f"file://{folder}/ranks", rank, host_rank=rank, host_ranks=size) for rank in range(size)]
            tasks = worker_tasks(config, model_class, checkpoint, places)
            pool = WorkerPool((ProcessWorker(rank, folder) for rank in range(size)), config.worker_timeout, tidy)
        except BaseException:
            tidy()
            raise
        super().__init__(pool, tasks, pool.close)


class ProcessWorker:
    """One rank's process."""

    def __init__(self, rank: int, folder: str) -> None:
        self.rank = rank
        self.link, theirs = Pipe()
        self.lifeline, theirs_too = Pipe()
        fds = theirs.fileno(), theirs_too.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, fds), folder, *sys.path],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the driver alone
        )
        theirs.close()
        theirs_too.close()

    def death(self) -> WorkerDied:
        try:
            code = self._process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            return WorkerDied(self.rank, "closed its connection")
        if code >= 0:
            return WorkerDied(self.rank, f"exited with code {code}")
        name = signal.Signals(-code).name
        return WorkerDied(self.rank, f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()


def require_devices(config: EngineConfig, ranks: int) -> None:
    """ConfigError for what this machine cannot do. ranks: on this host."""
    if os.name != "posix":
        raise ConfigError("more than one process needs Linux or macOS; set tensor_parallel_size=1")
    if config.device == "cuda" and ranks > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs {ranks} GPUs here, and torch sees "
            f"{torch.cuda.device_count()}: lower it, or set device='cpu'"
        )
