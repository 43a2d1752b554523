"""Every family on several ranks gives what it gives on one."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from distributed.families import GREEDY, KERNELS, OPTIONS, PROMPTS, SCARCE, answers
from distributed.ranks import torchrun
from tiny_models import TINY, make_tiny_model

from nanovllm import LLM, ConfigError, RequestOutput, SamplingParams

# Largest difference of any logit in fp32, which are up to about 10: ranks add in another order.
TOLERANCE = 2e-5
# In bfloat16, of the logits' norm; of single ones it may be more, as other experts may be chosen.
BF16_TOLERANCE = 5e-2

# By ranks: the families, with sizes in the place of those that do not divide. Vocabularies of 131 and 128 do
# not divide by 3; key/value heads are fewer than the ranks in many.
CASES: dict[int, dict[str, dict]] = {
    2: {
        "llama": {},
        "ministral": {},
        "granite-hybrid-rope": {"num_key_value_heads": 2, "shared_intermediate_size": 54},
        "gpt-neox-sequential": {},
        "mpt-clipped": {},
        "falcon-7b": {},
    },
    3: {
        "tinyllama": {"intermediate_size": 102},
        "qwen2": {"intermediate_size": 102},
        "qwen2-window": {},
        "qwen3-window": {"intermediate_size": 102},
        "qwen3-moe": {"intermediate_size": 102},
        "qwen3-moe-window": {},
        "mistral-window": {"intermediate_size": 102},
        "mistral-nemo": {},
        "mixtral": {"intermediate_size": 45},
        "granite": {"intermediate_size": 102},
        "granitemoe": {"intermediate_size": 45},
        "granite-hybrid": {"shared_intermediate_size": 54},
        "granite-hybrid-moe": {"intermediate_size": 45, "shared_intermediate_size": 54},
        "gemma3": {"intermediate_size": 102},
        "gemma3-untied": {},
        "gpt2": {},
        "gpt2-scaled": {"n_inner": 72},
        "gpt-neox": {},
        "mpt": {},
        "falcon-rw-1b": {},
        "falcon-11b": {},
    },
    4: {
        "llama": {},
        "llama3": {},
        "qwen3": {},
        "granitemoe-shared": {"shared_intermediate_size": 52},
        "falcon-7b": {},
        "falcon-40b": {"ffn_hidden_size": 104},
    },
}


def test_no_family_is_forgotten():
    assert {family for cases in CASES.values() for family in cases} == set(TINY)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By ranks and family."""
    folder = tmp_path_factory.mktemp("families")
    return {
        (size, family): str(make_tiny_model(family, folder / f"{size} {family}", **sizes))
        for size, cases in CASES.items()
        for family, sizes in cases.items()
    }


@pytest.fixture(scope="module", params=CASES)
def found(request, models, tmp_path_factory):
    """What one rank answers for each family, and what each of several does."""
    size, folder = request.param, tmp_path_factory.mktemp("answers")
    paths = {family: models[size, family] for family in CASES[size]}
    (folder / "models.json").write_text(json.dumps(paths))
    torchrun(size, "-m", "distributed.families", str(folder / "models.json"), str(folder))
    ranks = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]
    return [answers(paths, "auto"), *ranks]


USUAL = ("llama", "granite-hybrid-rope", "falcon-7b")


@pytest.mark.parametrize(
    ("size", "family"),
    [
        pytest.param(size, family, marks=[] if size == 2 and family in USUAL else pytest.mark.slow)
        for size, cases in CASES.items()
        for family in cases
    ],
)
def test_workers_give_what_one_rank_gives(size, family, models):
    """The way of `LLM(..., tensor_parallel_size=N)`, with prompts cut, sequences preempted and prefixes found."""
    with LLM(models[size, family], **SCARCE) as llm:
        expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with LLM(models[size, family], **SCARCE, tensor_parallel_size=size) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.engine.stats.preemptions > 0
        again = llm.generate(PROMPTS[-1], GREEDY, use_tqdm=False)[0]
        grid = llm.engine.scheduler.cache.state_grid  # wide without native kernels
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in expected]
    assert np.abs(np.subtract(logprobs(outputs), logprobs(expected))).max() < TOLERANCE
    assert again["token_ids"] == outputs[-1]["token_ids"] and again.num_cached_tokens >= 32 // grid * grid


def generated(path: str, **options) -> list[RequestOutput]:
    with LLM(path, **SCARCE, **options) as llm:
        return llm.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(("family", "kernels"), [("mixtral", KERNELS[0]), ("granite-hybrid-moe", KERNELS[-1])])
def test_experts_on_one_rank_each(family, kernels, models):
    """Mixtures that are divided by their experts, which need not divide by their rows."""
    path = models[3, family]
    expected = generated(path, kernels=kernels)
    found = generated(path, kernels=kernels, tensor_parallel_size=3, enable_expert_parallel=True)
    assert [o["token_ids"] for o in found] == [o["token_ids"] for o in expected]
    assert np.abs(np.subtract(logprobs(found), logprobs(expected))).max() < TOLERANCE


def test_experts_that_are_not_there(models):
    with pytest.raises(ConfigError, match="no experts"):
        LLM(models[2, "llama"], **OPTIONS, enable_expert_parallel=True)


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    """Of the tokens that were chosen."""
    chosen = [zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True) for o in outputs]
    return [found[token].logprob for pairs in chosen for token, found in pairs]


def test_logits_are_those_of_one_rank(found):
    alone, *ranks = found
    for case, expected in alone.items():
        difference = np.abs(ranks[0][case]["logits"] - expected["logits"]).max()
        assert difference < TOLERANCE, case
        difference = np.linalg.norm(ranks[0][case]["bfloat16"] - expected["bfloat16"])
        assert difference < BF16_TOLERANCE * np.linalg.norm(expected["bfloat16"]), case


def test_text_is_that_of_one_rank(found):
    """In one batch, from cached prefixes, and with prompts cut and sequences preempted."""
    alone, *ranks = found
    for case, expected in alone.items():
        for way in ("text", "again", "scarce"):
            assert ranks[0][case][way] == expected["text"], (case, way)
        assert ranks[0][case]["preemptions"] > 0, case
        assert ranks[0][case]["recorded"] == (case[1] == "native"), case


def test_all_ranks_have_the_same_bits(found):
    _, *ranks = found
    for other in ranks[1:]:
        for case, mine in ranks[0].items():
            for key in ("hidden", "bfloat16 hidden"):
                assert np.array_equal(mine[key], other[case][key]), (case, key)
            assert mine["text"] == other[case]["text"]


def test_smollm2_on_three_ranks():
    """Nine query heads, three key/value heads and weights that mean something."""
    questions = ["What is the capital of France?", "Write a poem about the sea.", "Count from 1 to 20."]
    messages = [[{"role": "user", "content": question}] for question in questions]
    params, texts = SamplingParams(temperature=0, max_tokens=60), []
    for size in (1, 3):
        with LLM("smollm2-135m", dtype="float32", tensor_parallel_size=size) as llm:
            texts.append([output["text"] for output in llm.chat(messages, params, use_tqdm=False)])
    assert texts[0] == texts[1]
    assert "Paris" in texts[0][0]
