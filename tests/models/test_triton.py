"""Whole models on the GPU's kernels: the text that torch's give. Without a GPU they are interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from nanovllm import LLM, SamplingParams

pytest.importorskip("triton")
HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's
PROMPTS = [[5, 9, 80, 23, 7, 11, 64], [100, 2]]
ENDLESS = {"max_tokens": 4, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0.0, **ENDLESS),
    SamplingParams(temperature=0.9, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.2, logprobs=2, **ENDLESS),
]


def generated(path: str, kernels: str, **options) -> list:
    with LLM(path, skip_tokenizer_init=True, kernels=kernels, max_model_len=64, **options) as llm:
        return [output for params in PARAMS for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=HERE), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_text_is_torch_s(tiny_model, family, device):
    options = {"device": device, "dtype": "float32", "attention_backend": "reference", "num_kvcache_blocks": 20}
    found, wanted = (generated(str(tiny_model(family)), kernels, **options) for kernels in ("triton", "torch"))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for here, there in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
            assert list(here) == list(there)
            for token, logprob in here.items():
                assert logprob.rank == there[token].rank
                assert logprob.logprob == pytest.approx(there[token].logprob, abs=1e-4)
