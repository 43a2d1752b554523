"""MultiprocessExecutor: a process for each rank, on this host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Pipe

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.executors.worker import Place
from nanovllm.engine.executors.worker_pool import WorkerPool
from nanovllm.engine.executors.workers import WorkersExecutor, worker_tasks
from nanovllm.errors import ConfigError, WorkerDied
from nanovllm.models.base import CausalLM
from nanovllm.weights.checkpoint import Checkpoint

# not multiprocessing's spawn, which runs the user's script again in each process
_START = """
import sys
_, link, lifeline, *sys.path[:] = sys.argv
from nanovllm.engine.executors.worker import main
main(int(link), int(lifeline))
"""
_LAST_WORDS = 3.0  # seconds for a process to end whose link is closed


class MultiprocessExecutor(WorkersExecutor):
    """Ranks meet in a file without a name: two engines never do, and nothing is left of it."""

    def __init__(self, config: EngineConfig, model_class: type[CausalLM], checkpoint: Checkpoint) -> None:
        """config: resolved. Raises what a rank raises; no process is left then."""
        assert config.tensor_parallel_size is not None
        if sys.platform != "linux":
            raise ConfigError("executor='mp' needs Linux: set tensor_parallel_size=1, or use executor='torchrun'")
        size = config.tensor_parallel_size
        require_devices(config, size)
        meeting_fd = os.memfd_create("nanovllm")
        try:
            init_method = f"file:///proc/self/fd/{meeting_fd}"
            places = [Place(init_method, gpu=rank, host_rank=rank, host_ranks=size) for rank in range(size)]
            tasks = worker_tasks(config, model_class, checkpoint, places)
            pool = WorkerPool((ProcessWorker(rank, meeting_fd) for rank in range(size)), config.worker_timeout)
        finally:
            os.close(meeting_fd)
        super().__init__(pool, tasks, pool.close)


class ProcessWorker:
    """One rank's process."""

    def __init__(self, rank: int, meeting_fd: int) -> None:
        self.rank = rank
        self.link, theirs = Pipe()
        self.lifeline, theirs_too = Pipe()
        fds = theirs.fileno(), theirs_too.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, fds), *sys.path],
            pass_fds=(*fds, meeting_fd),
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
    if config.device == "cuda" and ranks > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs {ranks} GPUs here, and torch sees "
            f"{torch.cuda.device_count()}: lower it, or set device='cpu'"
        )
