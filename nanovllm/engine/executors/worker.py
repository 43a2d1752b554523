"""A rank in a process of its own: what it is asked, and how it answers."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanovllm.cache_spec import CachePlan
from nanovllm.config import EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.distributed.join import join_group
from nanovllm.engine.executors.plan_wire import PlanReader, WirePlan
from nanovllm.engine.runner.model_runner import ModelRunner
from nanovllm.engine.step import StepResult
from nanovllm.errors import NanoVLLMError, PeerLost
from nanovllm.models.base import CausalLM
from nanovllm.models.registry import model_class
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm.weights.hub import resolve_model

_GLANCE = 1e-4  # seconds between looks at a device


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is.

    init_method: where ranks meet, as torch.distributed writes it. gpu: of those that this rank sees.
    host_rank, host_ranks: which of how many ranks on its host. host, address: as for join_group.
    """

    init_method: str
    gpu: int
    host_rank: int
    host_ranks: int
    host: str = ""
    address: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """The first message. model: None for a plugin's, which is imported from its file. checkpoint: where the
    driver has it."""

    rank: int
    size: int
    place: Place
    config: EngineConfig
    model: type[CausalLM] | None
    checkpoint: Path
    log_level: int


class Call(NamedTuple):
    """function: pickled, of the model."""

    function: bytes


class Answer(NamedTuple):
    value: Any


class Raised(NamedTuple):
    """By a Call; the rank goes on."""

    error: str


class Failed(NamedTuple):
    """The rank ends. typed: an error for users, which stays what it is. deserted: it needed a rank that was
    gone or failed before."""

    typed: NanoVLLMError | None
    deserted: bool
    cause: str
    trace: str


@dataclass(slots=True)
class Progress:
    """steps: done so far. thread: the one that does them."""

    steps: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def stack(self) -> str:
        return "".join(traceback.format_stack(sys._current_frames()[self.thread]))


def main(link_fd: int, lifeline_fd: int) -> None:
    """A process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    sys.exit(serve(Connection(link_fd), Connection(lifeline_fd)))


def serve(link: Connection, lifeline: Connection) -> int:
    """The life of a worker: until the driver says so, or is gone, or something goes wrong; its exit code."""
    progress = Progress()
    threading.Thread(target=_watch, args=(lifeline, os.getppid(), progress), daemon=True).start()
    try:
        _serve(link, progress)
    except BaseException as error:
        deserted = isinstance(error, PeerLost)
        typed = error if isinstance(error, NanoVLLMError) and not deserted else None
        cause = traceback.format_exception_only(type(error), error)[-1].strip()
        with contextlib.suppress(ConnectionError):  # no driver
            link.send(Failed(typed, deserted, cause, traceback.format_exc()))
        return 1
    return 0


def _watch(lifeline: Connection, parent: int, progress: Progress) -> None:
    """Say how far this rank is whenever the driver asks; end with the driver, even within a step."""
    try:
        while os.getppid() == parent:  # a process that the driver has forked may hold the line open
            if lifeline.poll(1.0):
                lifeline.recv_bytes()
                lifeline.send((progress.steps, progress.stack()))
    except (EOFError, OSError):
        pass
    os._exit(1)


def _serve(link: Connection, progress: Progress) -> None:
    task: WorkerTask = link.recv()
    logging.basicConfig(level=task.log_level, format=f"nanovllm: rank {task.rank}: %(message)s")
    group = _join(task)
    try:
        runner = _load(link, task, group)
        reader, running = PlanReader(), deque[Future[StepResult]]()
        link.send(Answer(None))

        def finish_step() -> None:
            result = running.popleft().result()
            progress.steps += 1
            if task.rank == 0:
                link.send(Answer(result))

        while True:
            if running and _ends_first(running, link):
                finish_step()
            elif (message := link.recv()) is None:
                return
            elif isinstance(message, WirePlan):
                running.append(runner.execute(reader.read(message)))
            else:
                while running:  # answers come in the order of the questions
                    finish_step()
                link.send_bytes(_call(message, runner.model))
    finally:
        if group.comm is not None:
            group.comm.close()


def _ends_first(running: deque[Future[StepResult]], link: Connection) -> bool:
    """Whether the oldest step ends before another message comes. A GPU has the next step waiting, and no more."""
    while len(running) == 1 and not running[0].done():
        if link.poll(_GLANCE):
            return False
    return True


def _join(task: WorkerTask) -> TPGroup:
    config, place = task.config, task.place
    device = torch.device(config.device)
    if config.device == "cuda":
        device = torch.device("cuda", place.gpu)
        torch.cuda.set_device(device)
    return join_group(
        task.rank,
        task.size,
        init_method=place.init_method,
        device=device,
        timeout_s=2 * config.worker_timeout,  # the driver sees it first, and knows more
        host=place.host,
        address=place.address,
    )


def _load(link: Connection, task: WorkerTask, group: TPGroup) -> ModelRunner:
    """This rank's weights, and caches of the size that all can hold, as the driver says."""
    config = task.config
    checkpoint = open_checkpoint(find_files(task), config.load_format)
    model = task.model or model_class(checkpoint.config.get("architectures") or [], model_plugin=config.model_plugin)

    def agree(plan: CachePlan) -> CachePlan:
        link.send(Answer(plan))
        return link.recv()

    sizes = model.read_config(checkpoint.config)
    return ModelRunner(
        *(config, model, sizes, checkpoint),
        tp=group,
        host_rank=task.place.host_rank,
        host_ranks=task.place.host_ranks,
        agree=agree,
    )


def find_files(task: WorkerTask) -> Path:
    """The driver's checkpoint, or this host's own if the driver is on another one."""
    if task.checkpoint.exists():
        return task.checkpoint
    return resolve_model(task.config.model, task.config.revision)


def _call(call: Call, model: CausalLM) -> bytes:
    """The pickled answer."""
    try:
        return pickle.dumps(Answer(pickle.loads(call.function)(model)))
    except Exception:
        return pickle.dumps(Raised(traceback.format_exc()))
