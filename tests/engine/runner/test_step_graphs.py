"""Steps that are recorded with their draws give the tokens of those that are not, and are taken where they may be."""

import pytest
from kernels import native_library

from nanovllm import LLM, SamplingParams
from nanovllm.engine.runner.step_graphs import StepGraphs

native_library()
PROMPTS = [[5, 9, 80, 23, 7, 11, 64], [100, 2], [5, 9, 80, 23, 7, 11, 64, 3]]
ENDLESS = {"max_tokens": 12, "ignore_eos": True}
GREEDY = {"temperature": 0.0, **ENDLESS}
RANDOM = [
    {"temperature": 1.0, "seed": 1, **ENDLESS},
    {"temperature": 0.7, "seed": 2, "top_k": 20, "top_p": 0.9, **ENDLESS},
    {"temperature": 1e9, "seed": 3, "min_p": 0.1, "top_k": 2**40, **ENDLESS},
]


def generate(path, params, monkeypatch, **options):
    """Token ids, and how many steps were recorded with their draws."""
    tokens = StepGraphs.tokens
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(StepGraphs, "tokens", lambda self, plan: calls.append(plan) or tokens(self, plan))
        with LLM(str(path), skip_tokenizer_init=True, max_model_len=64, num_kvcache_blocks=20, **options) as llm:
            outputs = llm.generate(PROMPTS, [SamplingParams(**p) for p in params], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], len(calls)


@pytest.mark.parametrize("family", ["llama", "granite-hybrid"])
@pytest.mark.parametrize("params", [[GREEDY] * 3, RANDOM, [*RANDOM[:2], GREEDY]])
def test_steps_are_recorded_with_their_draws(tiny_model, monkeypatch, family, params):
    wanted, none = generate(tiny_model(family), params, monkeypatch, enforce_eager=True)
    assert none == 0
    found, count = generate(tiny_model(family), params, monkeypatch)
    assert found == wanted
    assert count == 12 if family == "llama" else count >= 8  # a hybrid model's states are copied in some
    found, count = generate(tiny_model(family), params, monkeypatch, async_scheduling=True)
    assert found == wanted and count >= 8


@pytest.mark.parametrize(
    "asked",
    [
        {"logprobs": 0},
        {"min_tokens": 12, "stop_token_ids": [3]},
        {"repetition_penalty": 1.0001},
        {"logit_bias": {3: -100.0}},
        {"allowed_token_ids": list(range(99))},
        {"temperature": 0.7, "seed": 1, "typical_p": 0.9},
    ],
)
def test_others_are_not(tiny_model, monkeypatch, asked):
    """Nor are the steps in which a single row asks for more: all rows are sampled together."""
    path = tiny_model("llama")
    params = [GREEDY, {**GREEDY, **asked}, RANDOM[0]]
    found, count = generate(path, params, monkeypatch)
    wanted, _ = generate(path, params, monkeypatch, enforce_eager=True)
    assert found == wanted
    assert count == 0
