"""Throughput of nanovllm and of its peers on the same token ids.

    python bench.py --preset batch32
    python bench.py --preset batch32 --engine nanovllm,hf
    python bench.py --engine nanovllm,vllm --python vllm=/path/to/venv/bin/python
    python bench.py --model DIR_WITH_CONFIG_JSON --load-format dummy --num-seqs 8
    python bench.py --preset load --model FILE_OR_DIR
    python bench.py --preset linear

N sequences of random tokens, with random input and output lengths (seeded), run greedily to
their full length. Each engine lives in a process of its own; they take turns, `--rounds` times,
and medians are shown, so that a machine that changes speed changes it for all. The table is
followed by one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRESETS: dict[str, dict[str, int]] = {
    "single": {"num_seqs": 1, "min_input": 64, "max_input": 64, "min_output": 128, "max_output": 128},
    "prefill": {"num_seqs": 1, "min_input": 1024, "max_input": 1024, "min_output": 1, "max_output": 1},
    "batch32": {"num_seqs": 32, "min_input": 64, "max_input": 64, "min_output": 64, "max_output": 64},
    "mixed": {"num_seqs": 64, "min_input": 100, "max_input": 400, "min_output": 50, "max_output": 200},
}
LINEARS: dict[str, dict[tuple[int, int], int]] = {  # {model: {(rows, columns) of a weight: how many there are}}
    "SmolLM2-135M": {(960, 576): 30, (576, 576): 30, (3072, 576): 30, (576, 1536): 30, (49152, 576): 1},
    "Qwen3-0.6B": {(4096, 1024): 28, (1024, 2048): 28, (6144, 1024): 28, (1024, 3072): 28, (151936, 1024): 1},
}
STARTUP = """
import sys
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1])
print(next(llm.stream("The capital of France is", SamplingParams(temperature=0))), flush=True)
"""
LOAD = """
import sys
from nanovllm import LLM
LLM(sys.argv[1], dtype=sys.argv[2], load_format=sys.argv[3], max_model_len=64, max_num_seqs=1,
    kvcache_memory="64MiB", skip_tokenizer_init=True)
"""


def main() -> None:
    args = parse_args()
    if args.worker:
        return serve(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped engines end with us
    if args.preset == "startup":
        return bench_startup(args)
    if args.preset == "load":
        return bench_load(args)
    if args.preset == "pool":
        return bench_pool(args)
    if args.preset == "linear":
        return bench_linear(args)
    return bench_engines(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[*PRESETS, "startup", "load", "pool", "linear"], help="startup: seconds "
                        "from python to the first token; load: peak memory of loading a model (Linux); pool: page "
                        "pools of 1,000 and 1,000,000 pages; linear: linear layers, native against torch")  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights for a config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", default="nanovllm", help=f"one or several of {', '.join(ENGINES)}")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="its interpreter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("num-seqs", 64), ("min-input", 100), ("max-input", 1024), ("min-output", 100),
                          ("max-output", 1024)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=f"default {default}, or the preset's")
        parser.set_defaults(**{f"default_{name.replace('-', '_')}": default})
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("num_seqs", "min_input", "max_input", "min_output", "max_output"):
        if getattr(args, name) is None:
            setattr(args, name, PRESETS.get(args.preset, {}).get(name, getattr(args, f"default_{name}")))
    unknown = set(args.engine.split(",")) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engine {', '.join(unknown)}; choose from {', '.join(ENGINES)}")
    return args


# --- the workload ---------------------------------------------------------------------------


def make_workload(args: argparse.Namespace, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt token ids, output length) of each sequence."""
    rng = random.Random(seed)
    lengths = [
        (rng.randint(args.min_input, args.max_input), rng.randint(args.min_output, args.max_output))
        for _ in range(args.num_seqs)
    ]
    return [([rng.randrange(vocab_size) for _ in range(n)], out) for n, out in lengths]


# --- engines, each alone in its process -------------------------------------------------------


class NanoVLLM:
    options: dict[str, str] = {}  # noqa: RUF012 - never changed

    def __init__(self, args: argparse.Namespace, paths: dict[str, str]) -> None:
        from nanovllm import LLM, SamplingParams

        # a GGUF file is the same weights for every engine; a dummy model exists only here
        self.llm = LLM(args.model, dtype=args.dtype, load_format=args.load_format, skip_tokenizer_init=True,
                       **self.options)  # fmt: skip
        self.params = SamplingParams

    def run(self, workload: list[tuple[list[int], int]]) -> dict[str, float]:
        self.llm.reset_prefix_cache()
        params = [self.params(temperature=0, ignore_eos=True, max_tokens=n) for _, n in workload]
        steps = self.llm.engine.stats.steps
        outputs = self.llm.generate([p for p, _ in workload], params, use_tqdm=False)
        assert [len(o["token_ids"]) for o in outputs] == [n for _, n in workload]
        return {"steps": self.llm.engine.stats.steps - steps}


class TorchKernels(NanoVLLM):
    """The same without the native kernels."""

    options = {"kernels": "torch", "attention_backend": "cpu"}  # noqa: RUF012


class HuggingFace:
    """transformers' generate on one left-padded batch, to the longest output."""

    def __init__(self, args: argparse.Namespace, paths: dict[str, str]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(paths["hf"], dtype=getattr(torch, args.dtype))

    def run(self, workload: list[tuple[list[int], int]]) -> dict[str, float]:
        torch, width, count = self.torch, max(len(p) for p, _ in workload), max(n for _, n in workload)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in workload])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in workload])
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
        assert out.shape[1] == width + count
        return {}


class VLLM:
    def __init__(self, args: argparse.Namespace, paths: dict[str, str]) -> None:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # else it leaves one core unused
        from vllm import LLM, SamplingParams

        longest = args.max_input + args.max_output
        self.llm = LLM(
            paths["hf"],
            dtype=args.dtype,
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=256,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.5,  # on the CPU: its share of the host's memory
        )
        self.params = SamplingParams

    def run(self, workload: list[tuple[list[int], int]]) -> dict[str, float]:
        params = [self.params(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for _, n in workload]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p, _ in workload], params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in workload]
        return {}


class LlamaCpp:
    """One sequence after the other: the Python binding has no batching."""

    def __init__(self, args: argparse.Namespace, paths: dict[str, str]) -> None:
        from llama_cpp import Llama

        threads = os.cpu_count()
        self.llm = Llama(paths["gguf"], n_ctx=args.max_input + args.max_output, n_batch=2048, n_threads=threads,
                         n_threads_batch=threads, verbose=False)  # fmt: skip

    def run(self, workload: list[tuple[list[int], int]]) -> dict[str, float]:
        for prompt, count in workload:
            self.llm.reset()
            for i, _ in enumerate(self.llm.generate(prompt, temp=0.0, reset=True), start=1):
                if i == count:
                    break
        return {}


class OpenVINO:
    """Continuous batching over the GGUF file."""

    def __init__(self, args: argparse.Namespace, paths: dict[str, str]) -> None:
        import openvino as ov
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = 256
        scheduler.max_num_batched_tokens = 2048
        scheduler.cache_size = 4  # GiB
        self.ov, self.genai = ov, genai
        self.pipe = genai.ContinuousBatchingPipeline(paths["gguf"], scheduler, "CPU")

    def run(self, workload: list[tuple[list[int], int]]) -> dict[str, float]:
        import numpy as np

        prompts = [self.ov.Tensor(np.array([p], dtype=np.int64)) for p, _ in workload]
        configs = [self.genai.GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False) for _, n in workload]
        outputs = self.pipe.generate(prompts, configs)
        assert [len(o.m_generation_ids[0]) for o in outputs] == [n for _, n in workload]
        return {}


ENGINES = {"nanovllm": NanoVLLM, "nanovllm-torch": TorchKernels, "hf": HuggingFace, "vllm": VLLM,
           "llamacpp": LlamaCpp, "openvino": OpenVINO}  # fmt: skip


def serve(args: argparse.Namespace) -> None:
    """A worker: load, then run each workload that comes on stdin; results go to the real stdout."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no result
    start = time.perf_counter()
    engine = ENGINES[args.worker](args, json.loads(sys.stdin.readline()))
    print(json.dumps({"load": time.perf_counter() - start}), file=results, flush=True)
    for line in sys.stdin:
        workload = json.loads(line)
        start = time.perf_counter()
        extra = engine.run(workload)
        print(json.dumps({"seconds": time.perf_counter() - start, **extra}), file=results, flush=True)


class Worker:
    """An engine's process group; stopped while another engine runs, so that nobody's idle threads
    (some spin) take its cores."""

    def __init__(self, name: str, python: str, paths: dict[str, str]) -> None:
        self.name = name
        command = [python, __file__, "--worker", name, *sys.argv[1:]]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.load = self.ask(paths)["load"]
        self.results: list[dict[str, float]] = []

    def ask(self, question: object) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.close()
            status = self.process.returncode
            raise SystemExit(f"{self.name} ended with status {status}; is it installed for its --python?")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# --- the comparison -----------------------------------------------------------------------------


def bench_engines(args: argparse.Namespace) -> None:
    from nanovllm.models.registry import model_class
    from nanovllm.weights.checkpoint import open_checkpoint
    from nanovllm.weights.hub import resolve_model

    names = args.engine.split(",")
    path = resolve_model(args.model)
    checkpoint = open_checkpoint(path)
    sizes = model_class(checkpoint.config["architectures"]).config_class.from_hf(checkpoint.config)
    pythons = dict(p.split("=", 1) for p in args.python)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        paths = {"gguf": str(path), "hf": str(path)}
        if path.is_file() and {"hf", "vllm"} & set(names):
            export_to_hf(checkpoint, args.dtype, Path(scratch))
            paths["hf"] = scratch
        workers: list[Worker] = []
        try:
            for name in names:
                workers.append(Worker(name, pythons.get(name, sys.executable), paths))
            probe = probe_machine()
            for round_number in range(args.rounds + 1):  # the first warms up
                workload = make_workload(args, sizes.vocab_size, args.seed + round_number)
                for worker in workers:
                    worker.results.append(measure(worker, args, sizes, workload))
        finally:
            for worker in workers:
                worker.close()
    report(args, workers, probe)


def measure(
    worker: Worker, args: argparse.Namespace, sizes: object, workload: list[tuple[list[int], int]]
) -> dict[str, float]:
    result = worker.ask(workload)
    seconds = result["seconds"]
    result["input"] = sum(len(p) for p, _ in workload) / seconds
    result["output"] = sum(n for _, n in workload) / seconds
    if "steps" in result:
        result["gb_per_s"] = bytes_read(sizes, args.dtype, workload, result["steps"]) / seconds / 1e9
    return result


def export_to_hf(checkpoint: object, dtype: str, folder: Path) -> None:
    """A GGUF file as a Hugging Face directory, for peers that do not read it."""
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    save_file({t.name: t.load().to(kind).contiguous() for t in checkpoint.tensors()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = checkpoint.config | {"dtype": dtype, "hidden_act": "silu"}
    config["eos_token_id"] = (config["eos_token_id"] or [None])[0]
    (folder / "config.json").write_text(json.dumps(config))


def bytes_read(sizes: object, dtype: str, workload: list[tuple[list[int], int]], steps: float) -> float:
    """What has to come from memory at least: each weight once a step, each cached token's keys and
    values once a generated token."""
    s, item = sizes, 4 if dtype == "float32" else 2
    heads, kv_heads = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    layer = s.hidden_size * (2 * heads + 2 * kv_heads + 3 * s.intermediate_size)
    weights = (s.num_hidden_layers * layer + s.vocab_size * s.hidden_size) * item
    cached = sum(n * len(p) + n * (n - 1) // 2 for p, n in workload)
    return steps * weights + cached * s.num_hidden_layers * 2 * kv_heads * item


def probe_machine() -> dict[str, float]:
    """This machine at this moment: memory read GB/s and bf16 GFLOP/s, by torch."""
    import torch

    data = torch.ones(1 << 27)  # 512 MiB
    a = torch.ones(2048, 2048, dtype=torch.bfloat16)
    read = min(timed(lambda: data.sum()) for _ in range(5))
    multiply = min(timed(lambda: a @ a) for _ in range(5))
    return {
        "read_gb_per_s": round(data.nbytes / read / 1e9, 1),
        "bf16_gflop_per_s": round(2 * 2048**3 / multiply / 1e9),
    }


def timed(call: object) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(args: argparse.Namespace, workers: list[Worker], probe: dict[str, float]) -> None:
    rows = []
    for worker in workers:
        results = worker.results[1:]
        rows.append({key: statistics.median(r[key] for r in results) for key in results[0]} | {"load": worker.load})
    print(f"\n{args.model}, {args.dtype}: {args.num_seqs} sequences, input {args.min_input}-{args.max_input}, "
          f"output {args.min_output}-{args.max_output}, median of {args.rounds}; {probe}")  # fmt: skip
    print(
        f"{'engine':<14} {'seconds':>8} {'input tok/s':>12} {'output tok/s':>13} {'GB/s':>6} {'load s':>7} {'ratio':>6}"
    )
    for worker, row in zip(workers, rows, strict=True):
        speed = f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "-"
        ratio = rows[0]["seconds"] / row["seconds"]
        print(f"{worker.name:<14} {row['seconds']:8.2f} {row['input']:12.0f} {row['output']:13.0f} {speed:>6} "
              f"{row['load']:7.1f} {ratio:6.2f}")  # fmt: skip
    print_json(args, probe=probe, results={w.name: r for w, r in zip(workers, rows, strict=True)})


def print_json(args: argparse.Namespace, **measured: object) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    keys = (
        "preset",
        "model",
        "dtype",
        "seed",
        "rounds",
        "num_seqs",
        "min_input",
        "max_input",
        "min_output",
        "max_output",
    )
    print(json.dumps({"hardware": f"{cpu_name()} x {os.cpu_count()}", "commit": commit.stdout.strip(),
                      **{k: getattr(args, k) for k in keys}, **measured}))  # fmt: skip


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


# --- start-up, loading and the page pool --------------------------------------------------------


def bench_startup(args: argparse.Namespace) -> None:
    seconds = []
    for _ in range(args.rounds + 1):  # the first fetches the model and fills the file cache
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", STARTUP, args.model], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("the engine did not start")
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    print(f"from `python` to the first token of {args.model}: {median:.2f} s (median of {args.rounds})")
    print_json(args, seconds=median)


def bench_load(args: argparse.Namespace) -> None:
    """Peak memory of a process that loads the model, with hardly any cache.

    Anonymous memory is what the process owns; pages of mapped files come on top of it in the
    total, and go back to the system when it needs them.
    """
    from nanovllm.weights.checkpoint import open_checkpoint
    from nanovllm.weights.hub import resolve_model

    path = resolve_model(args.model)
    elements = sum(math.prod(tensor.shape) for tensor in open_checkpoint(path, args.load_format).tensors())
    size = elements * (4 if args.dtype == "float32" else 2)
    runs = [peak_memory([sys.executable, "-c", LOAD, str(path), args.dtype, args.load_format])
            for _ in range(args.rounds)]  # fmt: skip
    found = {key: max(run[key] for run in runs) for key in ("anonymous", "total")}
    seconds = statistics.median(run["seconds"] for run in runs)
    print(f"{args.model}, {args.dtype}: weights of {size / 2**30:.2f} GiB; peak {found['anonymous'] / 2**30:.2f} GiB "
          f"anonymous, {found['total'] / 2**30:.2f} GiB with mapped files; {seconds:.1f} s")  # fmt: skip
    print_json(args, model_bytes=size, peak_bytes=found, seconds=seconds)


def peak_memory(command: list[str]) -> dict[str, float]:
    """Bytes and seconds of a process: the kernel keeps the peak of the total, its parts are sampled."""
    start, peaks = time.perf_counter(), {"RssAnon": 0, "VmHWM": 0}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"loading ended with status {process.returncode}")
    return {"anonymous": peaks["RssAnon"], "total": peaks["VmHWM"], "seconds": time.perf_counter() - start}


def bench_pool(args: argparse.Namespace) -> None:
    """Allocate, name, free and evict pages: the cost of one must not depend on the pool's size."""
    from nanovllm.engine.block_manager import BlockManager

    def one_round(num_blocks: int, pages: int = 500, times: int = 400) -> float:
        pool = BlockManager(num_blocks)
        start = time.perf_counter()
        for i in range(times):
            blocks = pool.allocate(pages)
            for block in blocks:
                pool.register(block, b"%d-%d" % (i, block))
            pool.free(reversed(blocks))
        return (time.perf_counter() - start) / (pages * times) * 1e9

    results = {size: statistics.median(one_round(size) for _ in range(args.rounds)) for size in (1_000, 1_000_000)}
    for size, nanoseconds in results.items():
        print(f"{size:>9,} pages: {nanoseconds:.0f} ns to allocate, name and free one")
    print_json(args, nanoseconds=results)


# --- linear layers -------------------------------------------------------------------------------


def bench_linear(args: argparse.Namespace) -> None:
    """All linear layers of a step in bfloat16, one after the other, for several numbers of rows.

    Weights come from memory, as in a model: copies of each shape take turns. A weight of the head is
    multiplied for at most 64 rows, as no step samples from more. The roof is the probe's: whichever
    takes longer, reading the weights or multiplying.
    """
    import torch

    results = []
    print(f"{'model':<14} {'rows':>5} {'ms':>7} {'GB/s':>6} {'GFLOP/s':>8} {'of roof':>8} {'oneDNN packed':>14} "
          f"{'F.linear':>9}")  # fmt: skip
    for model, shapes in LINEARS.items():
        for rows in (1, 8, 32, 64, 256, 1024):
            probe, seconds, size, flop = {}, dict.fromkeys(("native", "packed", "plain"), 0.0), 0, 0
            for (n, k), count in shapes.items():
                probe = {key: max(value, probe.get(key, 0)) for key, value in probe_machine().items()}
                m = min(rows, 64) if n > 40000 else rows
                for name, each in time_linear(torch, n, k, m, args.rounds).items():
                    seconds[name] += each * count
                size, flop = size + count * n * k * 2, flop + count * n * k * m * 2
            ms = seconds["native"] * 1e3
            roof = max(size / probe["read_gb_per_s"], flop / probe["bf16_gflop_per_s"]) / 1e6
            row = {"model": model, "rows": rows, "ms": ms, "gb_per_s": size / ms / 1e6, "gflop_per_s": flop / ms / 1e6,
                   "of_roof": roof / ms, **probe}  # fmt: skip
            row |= {name: seconds[name] / seconds["native"] for name in ("packed", "plain")}
            results.append(row)
            print(f"{model:<14} {rows:5} {ms:7.2f} {row['gb_per_s']:6.1f} {row['gflop_per_s']:8.0f} {roof / ms:8.0%} "
                  f"{row['packed']:13.2f}x {row['plain']:8.2f}x", flush=True)  # fmt: skip
    print_json(args, results=results)


def time_linear(torch: object, n: int, k: int, rows: int, rounds: int) -> dict[str, float]:
    """Seconds of x [rows, k] times a weight [n, k]; the best of the rounds, contenders in turn."""
    from nanovllm.ops.base import select_ops

    cpu = torch.device("cpu")
    copies = max(2, min(60, 100_000_000 // (n * k * 2)))
    weights = [torch.randn(n, k).bfloat16() for _ in range(copies)]
    x = torch.randn(rows, k)
    rounded = x.bfloat16()
    native, packing = (select_ops(name, cpu, torch.bfloat16) for name in ("native", "torch"))
    mine = [native.pack(w, gated=False) for w in weights]
    packed = [packing.pack(w, gated=False) for w in weights]
    contenders = {
        "native": lambda i: native.linear(x, mine[i], n, None),
        "packed": lambda i: packing.linear(rounded, packed[i], n, None),
        "plain": lambda i: torch.nn.functional.linear(rounded, weights[i]),
    }
    best = dict.fromkeys(contenders, math.inf)
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            for i in range(copies):
                call(i)
            best[name] = min(best[name], (time.perf_counter() - start) / copies)
    return best


if __name__ == "__main__":
    main()
