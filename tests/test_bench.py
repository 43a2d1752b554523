"""bench.py: what it asks of engines, what it shows, and that it leaves nobody behind."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import attention, gpu, models, plot, quantized, report, roof, startup, workload
from benchmarks.compare import contenders
from nanovllm import LLM
from nanovllm.attention.reference import ReferenceAttention

ROOT = Path(__file__).parents[1]
PROBE = {"read_gb_per_s": 40.0, "bf16_gflop_per_s": 800.0}
ENGINE = """#!/bin/sh
sleep 1000 &
echo $! $$ >> {pids}
while read line; do echo '{answer}'; done
"""


@pytest.fixture
def fake(tmp_path):
    """An interpreter that answers every question at once, and has a child; the second is the list of processes."""
    script, pids = tmp_path / "engine", tmp_path / "pids"
    script.write_text(ENGINE.format(pids=pids, answer=json.dumps({"seconds": 0.5, **PROBE})))
    script.chmod(0o755)
    return script, pids


def command(script: Path, *argv: str) -> list[str]:
    pythons = [f"--python={name}={script}" for name in ("probe", "hf", "vllm")]
    return [sys.executable, str(ROOT / "bench.py"), "--shape=gpt2", *pythons, *argv]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", workload.PRESETS)
def test_presets_mean_the_same_tokens_every_time(name):
    preset = workload.PRESETS[name]
    sequences = workload.make_sequences(preset, 100, seed=3)
    assert sequences == workload.make_sequences(preset, 100, seed=3)
    assert sequences != workload.make_sequences(preset, 100, seed=4)
    assert len(sequences) == preset.num_seqs
    least, most = preset.input
    assert all(least <= len(p) - preset.shared <= most and 0 <= min(p) <= max(p) < 100 for p, _ in sequences)
    assert all(preset.output[0] <= n <= preset.output[1] for _, n in sequences)
    assert len(workload.shared_beginning(sequences)) == preset.shared
    assert max(len(p) + n for p, n in sequences) <= preset.longest


def test_presets_say_what_they_are():
    assert str(workload.PRESETS["mixed"]) == "64 x (100-400 in, 50-200 out)"
    assert str(workload.PRESETS["prefix"]) == "24 x (512 shared + 32 in, 32 out)"
    assert str(workload.PRESETS["first"]) == "64 x (32 in, 1 out), one after the other"


def test_sequences_are_given_at_once_or_one_after_the_other():
    sequences = [([1, 2], 3), ([4], 5)]
    assert workload.PRESETS["mixed"].batches(sequences) == [sequences]
    assert workload.PRESETS["first"].batches(sequences) == [[([1, 2], 3)], [([4], 5)]]


def test_a_shared_beginning_leaves_every_prompt_a_token():
    assert workload.shared_beginning([([1] * 50, 1), ([1] * 40, 1)]) == [1] * 39
    assert workload.shared_beginning([([1] * 50, 1)]) == []
    assert workload.shared_beginning([([1, 2], 1), ([1, 3], 1)]) == []


def test_contenders():
    plain, torchs, changed = contenders(["nanovllm", "nanovllm-torch"], ["enable_prefix_caching=False"])
    assert (plain.engine, plain.options) == ("nanovllm", {})
    assert (torchs.engine, torchs.options["kernels"]) == ("nanovllm", "torch")
    assert (changed.label, changed.engine) == ("enable_prefix_caching=False", "nanovllm")
    assert changed.options == {"enable_prefix_caching": False}
    assert contenders([], ["max_num_batched_tokens=64"])[0].options == {"max_num_batched_tokens": 64}
    assert contenders([], ["kernels=torch,seed=1"])[0].options == {"kernels": "torch", "seed": 1}


def test_the_roof_of_a_shape():
    work = roof.Work.of(models.SHAPES["qwen3-0.6b"], "bfloat16")
    layer = 4096 * 1024 + 1024 * 2048 + 6144 * 1024 + 1024 * 3072
    assert (work.layers, work.head) == (28 * layer, 151936 * 1024)
    assert (work.cached, work.attention) == (28 * 2 * 8 * 128 * 2, 28 * 4 * 16 * 128)
    one = [([5] * 10, 3)]
    assert work.weights == (work.layers + work.head) * 2
    expected = (3 * work.weights + work.cached * (11 + 12)) / 40e9
    assert work.seconds(one, 0, PROBE) == pytest.approx(expected)
    many = [([5] * 100, 1)] * 20
    flop = 2 * (work.layers * 2000 + work.head * 20) + work.attention * 20 * 100**2 / 2
    assert work.seconds(many, 0, PROBE) == pytest.approx(flop / 800e9)
    assert work.seconds(many, 90, PROBE) < work.seconds(many, 0, PROBE) / 5
    assert roof.Work.of({"num_local_experts": 8}, "bfloat16") is None


def test_the_roof_counts_weights_as_they_are(tiny_model):
    """It counted those of bfloat16 for quantised engines, which then did twice what can be done."""
    path, found = str(tiny_model("llama")), {}
    options = {"num_kvcache_blocks": 4, "max_model_len": 16, "skip_tokenizer_init": True}
    for quantization in (None, "int8"):
        with LLM(path, dtype="bfloat16", quantization=quantization, **options) as llm:
            found[quantization] = roof.linear_bytes(llm)
            total = sum(llm.apply_model(lambda m: sum(p.nbytes for p in m.parameters())))
            assert 0 < found[quantization] < total
    assert found["int8"] < 0.7 * found[None]


def test_the_roof_counts_states_read_and_written():
    work = roof.Work.of(models.SHAPES["granite-4.0-h-350m"], "bfloat16")
    assert work.states == 28 * (4 * 48 * 32 * 128 + 2 * 3 * (48 * 32 + 2 * 128))
    step = work.seconds([([5], 2)] * 200, 0, PROBE) - work.seconds([([5], 1)] * 200, 0, PROBE)
    moved = work.weights + 200 * (2 * work.states + 2 * work.cached)
    assert step == pytest.approx(moved / 40e9)


def test_a_run_with_engines_that_answer_at_once(fake, tmp_path):
    script, pids = fake
    argv = ("--preset=batch8,prefill", "--engine=hf,vllm,llamacpp", "--rounds=2", f"--json={tmp_path / 'runs'}")
    done = subprocess.run(command(script, *argv), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "llamacpp: does not read gpt2, random weights; left out" in done.stdout
    assert "round 2: 40 GB/s, 800 GFLOP/s: hf 1024, vllm 1024 tok/s" in done.stdout
    assert "batch8: 8 x (64 in, 64 out), gpt2, random weights in bfloat16, median of 2" in done.stdout
    rows = [row.split() for row in done.stdout.splitlines()]
    assert ["vllm", "0.50", "2048", "2", "-", "0.5", "1.00"] in rows
    line = done.stdout.splitlines()[-1]
    assert (tmp_path / "runs").read_text() == line + "\n"
    assert json.loads(line)["presets"]["batch8"]["results"]["hf"]["output"] == 1024
    assert not any(map(is_alive, map(int, pids.read_text().split())))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_it_ends_the_engines_that_stand_still(fake, interruptible_children, number):
    script, pids = fake
    argv = command(script, "--preset=batch8", "--engine=hf,vllm", "--rounds=10000000")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as bench:
        assert bench.stdout.readline().startswith("round 1: ")
        processes = [int(pid) for pid in pids.read_text().split()]
        assert len(processes) == 6 and all(map(is_alive, processes))
        bench.send_signal(number)
        bench.stdout.close()
    assert bench.returncode != 0
    deadline = time.monotonic() + 20
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))


def test_engines_that_do_not_start_are_left_out(tmp_path):
    missing = command(Path("/bin/false"), "--preset=single", "--engine=hf")
    missing = [a for a in missing if "probe" not in a]
    script = tmp_path / "probe"
    script.write_text(ENGINE.format(pids=os.devnull, answer=json.dumps({"seconds": 0.5, **PROBE})))
    script.chmod(0o755)
    done = subprocess.run([*missing, f"--python=probe={script}"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "hf: left out: hf ended with status 1" in done.stdout
    assert "no engine is left" in done.stderr


def test_an_option_that_is_refused_says_why(fake):
    """It said that the engine ended with status -9."""
    argv = command(fake[0], "--preset=single", "--engine=hf", "--rounds=1", "--ab=kvcache_block_size=7")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "kvcache_block_size=7: left out: kvcache_block_size" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_memory_of_a_shape_that_is_loaded():
    """It measured the default model, whatever shape was asked for."""
    argv = [sys.executable, str(ROOT / "bench.py"), "--preset=load", "--shape=gpt2", "--rounds=1"]
    done = subprocess.run([*argv, "--ab=quantization=int8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    plain, int8 = line["results"]["nanovllm"], line["results"]["quantization=int8"]
    assert line["model"] == "gpt2, random weights" and int8["weights"] < 0.7 * plain["weights"]
    assert all(row["imported"] < row["loaded"] <= row["peak"] <= row["resident"] for row in (plain, int8))


@pytest.mark.slow
def test_ranks_and_what_they_say_to_each_other(tiny_model):
    """It had broken unnoticed, when the engine came to plan ahead."""
    argv = [sys.executable, str(ROOT / "bench.py"), "--preset=ranks", f"--model={tiny_model('llama')}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert {(1, 256), (2, 1)} <= {(row["ranks"], row["sequences"]) for row in results}
    assert all(row["plan"] <= row["new_plan"] and row["ms"] > 0 for row in results)
    assert all((row["sums"] > 0) == (row["ranks"] > 1) for row in results)


@pytest.mark.parametrize("wrong", ["--engine=nano", "--preset=pool,single", "--ab=seed", "--rounds=0"])
def test_wrong_usage(monkeypatch, wrong):
    monkeypatch.setattr(sys, "argv", ["bench.py", wrong])
    with pytest.raises(SystemExit, match="2"):
        bench.parse_args()


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it runs")
def test_kernels_of_gpus_need_one():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), "--preset=kernels"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "--preset kernels needs a CUDA device" in done.stderr


def measured(shape: str, **engines: tuple[int, int]) -> dict:
    return {"shape": shape, "results": {name: {"input": i, "output": o} for name, (i, o) in engines.items()}}


SINGLE, PREFILL = "1 x (64 in, 8 out)", "1 x (9 in, 1 out)"
RUNS = [
    {"model": "m", "presets": {"single": measured(SINGLE, hf=(1, 2))}},
    {"model": "m", "kl": {}},
    {
        "model": "m",
        "presets": {"prefill": measured(PREFILL, hf=(3, 4)), "single": measured(SINGLE, hf=(5, 6), vllm=(7, 8))},
    },
]


def test_what_is_drawn():
    single, prefill = f"single: {SINGLE}\noutput tok/s", f"prefill: {PREFILL}\ninput tok/s"
    assert plot.collect(RUNS) == {single: {"hf": 6, "vllm": 8}, prefill: {"hf": 3}}
    with pytest.raises(SystemExit, match="there is none"):
        plot.plot(RUNS[1:2], "nowhere.png")


def test_a_chart_from_runs_in_a_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for run in RUNS:
        args = argparse.Namespace(json=str(tmp_path / "runs"), plot=None)
        report.finish(args, **run)
    plot.plot(plot.read_lines(str(tmp_path / "runs")), str(tmp_path / "chart.png"))
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'nanovllm\[bench\]'"):
        plot.plot(RUNS, "nowhere.png")


WHERE = {"hardware": "an H200", "torch": "2.13", "commit": "abc"}
MACHINE = {**WHERE, "status": 0}


def test_tables_of_a_gpu():
    row = {"seconds": 3.5, "input": 1000.4, "output": 2000.0, "load": 1.0, "of_roof": 0.756}
    both = {"nanovllm": row, "batch_invariant=true": {"seconds": 0.04, "input": 1.0, "output": 2.0}}
    kernels = {"rms_norm, 1": {"triton": 2.0, "torch": 5.0}, "draw": {"triton": 1234.5}}
    tests = {"tests": "1 failed, 2 passed in 5.0s", "failures": ["FAILED tests/a.py::b - c"]}
    lines = [
        {"part": "tests/a.py", **MACHINE, **tests, "status": 1},
        {"part": "qwen3-8b", **MACHINE, "status": 1},
        {"part": "startup", **MACHINE, "model": "a", "startup": 7.1234, "capture": 2.5},
        {"part": "qwen3-8b", **MACHINE, "model": "b", "presets": {"nano": {"shape": "256 x ...", "results": both}}},
        {"part": "kernels", **MACHINE, "commit": "def", "microseconds": kernels},
        {"part": "mixers", **MACHINE, "status": 2},
    ]
    assert gpu.tables(lines) == [
        "## models",
        "",
        "an H200, torch 2.13, commit abc",
        "",
        "| model | workload | floor | measured | of it | tokens/s in, out |",
        "|---|---|---|---|---|---|",
        "| a | from `python` to the first token |  | 7.12 s |  |  |",
        "| a | of which graphs are captured |  | 2.5 s |  |  |",
        "| b | 256 x ... | 2.65 s | 3.5 s | 76% | 1000, 2000 |",
        "| b | 256 x ..., batch_invariant=true |  | 40 ms |  | 1, 2 |",
        "",
        "## kernels",
        "",
        "an H200, torch 2.13, commit def",
        "",
        "| kernels, microseconds | triton | torch |",
        "|---|---|---|",
        "| rms_norm, 1 | 2 | 5 |",
        "| draw | 1234 |  |",
        "",
        "## tests",
        "",
        "an H200, torch 2.13, commit abc",
        "",
        "| `pytest -m gpu` | result |",
        "|---|---|",
        "| tests/a.py | 1 failed, 2 passed in 5.0s |",
        "",
        "- FAILED tests/a.py::b - c",
        "- failed: tests/a.py",
        "- failed: mixers",
    ]


def test_the_document_has_the_rows_that_a_gpu_writes():
    lines = []
    for part, options in gpu.MODELS.items():
        given = dict(zip(options[::2], options[1::2], strict=True))
        line = {"part": part, **MACHINE, "model": f"{given['--shape']}, random weights"}
        row = {"seconds": 1.0, "input": 1.0, "output": 1.0, "of_roof": 1.0}
        results = {label: row for label in ("nanovllm", given.get("--ab")) if label}
        shapes = {name: str(workload.PRESETS[name]) for name in given["--preset"].split(",") if part != "startup"}
        presets = {name: {"shape": shape, "results": results} for name, shape in shapes.items()}
        lines.append(line | ({"startup": 1.0, "capture": 1.0} if part == "startup" else {"presets": presets}))
    columns = dict.fromkeys(("floor", *attention.BACKENDS["cuda"]), 1.0)
    kernels = {case.name: columns for case in attention.CASES["cuda"]} | {"storing 16384 tokens": columns}
    lines.append({"part": "attention", **MACHINE, "microseconds": kernels})
    columns = quantized.floors(1, PROBE, 1) | {str(n): 1.0 for n in (*quantized.FEW, quantized.MANY)}
    kernels = dict.fromkeys((quantized.BFLOAT16, *quantized.FORMS, *quantized.EIGHT_BIT), columns)
    lines.append({"part": "quantized", **MACHINE, "microseconds": kernels})

    def headers_and_names(text):
        found, count = [], 0
        for cells in (line.split(" | ") for line in text if line.startswith("| ")):
            is_header = "floor" in cells or "bits a weight" in cells
            count = (2 if cells[0] == "| model" else 1) if is_header else count
            found.append(cells if is_header else cells[:count])
        return found

    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert headers_and_names(page.partition("\n## GPUs")[2].splitlines()) == headers_and_names(gpu.tables(lines))


def test_parts_of_a_gpu_are_added_to_its_file(tmp_path, monkeypatch):
    """One fails, one is skipped here, and both are in the file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: WHERE)
    for part in ("mixers", "tests/attention/test_triton_attention.py"):
        args = argparse.Namespace(out=str(tmp_path / "gpu.md"), part=[part], rounds=0)
        with pytest.raises(SystemExit):
            gpu.run(args)
    text = (tmp_path / "gpu.md").read_text()
    assert "- failed: mixers\n" in text
    assert "| tests/attention/test_triton_attention.py | 8 skipped" in text


def test_floors_of_attention():
    """Reading 4096 tokens of 4 KiB for each of 64; half of 2048 x 2048 products of 16 heads for each of 8."""
    decodes, prompts = (
        next(c for c in attention.CASES["cuda"] if c.name == n) for n in ("64 decodes behind 4096", "8 prompts of 2048")
    )
    assert decodes.floor(PROBE) == pytest.approx(64 * 4096 * 4096 / 40e9 * 1e6)
    assert prompts.floor(PROBE) == pytest.approx(8 * 2048**2 / 2 * 4 * 16 * 128 / 800e9 * 1e6)
    behind = attention.Case("", [(100, 50)])
    assert behind.floor(PROBE) == pytest.approx((100 * 50 + 50**2 / 2) * 4 * 16 * 128 / 800e9 * 1e6)


def test_what_is_timed_of_attention_stores_nothing():
    case = attention.Case("", [(300, 1), (0, 5)])
    attend, store = attention.calls(case, ReferenceAttention(), torch.device("cpu"), torch.float32)
    before = attend()
    assert before.shape == (6, 16, 128) and torch.equal(attend(), before)
    store()
    assert not torch.equal(attend(), before)


def test_how_long_it_takes_to_start_and_to_capture():
    program = "print('captured decoding steps of [4, 2] sequences in 1.5 s', 'first: 7', sep='\\n')"
    seconds, captured = startup._seconds(program, "a model")
    assert 0 < seconds < 60 and captured == 1.5
    assert startup._seconds("print('first: 7')", "a model")[1] == 0
    with pytest.raises(SystemExit, match="did not start"):
        startup._seconds("print('last')", "a model")
