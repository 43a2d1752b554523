"""Whole models with Triton's attention: the text is what the reference gives."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_cases import DEVICE

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ConfigError

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("family", "cache"), [("llama", "auto"), ("falcon-rw-1b", "auto"), ("llama", "fp8")], ids=lambda value: value
)
def test_greedy_text_is_that_of_the_reference(tiny_model, family, cache):
    """Prompts in chunks, beside decodes; one prompt begins as another."""
    random = np.random.default_rng(0)
    prompts = [random.integers(2, 128, n).tolist() for n in (1, 40, 60)]
    prompts.append([*prompts[2][:48], 5, 6])
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    found = {}
    for backend in ("reference", "triton"):
        with LLM(
            str(tiny_model(family)),
            skip_tokenizer_init=True,
            device=DEVICE.type,
            dtype="float32",
            attention_backend=backend,
            kv_cache_dtype=cache,
            max_num_batched_tokens=48,
            max_num_seqs=4,
            num_kvcache_blocks=40,
        ) as llm:
            found[backend] = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert found["triton"] == found["reference"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="they run there")
@pytest.mark.parametrize("backend", ["flash", "torch_varlen"])
def test_a_backend_that_cannot_run_says_why(tiny_model, backend):
    with pytest.raises(ConfigError, match=f"attention_backend='{backend}': runs on NVIDIA GPUs, not on cpu"):
        LLM(str(tiny_model("llama")), skip_tokenizer_init=True, device="cpu", attention_backend=backend)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the interpreter")
def test_the_interpreter_says_no_to_bfloat16(tiny_model):
    with pytest.raises(ConfigError, match="cannot multiply bfloat16: set dtype='float32'"):
        LLM(
            str(tiny_model("llama")),
            skip_tokenizer_init=True,
            device="cpu",
            dtype="bfloat16",
            attention_backend="triton",
        )
