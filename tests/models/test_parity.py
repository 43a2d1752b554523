"""Our logits and greedy text against transformers', in fp32, however the work is cut up."""

import numpy as np
import pytest
import torch
from gguf_converter import read_quickly
from tiny_models import TINY

from nanovllm import LLM, SamplingParams
from nanovllm.engine.runner.batch_builder import build_batch
from nanovllm.engine.step import PlannedSequence, StepPlan

# Largest difference of any logit. Both sides compute in fp32 and sum in different orders.
TINY_TOLERANCE = 2e-5
SMOLLM2_TOLERANCE = 1e-3  # 30 layers, logits up to 30

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def all_logits(llm: LLM, token_ids: list[int]) -> np.ndarray:
    """[T, V] of one prompt in one pass."""
    runner = llm.engine._executor._runner
    size = runner._block_size
    table = list(range(1, 1 + -(-len(token_ids) // size)))
    part = PlannedSequence(0, np.array(token_ids, np.int32), 0, table, 1, None)
    with torch.inference_mode():
        batch = build_batch(
            StepPlan([part]),
            block_size=size,
            device=runner._device,
            backend=runner._backend,
            with_states=runner.cache_plan.num_slots > 0,
        )
        return runner._model.compute_logits(runner._model(batch)).numpy()


class Reference:
    """transformers in fp32; greedy text is computed once a prompt."""

    def __init__(self, *args, **kwargs):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(*args, dtype=torch.float32, **kwargs).eval()
        self.model.generation_config.eos_token_id = None  # a token like others, as with ignore_eos
        self._texts: dict[tuple[int, ...], list[int]] = {}

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([token_ids])).logits[0].numpy()

    def greedy(self, token_ids: list[int]) -> list[int]:
        """The next GREEDY.max_tokens tokens."""
        key = tuple(token_ids)
        if key not in self._texts:
            self._texts[key] = self._generate(token_ids)
        return self._texts[key]

    @torch.inference_mode()
    def _generate(self, token_ids: list[int]) -> list[int]:
        ids = torch.tensor([token_ids])
        mask = torch.ones_like(ids)
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=GREEDY.max_tokens, do_sample=False)
        return out[0, len(token_ids) :].tolist()


def prompts_for(vocab_size: int) -> list[list[int]]:
    """Ragged prompts, two of them with a long common prefix."""
    random = np.random.default_rng(5)
    prompts = [random.integers(2, vocab_size, n).tolist() for n in (1, 7, 16, 33, 90)]
    return [*prompts, prompts[-1][:64] + prompts[3]]


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tiny_model):
    path = tiny_model(request.param)
    return path, Reference(path)


def test_all_logits_of_tiny_models(tiny):
    path, reference = tiny
    with LLM(str(path), skip_tokenizer_init=True) as llm:
        for prompt in prompts_for(128):
            difference = np.abs(all_logits(llm, prompt) - reference.logits(prompt)).max()
            assert difference < TINY_TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"max_num_batched_tokens": 13, "max_num_seqs": 5}, id="chunked"),
        pytest.param({"num_kvcache_blocks": 20, "kvcache_block_size": 8}, id="preempted"),
        pytest.param({"enable_prefix_caching": False}, id="uncached"),
        pytest.param(
            {
                "attention_backend": "reference",
                "kvcache_block_size": 64,
                "max_num_batched_tokens": 40,
                "max_num_seqs": 3,
            },
            id="reference",
        ),
    ],
)
def test_greedy_text_of_tiny_models(tiny, options):
    path, reference = tiny
    prompts = prompts_for(128)
    expected = [reference.greedy(p) for p in prompts]
    with LLM(str(path), skip_tokenizer_init=True, **options) as llm:
        assert [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
        # a second time in another order, now from cached prefixes where caching is on
        again = llm.generate(prompts[::-1], GREEDY, use_tqdm=False)
        assert [o["token_ids"] for o in again] == expected[::-1]
        assert any(o.num_cached_tokens for o in again) == options.get("enable_prefix_caching", True)
        if "num_kvcache_blocks" in options:
            assert llm.engine.stats.preemptions > 0


def test_prompt_logprobs_are_the_log_softmax_of_the_logits(tiny):
    path, reference = tiny
    prompt = prompts_for(128)[3]
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=-1)
    with LLM(str(path), skip_tokenizer_init=True, max_num_batched_tokens=10, max_num_seqs=2) as llm:
        output = llm.generate(prompt, params, use_tqdm=False)[0]
    tokens = prompt + output["token_ids"]
    expected = torch.from_numpy(reference.logits(tokens)).log_softmax(-1).numpy()
    for position, found in enumerate(output.prompt_logprobs[1:]):
        values = np.array([found[i].logprob for i in range(expected.shape[1])])
        np.testing.assert_allclose(values, expected[position], atol=TINY_TOLERANCE)
    for i, found in enumerate(output.outputs[0].logprobs):
        row = expected[len(prompt) - 1 + i]
        assert set(found) == set(np.argsort(-row)[:2].tolist())
        assert found[int(row.argmax())].rank == 1
        assert found[int(row.argmax())].logprob == pytest.approx(row.max(), abs=TINY_TOLERANCE)


@pytest.mark.parametrize("family", TINY)
def test_seeded_text_is_the_same_alone_and_in_any_batch(tiny_model, family):
    prompts = prompts_for(128)
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=12, ignore_eos=True) for i in range(len(prompts))
    ]
    with LLM(str(tiny_model(family)), skip_tokenizer_init=True) as llm:
        alone = [llm.generate(p, s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params, strict=True)]
        together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
        crowd = llm.generate(prompts[::-1] + prompts, params[::-1] + params[1:] + params[:1], use_tqdm=False)
    assert together == alone
    assert [o["token_ids"] for o in crowd[: len(prompts)]] == alone[::-1]
    assert len({tuple(t) for t in alone}) == len(prompts)


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    with read_quickly():
        return Reference(smollm2_path.parent, gguf_file=smollm2_path.name)


TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
]


def test_smollm2_logits_and_greedy_text(smollm2, smollm2_path):
    """Real weights: the GGUF file dequantised to fp32 on both sides."""
    options = {"dtype": "float32", "max_model_len": 512}
    with LLM(str(smollm2_path), **options) as llm:
        prompts = [llm.get_tokenizer().encode(text) for text in TEXTS]
        for prompt in prompts:
            difference = np.abs(all_logits(llm, prompt) - smollm2.logits(prompt)).max()
            assert difference < SMOLLM2_TOLERANCE
        llm.reset_prefix_cache()
        expected = [smollm2.greedy(p) for p in prompts]
        assert [o["token_ids"] for o in llm.generate(TEXTS, GREEDY, use_tqdm=False)] == expected
        assert [o["token_ids"] for o in llm.generate(TEXTS, GREEDY, use_tqdm=False)] == expected  # cached prefixes
    with LLM(
        str(smollm2_path),
        num_kvcache_blocks=8,
        kvcache_block_size=8,
        max_num_batched_tokens=7,
        max_num_seqs=3,
        dtype="float32",
    ) as llm:  # chunked and preempted
        assert [o["token_ids"] for o in llm.generate(TEXTS[::-1], GREEDY, use_tqdm=False)] == expected[::-1]
        assert llm.engine.stats.preemptions > 0


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize(("kernels", "block_size"), [("auto", 8), ("auto", 16), ("torch", 16)])
def test_bfloat16_bits_do_not_depend_on_the_batch(smollm2_path, kernels, block_size):
    """A seed gives the same text whatever else is in the batch: the real model's tokens and
    logprobs, to the last bit, alone and in company."""
    texts = [*TEXTS, "In 1969", "The ocean"]
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=40, ignore_eos=True, logprobs=0) for i in range(len(texts))
    ]

    def bits(output):
        return [(token, found.logprob) for d in output.outputs[0].logprobs for token, found in d.items()]

    options = {"enable_prefix_caching": False, "kvcache_block_size": block_size, "kernels": kernels}
    with LLM(str(smollm2_path), **options) as llm:
        alone = [bits(llm.generate(t, p, use_tqdm=False)[0]) for t, p in zip(texts, params, strict=True)]
        assert [bits(o) for o in llm.generate(texts, params, use_tqdm=False)] == alone
        assert [bits(o) for o in llm.generate(texts[::-1], params[::-1], use_tqdm=False)] == alone[::-1]
