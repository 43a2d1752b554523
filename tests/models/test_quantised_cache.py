"""Models whose pages hold codes: a request's bits stay its own, and half the memory is enough."""

from __future__ import annotations

import pytest
import torch
from distributed.families import GREEDY, OPTIONS, PROMPTS, SCARCE
from kernels import native_library
from tiny_models import TINY

from nanovllm import LLM, ConfigError
from nanovllm.cli.main import main
from nanovllm.cli.parity import all_logits, kl_divergence

native_library()
TOKENS = PROMPTS[-1]
INT8 = {"kv_cache_dtype": "int8"}
QUICK = {"llama": "bfloat16", "mistral-window": "float32", "granite-hybrid": "bfloat16", "falcon-7b": "bfloat16"}
FAMILIES = [*QUICK, "mpt", "gemma3", "qwen3-moe", "gpt2", "falcon-11b"]


CASES = [
    pytest.param(family, dtype, marks=[] if QUICK.get(family) == dtype else pytest.mark.slow)
    for family in FAMILIES
    for dtype in ("bfloat16", "float32")
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_bits_are_the_requests_own(tiny_model, capsys, family, dtype):
    """Alone and in company, in chunks, after a prefix hit, preempted: what was decoded is then a prompt."""
    options = ("--kv-cache-dtype", "int8", "--dtype", dtype, "--max-tokens", "20")
    status = main(["verify", str(tiny_model(family)), *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert " preempted)" in out


def logits(path, **options) -> torch.Tensor:
    with LLM(str(path), **OPTIONS, enforce_eager=True, enable_prefix_caching=False, **options) as llm:
        return all_logits(llm, TOKENS)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("llama", "granite-hybrid", "mpt") else pytest.mark.slow) for f in TINY]
)
def test_native_kernels_read_what_the_reference_reads(tiny_model, family):
    path = tiny_model(family)
    native, plain = logits(path, dtype="float32", **INT8), logits(path, dtype="float32")
    reference = logits(path, dtype="float32", attention_backend="reference", **INT8)
    fp8 = logits(path, dtype="float32", attention_backend="reference", kv_cache_dtype="fp8")
    int8, its_reference, e4m3 = (kl_divergence(plain, found).mean().item() for found in (native, reference, fp8))
    assert kl_divergence(reference, native).mean() < 0.02 * int8
    assert 0 < int8 < 5e-5 and int8 == pytest.approx(its_reference, rel=0.1)
    assert int8 < e4m3 < 2e-3


def test_transformers_modules_attend_over_codes_too(tiny_model):
    path = tiny_model("llama")
    ours, fallback = (logits(path, dtype="float32", model_impl=impl, **INT8) for impl in ("nanovllm", "transformers"))
    assert kl_divergence(ours, fallback).mean() < 0.05 * kl_divergence(logits(path, dtype="float32"), ours).mean()


def test_steps_are_recorded_and_memory_holds_twice_the_pages(tiny_model):
    pages = {}
    for kind in ("auto", "int8"):
        options = OPTIONS | {"kvcache_memory": "256KiB", "kv_cache_dtype": kind, "dtype": "bfloat16"}
        with LLM(str(tiny_model("llama")), **options) as llm:
            runner = llm.engine._executor._runner
            head_dim, found = runner._layers[0].cache_spec.head_dim, runner.cache_plan
            assert sum(layer._kv.nbytes for layer in runner._layers) == found.num_bytes <= 256 * 2**10
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert runner._graphs is not None
        pages[kind] = found.num_blocks
    assert pages["int8"] == pytest.approx(pages["auto"] * 2 * head_dim / (head_dim + 4), rel=0.05)


def test_two_ranks_answer_as_one(tiny_model):
    """Their sums have another order: probabilities stay within rounding."""
    found = []
    for size in (1, 2):
        with LLM(str(tiny_model("llama")), **SCARCE, dtype="float32", tensor_parallel_size=size, **INT8) as llm:
            found.append([o.outputs[0] for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)])
    for alone, shared in zip(*found, strict=True):
        assert alone.token_ids == shared.token_ids
        pairs = zip(alone.token_ids, alone.logprobs, shared.logprobs, strict=True)
        assert max(abs(a[t].logprob - b[t].logprob) for t, a, b in pairs) < 1e-3


def test_plan_and_eval(tiny_model, capsys):
    path = str(tiny_model("llama"))
    assert main(["plan", path, "--kv-cache-dtype", "int8", "--memory", "1GiB"]) == 0
    assert "keys and values    int8, " in capsys.readouterr().out
    assert main(["eval", path, "--kv-cache-dtype", "int8", "--dtype", "float32", "--tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert 0 < float(out.split("KL")[1].split()[0]) < 5e-3


def test_pages_that_the_kernels_do_not_take(tiny_model):
    with pytest.raises(ConfigError, match=r"native: needs pages of 16 tokens .*cpu: keeps no keys and values as int8"):
        LLM(str(tiny_model("llama")), **OPTIONS, **INT8, kvcache_block_size=8)
