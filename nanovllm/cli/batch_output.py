"""The output file of `nanovllm run-batch`: each answer once, in the order of the input, over any number of runs."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nanovllm.cli.batch_input import Work
from nanovllm.errors import ConfigError, NanoVLLMError

_ANEW = "give another output file, or --overwrite to start anew"


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier runs have left. answers: {custom_id: offset of the line}; errors are not among them, as
    they are tried again. end: of the last whole line."""

    answers: dict[str, int]
    end: int


def earlier_answers(out: Path, served: Sequence[str]) -> Earlier:
    """Of OUT or OUT.partial. served: the model's names. ConfigError if the file is something else."""
    if out.exists() and partial_of(out).exists():
        raise ConfigError(f"both {out} and {partial_of(out)} exist: remove one of them, or give --overwrite")
    file = out if out.exists() else partial_of(out)
    answers: dict[str, int] = {}
    end = 0
    if file.exists():
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break  # torn by a crash
                custom_id = _answered_id(line, f"{file}, line {number},", served)
                if custom_id is not None:
                    answers.setdefault(custom_id, end)
                end += len(line)
    return Earlier(answers, end)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


class Answers:
    """OUT.partial takes every line as it comes. Once all are there they are put in order and the file becomes
    OUT, which so is never half of one.

    Answers of earlier runs stay, and a line that is torn is cut off. Close it, or use it in a `with` block.
    """

    def __init__(self, out: Path, earlier: Earlier, work: Work) -> None:
        """ConfigError if another process writes to the file, or if it holds somebody else's answers."""
        strange = earlier.answers.keys() - work.answered.values()
        if strange:
            raise ConfigError(f"{out} holds answers that {work.file} does not ask for, as to {min(strange)!r}; {_ANEW}")
        self._out, self._partial = out, partial_of(out)
        try:
            if out.exists():
                os.replace(out, self._partial)
            self._file = self._partial.open("ab")
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"another process writes {self._partial}") from error
        self._file.truncate(earlier.end)
        self._end = earlier.end
        self._size = work.size
        self._offsets = {place: earlier.answers[custom_id] for place, custom_id in work.answered.items()}
        for place, line in work.refused.items():
            self.add(place, line)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, place: int, line: bytes) -> None:
        """Write it at once; of a place that has a line the first one stays."""
        if place not in self._offsets:
            self._file.write(line)
            self._file.flush()
            self._offsets[place] = self._end
            self._end += len(line)

    def finish(self) -> None:
        """NanoVLLMError if a line is missing."""
        missing = self._size - len(self._offsets)
        if missing:
            raise NanoVLLMError(f"{missing} lines have no answer: give the same command again")
        ordered = self._out.with_name(self._out.name + ".ordered")
        with self._partial.open("rb") as lines, ordered.open("wb") as file:
            for place in range(self._size):
                lines.seek(self._offsets[place])
                file.write(lines.readline())
            file.flush()
            os.fsync(file.fileno())
        os.replace(ordered, self._partial)  # a crash leaves it all here
        os.replace(self._partial, self._out)


def _answered_id(line: bytes, place: str, served: Sequence[str]) -> str | None:
    """None for an error."""
    try:
        result = json.loads(line)
        custom_id, response = result["custom_id"], result["response"]
        if response["status_code"] != 200:
            return None
        model = response["body"]["model"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{place} is not one that run-batch has written; {_ANEW}") from error
    if model not in served:
        raise ConfigError(f"{place} is an answer of {model!r}; {_ANEW}")
    return custom_id
