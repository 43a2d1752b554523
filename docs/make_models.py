"""Write docs/models.md: run the tests that prove each family, and lay out what they said.

    python docs/make_models.py

Takes some minutes. Exit code 1 if a test failed; the table shows which.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "models")]

from native_calls import COLUMNS, native_row  # noqa: E402
from published_sizes import PUBLISHED  # noqa: E402
from tiny_models import TINY, make_tiny_model  # noqa: E402

from nanovllm.config import EngineConfig  # noqa: E402
from nanovllm.engine.runner.memory_plan import footprint  # noqa: E402
from nanovllm.models.registry import model_class, supported_architectures  # noqa: E402

PARITY = "tests/models/test_parity.py"
FORMATS = "tests/models/test_formats.py"
GGUF = "tests/weights/test_gguf_families.py"
METHODS = "tests/quantization/test_published_models.py"
SCHEMES = "tests/quantization/test_quantized_models.py"
CACHES = "tests/models/test_quantised_cache.py"
FEATURES = {  # column: (test, its parameter beside the variant)
    "logits": ("test_all_logits_of_tiny_models", None),
    "batched": ("test_greedy_text_of_tiny_models", "batched"),
    "alone": ("test_greedy_text_of_tiny_models", "alone"),
    "chunked": ("test_greedy_text_of_tiny_models", "chunked"),
    "preempted": ("test_greedy_text_of_tiny_models", "preempted"),
    "no prefix cache": ("test_greedy_text_of_tiny_models", "uncached"),
    "reference attention": ("test_greedy_text_of_tiny_models", "reference"),
    "logprobs": ("test_prompt_logprobs_are_the_log_softmax_of_the_logits", None),
    "seeds": ("test_seeded_text_is_the_same_alone_and_in_any_batch", None),
}
FILES = {
    "safetensors": ("test_every_format_gives_the_same_weights", "safetensors-sharded"),
    ".bin": ("test_every_format_gives_the_same_weights", "bin"),
    ".bin sharded": ("test_every_format_gives_the_same_weights", "bin-sharded"),
    "GGUF": ("test_a_model_loads_the_same_from_either_format", None),
}
QUANTISED = {
    "int8": ("test_native_kernels_and_torch_compute_with_the_same_weights", "int8"),
    "int4": ("test_native_kernels_and_torch_compute_with_the_same_weights", "int4"),
    "GGUF": ("test_blocks_give_the_bits_of_the_dequantised_model", None),
    "AWQ": ("test_every_family_by_every_method", "awq"),
    "GPTQ": ("test_every_family_by_every_method", "gptq"),
    "compressed-tensors": ("test_every_family_by_every_method", "compressed-tensors"),
    "FP8": ("test_every_family_by_every_method", "fp8"),
    "int8 KV": ("test_native_kernels_read_what_the_reference_reads", None),
}
HEAD = """\
# Models

This page is written by `python docs/make_models.py` from what the tests said.

## Architectures

The name is the one in config.json's `architectures`. `nanovllm models` prints this list.

"""
PARITY_HEAD = """
## Parity with transformers

One row a variant, a small random model with odd sizes whose norms, biases and multipliers are random too
(`TINY` in [tests/tiny_models.py](../tests/tiny_models.py)). *logits*: every logit of prompts of 1 to 97
tokens is within 2e-5 of transformers' in fp32. The next columns: greedy text equals transformers', batched,
alone, in chunks of 13 tokens, preempted for want of pages, without prefix cache, and with the reference
attention on large pages; each one a second time from cached prefixes. *logprobs*: prompt and output logprobs
are those of transformers. *seeds*: sampled text is the same alone and in any batch.

To repeat a row: `pytest tests/models/test_parity.py -k VARIANT`; for a model of your own: `nanovllm parity MODEL`,
or `nanovllm parity --random llama` for a small random one of a family.

Beside the matrix: every RoPE scaling (linear, dynamic, llama3, yarn, longrope, proportional) at and past the trained
length, and 33,000 tokens in chunks (`pytest tests/models/test_long_context.py`); hybrid models from a state snapshot,
bit-equal to a cold start (`pytest tests/models/test_prefix_snapshots.py`); published sizes against the published
number of parameters (`pytest tests/models/test_published_sizes.py`).

An architecture without a file here runs through transformers' modules with the paged attention of this engine, if
they call attention as transformers' own models do (`pytest tests/models/test_transformers_model.py`); recurrent
states, attention code of their own, softcaps and sinks are refused with the reason.

"""
FORMATS_HEAD = """
## File formats

Each format gives the same parameters, bit for bit, as the safetensors file that transformers wrote; GGUF
within the rounding of what llama.cpp's converter computes. A dash stands where llama.cpp has no such layout, where
it is that of another row, or where it is not read yet. Every quantised type that the `gguf` package
dequantises is read.

To repeat a row: `pytest tests/models/test_formats.py tests/weights/test_gguf_families.py -k VARIANT`.

"""
QUANTISED_HEAD = """
## Quantised

With the native kernels ([quantization.md](quantization.md)). int8 and int4 while loading, and int8 keys and values,
give what torch gives with the same codes. GGUF blocks and published checkpoints give, bit for bit, the logits
of the weights that they stand for; a dash stands where a row is that of another, for families that have no such file,
and for published GPT-2, which is transposed. Experts that lie in one tensor (Granite's) stay as they are on disk.

To repeat a row: `pytest tests/quantization tests/models/test_quantised_cache.py -m "slow or not slow" -k VARIANT`.

"""
NATIVE_HEAD = """
## Native kernels

What each variant's steps call on CPUs: linear layers with what they end with, attention by its heads,
and the rest. All write down and run whole steps in the library; none is left to torch
(`pytest tests/models/test_exactness.py`, which also compares the bits of every way to serve a request).

"""
MEMORY_HEAD = """
## Memory

What published sizes take in bfloat16: weights (a tied head counts once), keys and values of one token, recurrent state
of one sequence. `nanovllm plan MODEL --memory 8GiB` says what fits beside them.

| model | parameters | weights | KV a token | state a sequence |
|---|---|---|---|---|
"""


def main() -> int:
    results = run_tests(PARITY, FORMATS, GGUF)
    every = "every_family or torch_compute or blocks_give or reference_reads"
    results |= run_tests(METHODS, SCHEMES, CACHES, "-m", "slow or not slow", "-k", every)
    text = HEAD + architectures() + PARITY_HEAD + matrix(results, FEATURES) + NATIVE_HEAD + native_rows()
    text += FORMATS_HEAD + matrix(results, FILES) + QUANTISED_HEAD + matrix(results, QUANTISED)
    (ROOT / "docs" / "models.md").write_text(text + MEMORY_HEAD + memory_rows(), encoding="utf-8")
    return 0 if all(results.values()) else 1


def run_tests(*asked: str) -> dict[str, bool]:
    """{test with its parameters: passed}; skipped ones are left out."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.name}"]
        subprocess.run([*command, *asked], cwd=ROOT)
        cases = ElementTree.parse(report.name).iter("testcase")
        return {
            case.attrib["name"]: case.find("failure") is None and case.find("error") is None
            for case in cases
            if case.find("skipped") is None
        }


def architectures() -> str:
    rows = ["| architecture | file |", "|---|---|"]
    for name in supported_architectures():
        module = model_class([name]).__module__
        rows.append(f"| {name} | [{module.split('.')[-1]}.py](../{module.replace('.', '/')}.py) |")
    return "\n".join(rows) + "\n"


def matrix(results: dict[str, bool], columns: dict[str, tuple[str, str | None]]) -> str:
    signs = {True: "✓", False: "✗", None: "-"}
    rows = [f"| variant | architecture | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for variant, config in TINY.items():
        names = (f"{test}[{variant}{f'-{option}' if option else ''}]" for test, option in columns.values())
        cells = " | ".join(signs[results.get(name)] for name in names)
        rows.append(f"| {variant} | {config['architectures'][0]} | {cells} |")
    return "\n".join(rows) + "\n"


def native_rows() -> str:
    rows = [f"| variant | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for variant in TINY:
        with tempfile.TemporaryDirectory() as directory:
            cells = native_row(make_tiny_model(variant, Path(directory)))
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def memory_rows() -> str:
    rows = []
    for name, (architecture, config, parameters) in PUBLISHED.items():
        cls = model_class([architecture])
        model_config = cls.config_class.from_hf(config)
        options = {"dtype": "bfloat16", "device": "cpu", "kernels": "torch", "max_model_len": 64}
        engine = EngineConfig.from_options(name, options).resolve(
            checkpoint_dtype="bfloat16", max_positions=model_config.max_position_embeddings, cuda=False
        )
        model = footprint(cls, model_config, engine)
        kv, state = model.kv_bytes_per_token / 2**10, model.state_bytes / 2**20
        weights = parameters * torch.bfloat16.itemsize / 2**30
        cells = (
            name,
            f"{parameters / 1e9:.3g} B",
            f"{weights:.3g} GiB",
            f"{kv:g} KiB",
            f"{state:.3g} MiB" if state else "-",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
