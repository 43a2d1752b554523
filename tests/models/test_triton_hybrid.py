"""Hybrids and mixtures of experts on the GPU's kernels: the text that torch's give. Without a GPU, kernels are
interpreted on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
SHORT = [[5, 9, 80, 23, 7, 11, 64], [100, 2]]


def texts(path: str, device: str, kernels: str, *batches: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = {"device": device, "dtype": "float32", "attention_backend": "reference", "num_kvcache_blocks": 40}
    options |= {"max_num_batched_tokens": 140, "max_num_seqs": 4}
    with LLM(path, skip_tokenizer_init=True, kernels=kernels, **options) as llm:
        outputs = [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
    return [output.outputs[0].token_ids for output in outputs]


@DEVICES
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3-moe", "granitemoe", "granite-hybrid-rope")),
        pytest.param("granite-hybrid-moe", marks=pytest.mark.slow),
    ],
)
def test_the_text_is_torch_s(tiny_model, family, device):
    path = str(tiny_model(family))
    assert texts(path, device, "triton", SHORT) == texts(path, device, "torch", SHORT)


@DEVICES
def test_a_long_prompt_in_chunks_and_one_that_resumes_from_a_snapshot(tiny_model, device):
    path = str(tiny_model("granite-hybrid"))
    long = np.random.default_rng(0).integers(2, 128, 150).tolist()
    batches = [[long, SHORT[0]], [[*long[:140], 5, 6]]]
    assert texts(path, device, "triton", *batches) == texts(path, device, "torch", *batches)
