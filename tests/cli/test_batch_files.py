"""The files of `nanovllm run-batch`: what is left to do, and what is written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.cli.batch_input import plan_work, read_lines
from nanovllm.cli.batch_output import Answers, Earlier, earlier_answers, partial_of
from nanovllm.errors import ConfigError, NanoVLLMError
from nanovllm.openai.batch_lines import answer_line, error_line
from nanovllm.openai.errors import APIError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").write_bytes(b"".join(asked(name) for name in "abc"))
    return tmp_path


def asked(custom_id: str) -> bytes:
    return json.dumps({"custom_id": custom_id, "url": "x" * (ord(custom_id[0]) % 7)}).encode() + b"\n"


def answer(custom_id: str, text: object = "", model: str = "m") -> bytes:
    return answer_line(custom_id, {"model": model, "text": text})


def start(folder: Path) -> Answers:
    earlier = earlier_answers(folder / "out", ["m"])
    return Answers(folder / "out", earlier, plan_work(folder / "in", earlier.answers))


def written(file: Path) -> list[tuple[str | None, object]]:
    """(custom_id, text or status) of every line."""
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    responses = [(line["custom_id"], line["response"]) for line in lines]
    return [(custom_id, r["body"].get("text", r["status_code"])) for custom_id, r in responses]


def test_lines_are_sorted_into_what_is_answered_refused_and_asked(tmp_path):
    file = tmp_path / "in"
    lines = [asked("a"), b"\n", asked("b"), b"{}\n", asked("a"), b"  \r\n", b"?\n", asked("c").rstrip()]
    file.write_bytes(b"".join(lines))
    work = plan_work(file, {"b", "elsewhere"})
    assert (work.answered, work.size) == ({1: "b"}, 6)
    assert list(read_lines(file, work.asked)) == [(0, asked("a")), (5, asked("c").rstrip())]
    errors = {place: json.loads(line) for place, line in work.refused.items()}
    assert {place: (line["custom_id"], line["error"]["param"]) for place, line in errors.items()} == {
        2: (None, "custom_id"),
        3: ("a", "custom_id"),
        4: (None, None),
    }
    messages = [line["error"]["message"] for line in errors.values()]
    assert [message.partition(":")[0] for message in messages] == ["line 4", "line 5", "line 7"]
    assert messages[1].endswith("is that of line 1")


@given(st.data())
def test_after_any_crashes_each_answer_is_there_once_and_in_order(data):
    """Runs answer some of what is left, in any order, some twice and some with an error, and crash: the file loses
    some of its end. What is whole is never asked for again."""
    names = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True))
    lines = [name if name in "abcdef" else None for name in names]  # the others are no requests
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").write_bytes(b"".join(b"?\n" if line is None else asked(line) for line in lines))
        known: dict[str, object] = {}
        for run in range(data.draw(st.integers(0, 4))):
            earlier = earlier_answers(folder / "out", ["m"])
            work = plan_work(folder / "in", earlier.answers)
            assert [lines[place] for place, _ in work.asked] == [x for x in lines if x is not None and x not in known]
            with Answers(folder / "out", earlier, work) as answers:
                some = [place for place, _ in work.asked] * 2
                for place in data.draw(st.permutations(some))[: data.draw(st.integers(0, len(some)))]:
                    failed = data.draw(st.booleans())
                    line = lines[place]
                    answers.add(place, error_line(line, APIError("no")) if failed else answer(line, run))
            partial = folder / "out.partial"
            size = partial.stat().st_size
            with partial.open("r+b") as file:
                file.truncate(data.draw(st.integers(max(0, size - 400), size)))
            whole = partial.read_bytes().rpartition(b"\n")[0]
            (folder / "whole").write_bytes(whole)
            known = {custom_id: text for custom_id, text in written(folder / "whole") if text != 400}
        for _ in range(2):  # the second has nothing to do
            earlier = earlier_answers(folder / "out", ["m"])
            work = plan_work(folder / "in", earlier.answers)
            with Answers(folder / "out", earlier, work) as answers:
                for place, _ in reversed(work.asked):
                    answers.add(place, answer(lines[place], "last"))
                answers.finish()
            expected = [(line, 400 if line is None else known.get(line, "last")) for line in lines]
            assert written(folder / "out") == expected
            assert sorted(path.name for path in folder.iterdir() if path.name != "whole") == ["in", "out"]


def test_a_line_is_in_the_file_as_soon_as_it_is_added(folder):
    with start(folder) as answers:
        answers.add(2, answer("c"))
        assert written(folder / "out.partial") == [("c", "")]


def test_nothing_is_finished_while_a_line_is_missing(folder):
    with start(folder) as answers:
        answers.add(2, answer("c"))
        with pytest.raises(NanoVLLMError, match="2 lines have no answer"):
            answers.finish()
    assert not (folder / "out").exists()


def test_what_an_input_gained_is_added_to_a_finished_file(folder):
    (folder / "out").write_bytes(answer("c", "old") + answer("a", "old") + error_line("b", APIError("no")))
    with start(folder) as answers:
        answers.add(1, answer("b", "new"))
        answers.finish()
    assert written(folder / "out") == [("a", "old"), ("b", "new"), ("c", "old")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"my diary\n", "out, line 2, is not one that run-batch has written"),
        (b"{}\n", "is not one that run-batch"),
        (answer("b", model="other"), "line 2, is an answer of 'other'"),
        (answer("z"), "'z'"),
    ],
)
def test_a_file_that_is_something_else_is_not_touched(folder, line, message):
    before = answer("a") + line
    (folder / "out").write_bytes(before)
    with pytest.raises(ConfigError, match=message) as found:
        start(folder)
    assert "--overwrite" in str(found.value)
    assert (folder / "out").read_bytes() == before
    work = plan_work(folder / "in", {})
    with Answers(folder / "out", Earlier({}, 0), work) as answers:  # to overwrite
        for place, name in enumerate("abc"):
            answers.add(place, answer(name))
        answers.finish()
    assert written(folder / "out") == [("a", ""), ("b", ""), ("c", "")]


def test_one_process_at_a_time(folder):
    with start(folder), pytest.raises(ConfigError, match="another process writes"):
        start(folder)
    with start(folder):
        pass


def test_both_files_are_one_too_many(folder):
    (folder / "out").write_bytes(answer("a"))
    partial_of(folder / "out").write_bytes(answer("b"))
    with pytest.raises(ConfigError, match="remove one"):
        start(folder)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "in").write_bytes(asked("a"))
    with pytest.raises(ConfigError, match="cannot write"):
        Answers(tmp_path / "none" / "out", Earlier({}, 0), plan_work(tmp_path / "in", {}))
    with pytest.raises(ConfigError, match="cannot read"):
        plan_work(tmp_path / "none", {})
