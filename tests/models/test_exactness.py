"""On the native CPU path a request's bits are its own: every log probability of every token, to the
last bit, alone and in company, in chunks, after a prefix hit, preempted, and on other pages."""

import numpy as np
import pytest
from tiny_models import TINY

from nanovllm import LLM, SamplingParams
from nanovllm.ops.library import Library, library_or_reason

LIBRARY = library_or_reason()
pytestmark = pytest.mark.skipif(not isinstance(LIBRARY, Library), reason=str(LIBRARY))
WAYS = {
    "alone": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "batched": {"enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 13, "max_num_seqs": 5, "enable_prefix_caching": False},
    "cached": {},
    "preempted": {"num_kvcache_blocks": 10, "enable_prefix_caching": False},
    "large pages": {"kvcache_block_size": 64, "max_num_batched_tokens": 40, "max_num_seqs": 3},
}
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=-1)


def prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    found = [random.integers(2, 100, n).tolist() for n in (1, 5, 16, 37, 90)]
    return [*found, found[-1][:64] + found[3]]


def bits(llm: LLM, order: slice) -> list[list[tuple[int, np.ndarray]]]:
    outputs = llm.generate(prompts()[order], PARAMS, use_tqdm=False)[order]
    return [
        [
            (token, np.array([step[i].logprob for i in sorted(step)], np.float32))
            for token, step in zip(o["token_ids"], o.outputs[0].logprobs, strict=True)
        ]
        for o in outputs
    ]


def same(ours, theirs) -> bool:
    return all(
        a[0] == b[0] and np.array_equal(a[1], b[1])
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TINY)
def test_bits_are_the_requests_own(tiny_model, threads, family, dtype):
    found = {}
    for way, options in WAYS.items():
        threads(2 if way == "batched" else 1)
        with LLM(str(tiny_model(family)), skip_tokenizer_init=True, dtype=dtype, **options) as llm:
            assert llm.engine._executor._runner._backend.name == "native"
            found[way] = bits(llm, slice(None))
            found[way + ", backwards"] = bits(llm, slice(None, None, -1))
            if way == "preempted" and llm.engine.scheduler.cache.window is None:
                assert llm.engine.stats.preemptions > 0
    different = [way for way in found if not same(found[way], found["alone"])]
    assert not different
