"""WorkerPool: speaks with the processes of all ranks, and ends them together."""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from nanovllm.engine.executors.worker import Answer, Failed, Raised
from nanovllm.errors import EngineClosed, RequestError, WorkerDied

_TICK = 1.0  # seconds between looks at the clock
_GRACE = 0.5  # for the rank that is the cause to show, when another one fails for want of it
_PATIENCE = 3.0  # for ranks to end by themselves
_COLLECTIVE = ("nanovllm/distributed/", "nanovllm/ops/recorder.py")  # where ranks wait for others


class Worker(Protocol):
    """A rank in a process of its own. lifeline: to its second thread, which answers during a step."""

    @property
    def rank(self) -> int: ...

    @property
    def link(self) -> Connection: ...

    @property
    def lifeline(self) -> Connection: ...

    def death(self) -> WorkerDied:
        """How it ended; its link is closed."""
        ...

    def wait(self, seconds: float) -> None:
        """For its end, no longer than this."""
        ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class Question:
    """messages: pickled, one a rank. waiting: ranks that have not answered. patient: the slowest rank may
    take as long as it likes before the first one answers (loading)."""

    messages: Sequence[bytes]
    waiting: set[int]
    patient: bool = False
    answers: dict[int, Any] = field(default_factory=dict)
    future: Future[list[Any]] = field(default_factory=Future)


class WorkerPool:
    """Questions are answered in order. One thread writes, so that Ctrl-C never cuts a message in two or
    leaves a rank without it; one reads, and sees at once when a rank is gone. What fails one rank ends all,
    and every waiting and later question raises it.

    workers: by rank, started as they are taken from it. timeout: seconds for a rank to answer.
    """

    def __init__(self, workers: Iterable[Worker], timeout: float) -> None:
        self._timeout = timeout
        self._outbox: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._questions: deque[Question] = deque()
        self._since = time.monotonic()  # of the last sign of life that was waited for
        self._failure: BaseException | None = None
        self._closing = False
        self._lock = threading.RLock()  # re-entrant, as garbage collection may close in any place
        self._workers: list[Worker] = []
        try:
            self._workers += workers
        except BaseException:
            self._end()
            raise
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def ask(self, messages: Sequence[bytes], answering: int, patient: bool = False) -> Future[list[Any]]:
        """The answers of the first `answering` ranks, in order. messages: one a rank."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        question = Question(messages, set(range(answering)), patient)
        self._outbox.put(question)
        return question.future

    def close(self) -> None:
        """Let the ranks end, or end them; harmless when repeated."""
        with self._lock:
            closed, self._closing = self._closing, True
        if closed:
            return
        self._outbox.put(None)
        deadline = time.monotonic() + _PATIENCE
        for worker in self._workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
        self._fail(EngineClosed("this engine is closed; create a new LLM"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_PATIENCE)
        for worker in self._workers:
            worker.link.close()
            worker.lifeline.close()

    def _write(self) -> None:
        while (question := self._outbox.get()) is not None:
            with self._lock:
                if self._failure is not None:
                    question.future.set_exception(self._failure)
                    continue
                if not self._questions:
                    self._since = time.monotonic()
                self._questions.append(question)
            self._send(question.messages)
        self._send([pickle.dumps(None)] * len(self._workers))

    def _send(self, messages: Sequence[bytes]) -> None:
        for worker, message in zip(self._workers, messages, strict=True):
            with contextlib.suppress(OSError):  # it is gone, as the reader will see
                worker.link.send_bytes(message)

    def _read(self) -> None:
        try:
            failure = self._read_answers()
        except BaseException as error:
            failure = error
        if failure is not None:
            self._fail(failure)

    def _read_answers(self) -> BaseException | None:
        """Until the end; why it came."""
        workers = {worker.link: worker for worker in self._workers}
        while workers:
            for link in wait(list(workers), min(_TICK, self._timeout / 4)):
                assert isinstance(link, Connection)
                try:
                    message = link.recv()
                except (EOFError, OSError):
                    worker = workers.pop(link)
                    if not self._closing:
                        return worker.death()
                    continue
                if isinstance(message, Failed):
                    return self._cause(workers, link, message)
                self._book(workers[link].rank, message)
            if self._overdue():
                return self._hung()
        return None

    def _book(self, rank: int, message: Answer | Raised) -> None:
        question = next(q for q in self._questions if rank in q.waiting)
        question.waiting.discard(rank)
        question.answers[rank] = message
        self._since = time.monotonic()
        if question.waiting:
            return
        with self._lock:
            self._questions.remove(question)
        answers = [question.answers[r] for r in sorted(question.answers)]
        raised = [(r, a.error) for r, a in enumerate(answers) if isinstance(a, Raised)]
        if raised:
            question.future.set_exception(RequestError("on rank {}: {}".format(*raised[0])))
        else:
            question.future.set_result([a.value for a in answers])

    def _cause(self, workers: dict[Connection, Worker], link: Connection, failed: Failed) -> BaseException:
        """Of all that go wrong at about the same time: a rank that is gone, else the first to fail for another
        reason than that."""
        failures = [(workers.pop(link).rank, failed)]
        deadline = time.monotonic() + _GRACE
        while workers and (left := deadline - time.monotonic()) > 0:
            for other in wait(list(workers), left):
                assert isinstance(other, Connection)
                try:
                    message = other.recv()
                except (EOFError, OSError):
                    return workers[other].death()
                if isinstance(message, Failed):
                    failures.append((workers.pop(other).rank, message))
        rank, failed = next(((r, f) for r, f in failures if not f.deserted), failures[0])
        error = failed.typed or WorkerDied(rank, f"failed: {failed.cause}")
        error.__cause__ = _RemoteError(f"on rank {rank}:\n{failed.trace}")
        return error

    def _overdue(self) -> bool:
        with self._lock:
            if not self._questions or (self._questions[0].patient and not self._questions[0].answers):
                return False
            return time.monotonic() - self._since > self._timeout

    def _hung(self) -> WorkerDied:
        places = {worker.rank: _where(worker) for worker in self._workers}
        details = "\n".join(f"rank {r} was at:\n{p[1]}" for r, p in places.items() if p is not None)
        return WorkerDied(suspect(places), f"did not answer for {self._timeout:g} s", details)

    def _fail(self, failure: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or failure
            questions, failure = list(self._questions), self._failure
            self._questions.clear()
        self._end()
        for question in questions:
            question.future.set_exception(failure)

    def _end(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait(_PATIENCE)


def _where(worker: Worker) -> tuple[int, str] | None:
    """(steps done, stack); None without an answer."""
    with contextlib.suppress(EOFError, OSError):
        worker.lifeline.send_bytes(b"where")
        if worker.lifeline.poll(_TICK):
            return worker.lifeline.recv()
    return None


def suspect(places: dict[int, tuple[int, str] | None]) -> int:
    """The rank that others wait for: a silent one, else of those with the fewest steps one that does not wait
    itself.

    places: (steps done, stack) of each rank, None without an answer.
    """

    def order(rank: int) -> tuple[int, int, bool, int]:
        place = places[rank]
        if place is None:
            return 0, 0, False, rank
        steps, stack = place
        innermost = stack[stack.rindex('File "') :]
        return 1, steps, any(file in innermost for file in _COLLECTIVE), rank

    return min(places, key=order)


class _RemoteError(Exception):
    """A traceback from another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
