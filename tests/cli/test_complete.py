"""`nanovllm complete`."""

from __future__ import annotations

import io

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli.main import main

GREEDY = ("--temperature", "0", "--max-tokens", "6", "--ignore-eos")
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def complete(model, *argv: str) -> int:
    return main(["complete", "-m", str(model), *argv])


@pytest.fixture(scope="module")
def texts(chat_model):
    """What the engine gives for a prompt."""
    with LLM(str(chat_model)) as llm:
        yield lambda *prompts: [o["text"] for o in llm.generate(list(prompts), PARAMS, use_tqdm=False)]


def test_one_prompt_is_streamed(chat_model, texts, capsys, monkeypatch):
    flushed = []
    monkeypatch.setattr("builtins.print", lambda *a, end="\n", flush=False, **k: flushed.append("".join(a) + end))
    assert complete(chat_model, "hello", *GREEDY) == 0
    assert "".join(flushed) == texts("hello")[0] + "\n"
    assert len(flushed) > 2


def test_several_prompts_come_in_order(chat_model, texts, capsys):
    assert complete(chat_model, "hello", "you", *GREEDY) == 0
    first, second = texts("hello", "you")
    assert capsys.readouterr().out == f"=== 'hello'\n{first}\n=== 'you'\n{second}\n"


def test_several_completions_are_numbered(chat_model, capsys):
    assert complete(chat_model, "hello", "--n", "2", "--seed", "3", "--max-tokens", "4") == 0
    out = capsys.readouterr().out
    assert "=== 'hello' (1 of 2)\n" in out
    assert "=== 'hello' (2 of 2)\n" in out


@pytest.mark.parametrize("argv", [(), ("-",)])
def test_a_prompt_by_pipe_loses_its_last_line_break(chat_model, texts, capsys, monkeypatch, argv):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert complete(chat_model, *argv, *GREEDY) == 0
    assert capsys.readouterr().out == texts("two\nlines")[0] + "\n"


def test_no_prompt_at_a_terminal(chat_model, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert complete(chat_model) == 2
    assert "no prompt" in capsys.readouterr().err
    assert complete(chat_model, "-", "-") == 2
    assert "once" in capsys.readouterr().err


def test_length_is_the_command_lines_the_checkpoints_or_256(chat_model, monkeypatch):
    asked = []
    monkeypatch.setattr(LLM, "stream", lambda self, prompt, params: asked.append(params.max_tokens) or iter(()))
    override = ("--override-generation-config", '{"max_new_tokens": 9}')
    for argv in ((), override, (*override, "--max-tokens", "3")):
        assert complete(chat_model, "x", *argv) == 0
    assert asked == [256, 9, 3]


def test_engine_options_reach_the_engine(chat_model, capsys):
    assert complete(chat_model, "a long prompt", "--max-model-len", "8") == 2
    assert "max_model_len=8" in capsys.readouterr().err
