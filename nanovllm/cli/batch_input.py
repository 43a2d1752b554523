"""The input file of `nanovllm run-batch`: what there is to do."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.errors import ConfigError
from nanovllm.openai.batch_lines import error_line, read_line
from nanovllm.openai.errors import APIError


@dataclass(frozen=True, slots=True)
class Work:
    """Lines are known by their places among those that are not blank.

    answered: {place: custom_id}, of lines that an earlier run has answered. refused: {place: line of the
    output}, of those that are no requests. asked: (place, offset in the file) of all others.
    """

    file: Path
    answered: dict[int, str] = field(default_factory=dict)
    refused: dict[int, bytes] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.answered) + len(self.refused) + len(self.asked)


def plan_work(file: Path, answered: Container[str]) -> Work:
    """answered: custom_ids. ConfigError if the file cannot be read."""
    work, first = Work(file), dict[str, int]()  # {custom_id: number of its line}
    try:
        with file.open("rb") as lines:
            offset = 0
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    _sort_in(work, number, offset, text, answered, first)
                offset += len(text)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    return work


def read_lines(file: Path, asked: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """(place, line), read as they are taken. asked: as in Work."""
    with file.open("rb") as lines:
        for place, offset in asked:
            lines.seek(offset)
            yield place, lines.readline()


def _sort_in(
    work: Work, number: int, offset: int, text: bytes, answered: Container[str], first: dict[str, int]
) -> None:
    place, custom_id = work.size, None
    try:
        custom_id = read_line(text).custom_id
        if custom_id in first:
            raise APIError(f"custom_id {custom_id!r} is that of line {first[custom_id]}", "custom_id")
    except APIError as error:
        work.refused[place] = error_line(custom_id, APIError(f"line {number}: {error}", error.param))
        return
    first[custom_id] = number
    if custom_id in answered:
        work.answered[place] = custom_id
    else:
        work.asked.append((place, offset))
