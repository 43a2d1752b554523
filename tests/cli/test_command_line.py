"""`nanovllm` as a process, and what its entry point does with errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import nanovllm
from nanovllm.cli.main import main
from nanovllm.errors import ConfigError

LISTED = """
import sys
from nanovllm.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *({"torch", "numpy", "tokenizers", "transformers", "jinja2"} & set(sys.modules)))
"""
COMMANDS = ("complete", "chat", "models", "plan", "parity", "run-batch", "verify")


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(args, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["models"]]
)
def test_what_runs_nothing_loads_nothing(argv):
    done = run(sys.executable, "-c", LISTED, *argv)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_python_dash_m_help_names_the_commands():
    done = run(sys.executable, "-m", "nanovllm", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: nanovllm ")
    assert all(f"\n    {command}" in done.stdout for command in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"nanovllm {nanovllm.__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["serv"], ["complete", "hi"], ["chat"], ["complete", "-m", "x", "--max-token", "3"]]
)
def test_wrong_usage_is_argparses_error(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: nanovllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["complete", "-m", "/nowhere", "hi"], "'/nowhere' does not exist"),
        (["complete", "-m", "/nowhere", "--temperature", "-1", "hi"], "temperature must be"),
        (["chat", "-m", "/nowhere"], "'/nowhere' does not exist"),
        (["chat", "-m", "/nowhere", "--max-num-seqs", "0"], "max_num_seqs must be"),
        (["plan", "/nowhere"], "'/nowhere' does not exist"),
        (["plan", "/nowhere", "--memory", "lots"], "'/nowhere'"),
        (["run-batch", "/nowhere", "/nowhere/out", "-m", "/nowhere"], "/nowhere is not a file"),
        (["parity", "/nowhere"], "'/nowhere' does not exist"),
        (["parity"], "MODEL or --random"),
        (["parity", "a", "--random", "llama"], "MODEL or --random"),
    ],
)
def test_errors_are_one_line_without_a_traceback(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nanovllm: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_error_of_several_lines_becomes_one(monkeypatch, capsys):
    def fail(args):
        raise ConfigError("one\n  two")

    monkeypatch.setattr("nanovllm.cli.models.run", fail)
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "nanovllm: error: one two\n"


def test_ctrl_c_ends_a_command_quietly(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanovllm.cli.models.run", interrupt)
    assert main(["models"]) == 130
    assert capsys.readouterr() == ("", "")


def child(*args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "nanovllm", *args]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# torch: or the log would tell of kernels that were not built
ENDLESS = ("--max-tokens", "100000", "--ignore-eos", "--kernels", "torch")


@pytest.fixture
def endless_model(chat_model, tmp_path):
    """The same weights with more positions than a test can fill."""
    for file in chat_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = (chat_model / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    longer = config.replace('"max_position_embeddings": 512', '"max_position_embeddings": 200000')
    assert longer != config
    (tmp_path / "config.json").write_text(longer)
    return str(tmp_path)


def test_sigint_while_an_answer_streams(endless_model, interruptible_children):
    process = child("complete", "-m", endless_model, "hi", *ENDLESS)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, b"")


def test_a_reader_that_leaves(endless_model):
    process = child("complete", "-m", endless_model, "hi", *ENDLESS)
    assert os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
