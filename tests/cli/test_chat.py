"""`nanovllm chat`, by pipe and at a terminal."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest

from nanovllm import LLM
from nanovllm.cli.main import main

GREEDY = ("--temperature", "0", "--max-tokens", "5", "--ignore-eos")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def prompts(monkeypatch):
    """Texts of the prompts that reach the engine."""
    seen = []
    stream = LLM.stream

    def noted(self, prompt, params=None):
        seen.append(self.get_tokenizer().decode(prompt, skip_special_tokens=False))
        return stream(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", noted)
    return seen


def by_pipe(monkeypatch, model, text: str, *argv: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", "-m", str(model), *GREEDY, *argv])


def at_terminal(monkeypatch, model, lines, *argv: str) -> int:
    """lines: what is typed; an exception is raised in its place."""
    typed = iter(lines)

    def read(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    return main(["chat", "-m", str(model), *GREEDY, *argv])


def test_one_turn_a_line_and_the_history_is_kept(chat_model, monkeypatch, prompts, capsys):
    assert by_pipe(monkeypatch, chat_model, "hello\n\nyou\n") == 0
    out = capsys.readouterr().out
    first, second = prompts
    assert first == "<s>user: hello\nbot: "
    answer = second.removeprefix("<s>user: hello\n<s>assistant: ").removesuffix("\n<s>user: you\nbot: ")
    assert len(answer) < len(second) - 40
    assert out.startswith(answer + "\n")
    assert "> " not in out


def test_system_prompt_and_reset(chat_model, monkeypatch, prompts):
    assert by_pipe(monkeypatch, chat_model, "a\n/reset\nb\n/exit\nc\n", "--system-prompt", "be brief") == 0
    assert prompts == ["<s>system: be brief\n<s>user: a\nbot: ", "<s>system: be brief\n<s>user: b\nbot: "]


def test_a_template_from_a_file(chat_model, monkeypatch, prompts, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert by_pipe(monkeypatch, chat_model, "a\n", "--chat-template", str(tmp_path / "t.jinja")) == 0
    assert prompts == ["[a]"]
    with pytest.raises(SystemExit):
        by_pipe(monkeypatch, chat_model, "a\n", "--chat-template", "/nowhere.jinja")
    assert "cannot read /nowhere.jinja" in capsys.readouterr().err


def test_a_model_without_a_template(chat_model, monkeypatch, tmp_path, capsys):
    for file in chat_model.iterdir():
        if file.name != "tokenizer_config.json":
            (tmp_path / file.name).symlink_to(file)
    assert by_pipe(monkeypatch, tmp_path, "a\n") == 2
    error = capsys.readouterr().err
    assert "no chat template" in error
    assert "nanovllm complete" in error
    assert "--chat-template" in error


def test_an_answer_goes_on_to_the_end_of_the_context_by_default(chat_model, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(LLM, "stream", lambda self, prompt, params: asked.append(params.max_tokens) or exit())
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    with pytest.raises(SystemExit):
        main(["chat", "-m", str(chat_model)])
    assert asked == [None]


@pytest.mark.parametrize("where", ["in the engine", "in our hands"])
def test_ctrl_c_stops_one_answer_and_keeps_what_was_said(chat_model, monkeypatch, prompts, capsys, where):
    streamed = LLM.stream

    def interrupted(self, prompt, params=None):
        pieces = streamed(self, prompt, params)
        if len(prompts) > 1:
            return (yield from pieces)
        said = next(pieces)
        if where == "in our hands":
            monkeypatch.setattr("builtins.print", press_ctrl_c)
        yield said
        pieces.close()
        raise KeyboardInterrupt

    really_print = print

    def press_ctrl_c(*args, **options):
        monkeypatch.setattr("builtins.print", really_print)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    assert at_terminal(monkeypatch, chat_model, ["hello", "you"]) == 0
    assert len(prompts) == 2
    kept = prompts[1].removeprefix("<s>user: hello\n<s>assistant: ").removesuffix("\n<s>user: you\nbot: ")
    assert 0 < len(kept) < 5


def test_a_question_without_an_answer_is_not_kept(chat_model, monkeypatch, prompts):
    streamed = LLM.stream

    def interrupted(self, prompt, params=None):
        pieces = streamed(self, prompt, params)
        if len(prompts) == 1:
            raise KeyboardInterrupt
        return pieces

    monkeypatch.setattr(LLM, "stream", interrupted)
    assert at_terminal(monkeypatch, chat_model, ["hello", "you"]) == 0
    assert prompts[1] == "<s>user: you\nbot: "


def test_terminal_commands(chat_model, monkeypatch, prompts, capsys):
    lines = ["", "  ", KeyboardInterrupt(), "/help", "/unknown", "a", "/reset", "b", "/exit", "c"]
    assert at_terminal(monkeypatch, chat_model, lines) == 0
    assert prompts == ["<s>user: a\nbot: ", "<s>user: b\nbot: "]
    assert capsys.readouterr().err.count("Ctrl-D ends") == 3


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(chat_model, monkeypatch, prompts, capsys):
    lines = [letter * 20 for letter in "abcdef"]
    assert by_pipe(monkeypatch, chat_model, "\n".join(lines), "--max-model-len", "96", "--system-prompt", "S") == 0
    assert len(prompts) == 6
    assert all(p.startswith("<s>system: S\n<s>user: ") and len(p) <= 96 for p in prompts)
    assert prompts[-1].endswith(f"<s>user: {'f' * 20}\nbot: ")
    assert "a" * 20 not in prompts[-1]
    assert "oldest of the conversation is forgotten" in capsys.readouterr().err


def test_a_message_that_never_fits_changes_nothing(chat_model, monkeypatch, prompts, capsys):
    assert at_terminal(monkeypatch, chat_model, ["a", "x" * 200, "b"], "--max-model-len", "64") == 0
    assert "max_model_len=64 must also hold" in capsys.readouterr().err
    assert prompts[-1].startswith("<s>user: a\n")
    assert by_pipe(monkeypatch, chat_model, "x" * 200, "--max-model-len", "64") == 2


def test_an_answer_that_is_cut_says_so(chat_model, monkeypatch, capsys):
    assert by_pipe(monkeypatch, chat_model, "a\n") == 0
    assert "the answer is cut" in capsys.readouterr().err


def test_by_pipe_as_a_process(chat_model):
    command = [sys.executable, "-m", "nanovllm", "chat", "-m", str(chat_model), *GREEDY]
    done = subprocess.run(command, input=b"hello\nyou\n", capture_output=True, timeout=300)
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")
    assert b"Traceback" not in done.stderr


def test_ctrl_c_at_a_real_terminal(chat_model, tmp_path, interruptible_children):
    pty = pytest.importorskip("pty")
    for file in chat_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    longer = (chat_model / "config.json").read_text().replace(": 512", ": 200000")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(longer)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nanovllm", "chat", "-m", str(tmp_path), "--ignore-eos"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True)
    os.close(theirs)

    def read_until(text: bytes) -> None:
        seen = b""
        while text not in seen:
            seen += os.read(ours, 4096)

    read_until(b"> ")
    os.write(ours, b"hello\n")
    read_until(b"hello\r\n")
    assert os.read(ours, 1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    read_until(b"\r\n> ")
    os.write(ours, b"/exit\n")
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in process.stderr.read()
    os.close(ours)
