"""Whole models on the GPU's kernels, interpreted on the CPU: the text that torch's kernels give."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from nanovllm import LLM, SamplingParams

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("where there is a GPU, kernels are compiled: see test_triton_gpu.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's
PROMPTS = [[5, 9, 80, 23, 7, 11, 64], [100, 2]]
ENDLESS = {"max_tokens": 4, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0.0, **ENDLESS),
    SamplingParams(temperature=0.9, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.2, logprobs=2, **ENDLESS),
]


def generated(path: str, kernels: str, **options) -> list:
    with LLM(path, skip_tokenizer_init=True, kernels=kernels, max_model_len=64, **options) as llm:
        return [llm.generate(PROMPTS, params, use_tqdm=False) for params in PARAMS]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
def test_the_text_is_torch_s(tiny_model, family):
    options = {"device": "cpu", "dtype": "float32", "attention_backend": "reference", "num_kvcache_blocks": 20}
    found, wanted = (generated(str(tiny_model(family)), kernels, **options) for kernels in ("triton", "torch"))
    for mine, theirs in zip(chain(*found), chain(*wanted), strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for here, there in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
            assert list(here) == list(there)
            for token, logprob in here.items():
                assert logprob.rank == there[token].rank
                assert logprob.logprob == pytest.approx(there[token].logprob, abs=1e-4)
