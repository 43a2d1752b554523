"""`nanovllm run-batch` on one engine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from batches import contents, mixed, read, request, say, texts, write

from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.cli import batch_engine
from nanovllm.cli.batch_engine import Server, answer_here
from nanovllm.cli.batch_input import plan_work
from nanovllm.cli.batch_ray import _crew, _sharing
from nanovllm.cli.main import main


@pytest.fixture
def run(chat_model, tmp_path):
    """run(lines, *options) -> the output's lines, or the exit status if it is not 0."""

    def run_batch(lines, *options: str, out: str = "out"):
        file = write(tmp_path / "in", *lines) if lines is not None else tmp_path / "in"
        status = main(["run-batch", str(file), str(tmp_path / out), "-m", str(chat_model), *options])
        return read(tmp_path / out) if status == 0 else status

    return run_batch


def test_answers_are_the_engines_in_the_order_of_the_input(run, chat_model):
    answers = run(
        [
            request("chat", say("hello"), temperature=0, max_tokens=30),
            request("short", "hello", seed=4, n=2),
            request("ids", [[1, 2, 3], [4]], temperature=0, max_tokens=3),
        ]
    )
    assert [line["custom_id"] for line in answers] == ["chat", "short", "ids"]
    with LLM(str(chat_model)) as llm:
        chat = llm.chat(say("hello"), SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
        short = llm.generate("hello", SamplingParams(seed=4, n=2), use_tqdm=False)
        ids = llm.generate([[1, 2, 3], [4]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert texts(answers[0]) == [chat[0]["text"]]
    assert texts(answers[1]) == [completion.text for completion in short[0].outputs]
    assert texts(answers[2]) == [output["text"] for output in ids]
    assert all(line["error"] is None for line in answers)


def test_a_wrong_line_is_an_error_of_its_own(run):
    answers = run(
        [
            request("good", "x"),
            request("typo", "x", temprature=1),
            request("long", "x" * 600),
            request("bias", "x", logit_bias={"999": 1}),
            request("model", "x", model="gpt-4o"),
            request("surrogate", "\ud800"),
            "no JSON",
            '{"custom_id": "empty", "method": "POST", "url": "/v1/completions"}',
            request("good", "again"),
            request("last", say("x")),
        ]
    )
    found = [(line["response"]["status_code"], (line["error"] or {"param": None})["param"]) for line in answers]
    assert found == [
        (200, None),
        (400, "temprature"),
        (400, "prompt"),
        (400, "logit_bias"),
        (404, "model"),
        (400, "prompt"),
        (400, None),
        (400, "body"),
        (400, "custom_id"),
        (200, None),
    ]
    assert "max_model_len=512" in answers[2]["error"]["message"]
    assert answers[1]["response"]["body"]["error"] == answers[1]["error"]


def test_names_and_template(run, tmp_path):
    (tmp_path / "template").write_text("{{ messages[0].content }}")
    names = ("--served-model-name", "gpt-4o", "--served-model-name", "other")
    lines = [request("a", say("hi"), model="other", return_token_ids=True), request("b", "hi", model="gpt-4o")]
    chat, completion = run(lines, *names, "--chat-template", str(tmp_path / "template"))
    assert chat["response"]["body"]["model"] == completion["response"]["body"]["model"] == "gpt-4o"
    assert chat["response"]["body"]["prompt_token_ids"] == list(b"hi")


def test_answers_depend_on_neither_order_nor_company(run, tmp_path):
    """Not even those of requests without a seed, unless the engine has none."""
    lines = mixed(12)
    run(lines)
    run(lines[::-1], "--max-num-seqs", "2", out="reversed")
    assert contents(tmp_path / "reversed")[::-1] == contents(tmp_path / "out")
    drawn = [line for line in lines if "temperature" not in line["body"]][:1]
    drawn[0]["body"].pop("seed")
    assert texts(run(drawn, "--engine-seed", "none", out="a")[0]) != texts(
        run(drawn, "--engine-seed", "none", out="b")[0]
    )
    assert (
        texts(run(drawn, out="c")[0])
        == texts(run(drawn, out="d")[0])
        != texts(run(drawn, "--engine-seed", "1", out="e")[0])
    )


def test_lines_are_taken_as_there_is_room(chat_model, tmp_path, monkeypatch):
    """Enough for the engine to be full, and no more."""
    taken, waiting = 0, []

    def counted(file, asked):
        nonlocal taken
        for place, _ in asked:
            taken += 1
            yield place, lines[place]

    lines = [(write(tmp_path / "line", line)).read_bytes() for line in mixed(40, tokens=20)]
    work = plan_work(write(tmp_path / "in", *mixed(40)), {})
    monkeypatch.setattr(batch_engine, "read_lines", counted)
    for done, _ in enumerate(answer_here(Server(str(chat_model), {"max_num_seqs": 4}, ["m"]), work), start=1):
        waiting.append(taken - done)
    assert done == 40
    assert 2 <= max(waiting) <= 8
    assert min(waiting[:30]) >= 1


def test_a_second_run_computes_only_what_is_missing(run, tmp_path, monkeypatch):
    lines = mixed(6)
    first = run(lines)
    whole = (tmp_path / "out").read_bytes()
    assert run(None) == first
    half = whole[: len(whole) // 2]
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial").write_bytes(half)
    kept = half.count(b"\n")
    second = run(None)
    assert 0 < kept < 6
    assert [one == other for one, other in zip(first, second, strict=True)] == [True] * kept + [False] * (6 - kept)
    assert list(map(texts, first)) == list(map(texts, second))
    assert not set(read_ids(run(None, "--overwrite"))) & set(read_ids(second))
    monkeypatch.delattr(batch_engine, "LLM")
    run(None)  # nothing is left to do: no model is loaded


def read_ids(lines) -> list[str]:
    return [line["id"] for line in lines]


def test_ctrl_c_leaves_what_is_finished(chat_model, tmp_path, interruptible_children):
    write(tmp_path / "in", *mixed(60, tokens=300))
    argv = ["run-batch", *map(str, (tmp_path / "in", tmp_path / "out")), "-m", str(chat_model), "--max-num-seqs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "nanovllm", *argv], stderr=subprocess.PIPE)
    partial = tmp_path / "out.partial"
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()
    finished = {line["custom_id"]: line["id"] for line in read(partial)}
    assert 3 <= len(finished) < 60
    assert main([*argv[:-1], "50"]) == 0
    ids = {line["custom_id"]: line["id"] for line in read(tmp_path / "out")}
    assert list(ids) == [f"r{i}" for i in range(60)]
    assert finished.items() <= ids.items()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--replicas", "2"), "--replicas needs --ray"),
        (("--skip-tokenizer-init",), "text"),
        (("--executor", "torchrun"), "one writer"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
    ],
)
def test_what_does_not_go_together(run, capsys, argv, message):
    assert run([request("a", "x")], *argv) == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be(chat_model, tmp_path, capsys):
    file = write(tmp_path / "in.partial", request("a", "x"))
    for given, out in ((file, file), (file, tmp_path / "in"), (file, tmp_path), (tmp_path / "none", tmp_path / "out")):
        assert main(["run-batch", str(given), str(out), "-m", str(chat_model), "--overwrite"]) == 2
        assert file.read_bytes()
    assert "is not a file" in capsys.readouterr().err


def test_without_ray(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run([request("a", "x")], "--ray") == 2
    assert 'pip install "nanovllm[ray]"' in capsys.readouterr().err


GPUS, SMALL, BIG, HEAD = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}, {"CPU": 32.0}, {"memory": 1.0}


@pytest.mark.parametrize(
    ("nodes", "options", "asked", "expected"),
    [
        ([BIG], {}, None, (1, 32, 0, 1)),
        ([BIG], {}, 4, (4, 8, 0, 4)),
        ([SMALL, BIG, HEAD], {}, None, (2, 8, 0, 1)),
        ([SMALL, BIG], {}, 3, (3, 4, 0, 2)),
        ([SMALL], {"num_threads": 3, "tensor_parallel_size": 2}, None, (1, 6, 0, 1)),
        ([SMALL], {}, 20, (20, 1, 0, 20)),
        ([GPUS, GPUS, SMALL], {}, None, (8, 1, 1, 1)),
        ([GPUS, GPUS], {"tensor_parallel_size": 2}, None, (4, 1, 2, 1)),
        ([GPUS], {"tensor_parallel_size": 3}, 5, (5, 1, 3, 1)),
        ([GPUS], {"device": "cpu"}, None, (1, 16, 0, 1)),
        ([GPUS], {"tensor_parallel_size": 8}, None, "8 GPUs of a replica"),
        ([SMALL], {"device": "cuda"}, None, "1 GPUs of a replica"),
        ([HEAD], {}, None, "no node"),
    ],
)
def test_what_a_replica_takes_of_a_cluster(nodes, options, asked, expected):
    alive = [{"Resources": resources, "Alive": True} for resources in nodes]
    ray = SimpleNamespace(nodes=lambda: [*alive, {"Resources": {"CPU": 1.0}, "Alive": False}])
    server = Server("m", options, ["m"])
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            _crew(ray, server, asked)
        return
    crew = _crew(ray, server, asked)
    assert (crew.replicas, crew.num_cpus, crew.num_gpus, crew.neighbours) == expected
    shared = _sharing(server, crew)
    assert shared.config
    if crew.num_gpus:
        assert shared == server
    else:
        assert shared.config.device == "cpu"
        assert 1 <= shared.config.num_threads <= max(3, crew.num_cpus)
        assert ("kvcache_memory" in shared.options) == (crew.neighbours > 1)
