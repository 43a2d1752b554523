"""`nanovllm run-batch --ray`: replicas of an engine on the nodes of a Ray cluster, fed by Ray Data."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nanovllm.cli.batch_engine import Answer, BatchEngine, Server
from nanovllm.cli.batch_input import Work, read_lines
from nanovllm.engine.runner.memory import free_host_memory
from nanovllm.engine.runner.threads import usable_cores
from nanovllm.errors import ConfigError, NanoVLLMError, WorkerDied

_CHUNK = 32  # lines that go to a replica and come back together
_FAILURE = -1  # in the place of a place: the line is a pickled exception
_SHARE = 0.4  # of a node's free memory, for the caches of all its replicas


@dataclass(frozen=True, slots=True)
class Crew:
    """Replicas, and what each takes of a node. neighbours: replicas on one node."""

    replicas: int
    num_cpus: int
    num_gpus: int
    neighbours: int


def answer_with_ray(server: Server, work: Work, replicas: int | None) -> Iterator[tuple[int, Answer]]:
    """Answers in any order. A replica that is lost is started again, and what it had not given back is computed
    again. ConfigError without Ray, or if the cluster has no room for a replica."""
    ray = _import_ray()
    if Path(server.model).exists():
        server = replace(server, model=str(Path(server.model).absolute()))  # for processes that run elsewhere
    with _connected(ray):
        crew = _crew(ray, server, replicas)
        chunk = max(1, min(_CHUNK, len(work.asked) // (4 * crew.replicas)))
        calls = min(-(-server.ahead // chunk), -(-len(work.asked) // (chunk * crew.replicas)))
        chunks = [work.asked[i : i + chunk] for i in range(0, len(work.asked), chunk)]
        data = _dataset(ray, work.file, chunks).map_batches(
            Replica,
            fn_constructor_args=(server, crew),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=crew.num_cpus,
            num_gpus=crew.num_gpus,
            compute=ray.data.ActorPoolStrategy(
                size=crew.replicas,
                max_tasks_in_flight_per_actor=calls,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
        )
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                place, answer = row.pop("place"), Answer(**row)
                if place == _FAILURE:
                    raise pickle.loads(answer.line)
                yield place, answer


class Replica:
    """One engine, which a thread keeps full with the lines of all calls that wait."""

    def __init__(self, server: Server, crew: Crew) -> None:
        self._server, self._crew = server, crew
        self._lines: queue.SimpleQueue[tuple[Future[Answer], bytes]] = queue.SimpleQueue()
        self._waiting: set[Future[Answer]] = set()
        self._failure: BaseException | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, chunk: Any) -> Any:
        """chunk: a table of places and lines. The table of their answers, or of the error that ended the engine."""
        futures: list[Future[Answer]] = [Future() for _ in range(len(chunk))]
        self._waiting.update(futures)
        if self._failure is not None:
            return _failure_table(self._failure)
        for future, line in zip(futures, chunk["line"].to_pylist(), strict=True):
            self._lines.put((future, line))
        try:
            answers = [future.result() for future in futures]
        except Exception as error:
            return _failure_table(error)
        self._waiting.difference_update(futures)
        return _table(chunk["place"], answers)

    def _serve(self) -> None:
        try:
            self._drive(BatchEngine(_sharing(self._server, self._crew)))
        except BaseException as error:
            self._failure = error
            for future in list(self._waiting):
                if not future.done():
                    future.set_exception(error)

    def _drive(self, engine: BatchEngine[Future[Answer]]) -> None:
        try:
            while True:
                if not engine.busy:
                    engine.add(*self._lines.get())
                while engine.has_room and not self._lines.empty():
                    engine.add(*self._lines.get())
                for future, answer in engine.step():
                    future.set_result(answer)
        except WorkerDied:
            os._exit(1)  # Ray starts the whole replica again


def _table(places: Any, answers: list[Answer]) -> Any:
    import pyarrow

    columns = {name: [getattr(answer, name) for answer in answers] for name in Answer.__slots__}
    return pyarrow.table({"place": places, **columns})


def _failure_table(error: BaseException) -> Any:
    """An exception would reach the other side as one of Ray's, in many lines."""
    if not isinstance(error, NanoVLLMError):
        error = RuntimeError("a replica failed:\n" + "".join(traceback.format_exception(error)))
    return _table([_FAILURE], [Answer(pickle.dumps(error), failed=True, tokens=0)])


def _sharing(server: Server, crew: Crew) -> Server:
    """With options for a replica that is not alone on its node's processor."""
    if crew.num_gpus:
        return server
    ranks = server.config.tensor_parallel_size or 1
    shared: dict[str, Any] = {
        "device": "cpu",
        "num_threads": max(1, min(crew.num_cpus, usable_cores() // crew.neighbours) // ranks),
    }
    if crew.neighbours > 1 and server.config.num_kvcache_blocks is None:
        shared["kvcache_memory"] = int(free_host_memory() * _SHARE) // crew.neighbours
    return replace(server, options={**shared, **server.options})


def _crew(ray: ModuleType, server: Server, asked: int | None) -> Crew:
    """asked: replicas; by default one for each GPU, or for its ranks, and without GPUs one for each node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    ranks = server.config.tensor_parallel_size or 1
    if server.config.device == "cuda" or (server.config.device == "auto" and any("GPU" in node for node in nodes)):
        room = sum(int(node.get("GPU", 0)) // ranks for node in nodes)
        if not room:
            raise ConfigError(f"no node of the Ray cluster has the {ranks} GPUs of a replica; give --device cpu")
        return Crew(asked or room, num_cpus=1, num_gpus=ranks, neighbours=1)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise ConfigError("no node of the Ray cluster has a CPU to give")
    replicas = asked or len(cores)
    neighbours = -(-replicas // len(cores))
    each = server.config.num_threads
    return Crew(replicas, max(1, min(cores) // neighbours) if each is None else each * ranks, 0, neighbours)


def _dataset(ray: ModuleType, file: Path, chunks: list[list[tuple[int, int]]]) -> Any:
    """A block for each chunk: tables of places and lines. They are read on this node, as they are needed, so that
    no other one must have the file."""
    import pyarrow

    tables = [pyarrow.table(dict(zip(("place", "offset"), zip(*chunk, strict=True), strict=True))) for chunk in chunks]
    return ray.data.from_arrow(tables).map_batches(
        _read_chunk,
        fn_args=(file.absolute(),),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,  # replicas may take all there are
        compute=ray.data.TaskPoolStrategy(size=1),
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )


def _read_chunk(chunk: Any, file: Path) -> Any:
    import pyarrow

    lines = dict(read_lines(file, zip(chunk["place"].to_pylist(), chunk["offset"].to_pylist(), strict=True)))
    return pyarrow.table({"place": list(lines), "line": list(lines.values())})


@contextlib.contextmanager
def _connected(ray: ModuleType) -> Iterator[None]:
    """To the cluster that RAY_ADDRESS names or that runs here, or else to one of this machine alone."""
    _quieten()
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level=logging.getLogger().getEffectiveLevel())
    try:
        yield
    finally:
        ray.shutdown()


def _quieten() -> None:
    """Ray Data's log shows plans and progress on the terminal, whatever is asked of other loggers."""
    level = logging.getLogger().getEffectiveLevel()
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(level)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f'--ray needs Ray ({error}): pip install "nanovllm[ray]"') from error
    return ray
