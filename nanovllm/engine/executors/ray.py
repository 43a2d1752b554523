"""RayExecutor: a Ray actor for each rank, on the nodes of a cluster."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import importlib
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.executors.ray_cluster import CONNECTION, Placement, require_ray
from nanovllm.engine.executors.worker import Place, serve
from nanovllm.engine.executors.worker_pool import WorkerPool
from nanovllm.engine.executors.workers import WorkersExecutor, worker_tasks
from nanovllm.engine.runner.threads import usable_cores
from nanovllm.errors import ConfigError, WorkerDied
from nanovllm.models.base import CausalLM
from nanovllm.weights.checkpoint import Checkpoint

_LAST_WORDS = 1.0  # seconds for Ray to say why an actor is gone
Address = tuple[str, int]


class RayExecutor(WorkersExecutor):
    """Ray places and ends the ranks, and knows why one has ended. Plans and answers go through connections of
    our own, as a call of an actor takes 0.7 ms."""

    def __init__(self, config: EngineConfig, model_class: type[CausalLM], checkpoint: Checkpoint) -> None:
        """config: resolved. Raises what a rank raises; no actor is left then."""
        ray = require_ray()
        assert config.tensor_parallel_size is not None
        size, threads = config.tensor_parallel_size, _threads(config)
        config = dataclasses.replace(config, num_threads=threads)  # whatever the environment of Ray's processes says
        release = contextlib.ExitStack()
        atexit.register(release.close)  # before Ray's own, and so while it can still be asked
        release.callback(atexit.unregister, release.close)
        try:
            release.callback(CONNECTION.enter(size * threads))
            placement = Placement(size, threads, gpus=1 if config.device == "cuda" else 0)
            release.callback(placement.remove)
            key = secrets.token_bytes(32)
            actor_class = ray.remote(RankActor)
            actors = [actor_class.options(**placement.options(rank)).remote(key, sys.path) for rank in range(size)]
            addresses, meeting = _greet(ray, actors, config.worker_timeout)
            tasks = worker_tasks(config, model_class, checkpoint, _places(placement.nodes, addresses, meeting))
            workers = (ActorWorker(rank, actors[rank], addresses[rank], key) for rank in range(size))
            pool = WorkerPool(workers, config.worker_timeout)
            release.callback(pool.close)
        except BaseException:
            release.close()
            raise
        super().__init__(pool, tasks, release.close)


class RankActor:
    """A rank's process as Ray starts it. One driver connects to it, which knows the key."""

    def __init__(self, key: bytes, path: list[str]) -> None:
        """path: the driver's, so that functions can be imported from where it has them."""
        sys.path += [folder for folder in path if folder not in sys.path]
        self._address: str = require_ray().util.get_node_ip_address()
        self._listener = Listener((self._address, 0), backlog=2, authkey=key)

    def listen(self) -> Address:
        address = self._listener.address
        assert isinstance(address, tuple)
        return address

    def meet(self) -> str:
        """Open a store for all ranks; where it is. It is the one that rank 0 finds when it joins, as torch keeps
        one for each port of a process."""
        dist: Any = importlib.import_module("torch.distributed")
        self._store = dist.TCPStore(self._address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        return f"tcp://{self._address}:{self._store.port}"

    def serve(self) -> None:
        link, lifeline = self._accept(), self._accept()
        self._listener.close()
        serve(link, lifeline)
        require_ray().actor.exit_actor()

    def _accept(self) -> Connection:
        while True:
            with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):  # a stranger
                return _at_once(self._listener.accept())


class ActorWorker:
    """One rank's actor, for the driver."""

    def __init__(self, rank: int, actor: Any, address: Address, key: bytes) -> None:
        self.rank, self._actor = rank, actor
        self._life: Future[None] = actor.serve.remote().future()
        try:
            self.link, self.lifeline = (_at_once(Client(address, authkey=key)) for _ in range(2))
        except (OSError, EOFError) as error:
            raise ConfigError(
                f"this process cannot reach rank {rank} at {address[0]}:{address[1]} ({error}): run it on a node of "
                "the Ray cluster, whose nodes reach each other on all ports"
            ) from error
        self._life.add_done_callback(lambda _: _hang_up(self.link))

    def death(self) -> WorkerDied:
        try:
            error = self._life.exception(_LAST_WORDS)
        except concurrent.futures.TimeoutError:
            return WorkerDied(self.rank, "closed its connection")
        _, _, reason = str(error).partition("The actor is dead because ")
        cause = reason.partition(". ")[0].strip().rstrip(".")
        return WorkerDied(self.rank, f"is gone: {cause or 'its actor has ended'}", str(error or ""))

    def wait(self, seconds: float) -> None:
        if require_ray().is_initialized():  # otherwise all actors have gone with the connection
            concurrent.futures.wait([self._life], seconds)

    def kill(self) -> None:
        ray = require_ray()
        if ray.is_initialized():
            ray.kill(self._actor)


def _greet(ray: Any, actors: Sequence[Any], timeout: float) -> tuple[list[Address], str]:
    """Where each rank listens, and where they meet."""
    try:
        addresses = ray.get([actor.listen.remote() for actor in actors], timeout=timeout)
        return addresses, ray.get(actors[0].meet.remote(), timeout=timeout)
    except ray.exceptions.RayError as error:
        raise ConfigError(f"a rank cannot start on its Ray node, which needs nanovllm too: {error}") from error


def _threads(config: EngineConfig) -> int:
    """Of a rank, as nodes of the same kind as this one share their cores."""
    assert config.tensor_parallel_size is not None
    if config.device == "cuda":
        return 1
    if config.num_threads is not None:
        return config.num_threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, usable_cores() // config.tensor_parallel_size)


def _places(nodes: Sequence[str], addresses: Sequence[Address], meeting: str) -> list[Place]:
    """Ray shows a rank no GPU but its own."""
    return [
        Place(meeting, 0, nodes[:rank].count(node), nodes.count(node), host=node, address=address)
        for rank, (node, (address, _)) in enumerate(zip(nodes, addresses, strict=True))
    ]


def _at_once(connection: Connection) -> Connection:
    """The same, whose small messages do not wait for larger ones."""
    with socket.socket(fileno=os.dup(connection.fileno())) as theirs:
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _hang_up(link: Connection) -> None:
    """Let its reader see an end, which a host that has lost its power does not send."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as ours:
        ours.shutdown(socket.SHUT_RD)
