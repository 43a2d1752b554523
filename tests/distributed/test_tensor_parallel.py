"""Every family on several ranks gives what it gives on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed.ranks import Ranks, all_logits, engine_of_rank, greedy
from tiny_models import TINY, make_tiny_model

from nanovllm.distributed.group import TPGroup
from nanovllm.ops.library import Library, library_or_reason

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
KERNELS = ["native", "torch"] if isinstance(library_or_reason(), Library) else ["torch"]
PROMPTS = [np.random.default_rng(n).integers(2, 128, n).tolist() for n in (1, 9, 40)]
PROMPTS.append(PROMPTS[-1][:33] + PROMPTS[1])  # two pages in common
# prompts in pieces, and too few pages for all: some sequences begin anew
SCARCE = {"max_num_batched_tokens": 13, "max_num_seqs": 4, "num_kvcache_blocks": 5}


def test_no_family_is_forgotten():
    assert {family for cases in CASES.values() for family in cases} == set(TINY)


def run(group: TPGroup, path: str, kernels: str) -> dict:
    engine = engine_of_rank(group, path, kernels=kernels, kvcache_memory="8MiB")
    found = {"logits": all_logits(engine, PROMPTS[-1]), "text": greedy(engine, PROMPTS, 12)}
    found["again"] = greedy(engine, PROMPTS[::-1], 12)[::-1]
    found["recorded"] = engine._executor._runner._graphs is not None
    scarce = engine_of_rank(group, path, kernels=kernels, **SCARCE)
    found["scarce"], found["preemptions"] = greedy(scarce, PROMPTS, 12), scarce.stats.preemptions
    halves = engine_of_rank(group, path, kernels=kernels, dtype="bfloat16", kvcache_memory="8MiB")
    found["bfloat16"] = all_logits(halves, PROMPTS[-1])
    return found


def run_families(group: TPGroup, paths: dict[str, str]) -> dict:
    return {(f, kernels): run(group, path, kernels) for f, path in paths.items() for kernels in KERNELS}


@pytest.fixture(scope="module", params=CASES)
def found(request, tmp_path_factory):
    """What one rank found, and what each of several did."""
    directory = tmp_path_factory.mktemp("families")
    cases = CASES[request.param]
    paths = {f: str(make_tiny_model(f, directory / f, **sizes)) for f, sizes in cases.items()}
    ranks = Ranks(request.param, directory, run_families, paths)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = run_families(TPGroup(), paths)
    torch.set_num_threads(before)
    return alone, ranks.results()


def test_logits_are_those_of_one_rank(found):
    alone, ranks = found
    for case, expected in alone.items():
        difference = np.abs(ranks[0][case]["logits"] - expected["logits"]).max()
        assert difference < TOLERANCE, case
        difference = np.linalg.norm(ranks[0][case]["bfloat16"] - expected["bfloat16"])
        assert difference < BF16_TOLERANCE * np.linalg.norm(expected["bfloat16"]), case


def test_text_is_that_of_one_rank(found):
    """In one batch, from cached prefixes, and with prompts cut and sequences preempted."""
    alone, ranks = found
    for case, expected in alone.items():
        for way in ("text", "again", "scarce"):
            assert ranks[0][case][way] == expected["text"], (case, way)
        assert ranks[0][case]["preemptions"] > 0, case
        assert ranks[0][case]["recorded"] == (case[1] == "native"), case


def test_all_ranks_have_the_same_bits(found):
    _, ranks = found
    for other in ranks[1:]:
        for case, mine in ranks[0].items():
            for key in ("logits", "bfloat16"):
                assert np.array_equal(mine[key], other[case][key]), (case, key)
            assert mine["text"] == other[case]["text"]
