"""A hybrid model that is served from a state snapshot gives the bits of a cold start."""

import numpy as np
import pytest
from tiny_models import TINY

from nanovllm import LLM, SamplingParams
from nanovllm.ops.library import Library, library_or_reason

LIBRARY = library_or_reason()
HYBRIDS = [name for name, config in TINY.items() if config["architectures"] == ["GraniteMoeHybridForCausalLM"]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=-1)


def prompt(tail: int, shared: int = 150, length: int = 190) -> list[int]:
    """150 tokens that all prompts begin with, and 40 of their own."""
    common = np.random.default_rng(1).integers(2, 100, shared)
    return [*common.tolist(), *np.random.default_rng(tail).integers(2, 100, length - shared).tolist()]


def answer(llm: LLM, token_ids: list[int]) -> tuple[int, list[list[tuple[int, float]]]]:
    """Cached tokens, and every log probability of every step."""
    output = llm.generate(token_ids, PARAMS, use_tqdm=False)[0]
    steps = [sorted((token, found.logprob) for token, found in step.items()) for step in output.outputs[0].logprobs]
    return output.num_cached_tokens, steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernels", "grid"), [("auto", 16), ("torch", 64)])  # whole pages; whole cells
@pytest.mark.parametrize("family", HYBRIDS)
def test_bits_of_a_hit_are_those_of_a_cold_start(tiny_model, family, kernels, grid, dtype):
    if kernels == "auto" and not isinstance(LIBRARY, Library):
        pytest.skip(LIBRARY)
    options = {"skip_tokenizer_init": True, "dtype": dtype, "max_num_seqs": 4, "kernels": kernels}
    with LLM(str(tiny_model(family)), **options) as llm:
        cold = answer(llm, prompt(2))
        llm.reset_prefix_cache()
        assert answer(llm, prompt(3))[0] == 0
        answer(llm, prompt(4))  # captures the state where it leaves the one before
        assert answer(llm, prompt(2)) == (150 // grid * grid, cold[1])
        assert answer(llm, prompt(2)) == (190 // grid * grid, cold[1])
        llm.generate([prompt(tail) for tail in range(4, 12)], PARAMS, use_tqdm=False)  # evicts, in a crowd
        assert answer(llm, prompt(2))[1] == cold[1]
    with LLM(str(tiny_model(family)), **options, enable_prefix_caching=False) as llm:
        again = answer(llm, prompt(2))
    assert again[0] == 0
    if kernels == "auto":
        assert again[1] == cold[1]
    for ours, theirs in zip(again[1], cold[1], strict=True):  # torch sums other chunks in another order
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if dtype == "float32" else 0.1)
