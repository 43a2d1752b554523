"""The whole engine on a GPU: graphs, planning ahead, little memory, many requests.

Bodies run here too, on the CPU with Triton's kernels interpreted, for one small model.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np
import pytest
import torch
from interpreter import multiply_bfloat16
from tiny_models import TINY

from nanovllm import LLM, SamplingParams
from nanovllm.attention import triton as triton_attention
from nanovllm.distributed.group import TPGroup
from nanovllm.engine.executors import base
from nanovllm.engine.runner.cuda_graph import DecodeGraphs
from nanovllm.engine.runner.model_runner import ModelRunner

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's
ON_GPU = {"device": "cuda", "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
INTERPRETED = {
    **ON_GPU,
    "device": "cpu",
    "kernels": "triton",
    "attention_backend": "triton",
    "dtype": "float32",
    "num_kvcache_blocks": 40,
}
CLOSE = 0.3  # between log probabilities in bfloat16 and those in float32, of logits about ten apart
PROMPTS = [[5, 9, 80, 23, 7, 11, 64] * 9, [100, 2], [7], [3, 4, 5, 6, 7, 8] * 3]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)


WHERE = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("interpreted", marks=pytest.mark.slow)]


@pytest.fixture(params=WHERE)
def options(request):
    if request.param == "cuda":
        return ON_GPU
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    return INTERPRETED


def generated(model, params=GREEDY, **options):
    with LLM(str(model), **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        return [output.outputs[0] for output in outputs], llm.engine.stats.preemptions


def agree(found, wanted, tolerance):
    """The same tokens, until one is chosen of two that are equally likely but for the tolerance."""
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b, here, there in zip(mine.token_ids, theirs.token_ids, mine.logprobs, theirs.logprobs, strict=True):
            assert abs(here[a].logprob - there[b].logprob) < tolerance
            if a != b:
                assert abs(there[b].logprob - sorted(x.logprob for x in there.values())[-2]) < tolerance
                break


@pytest.mark.parametrize(
    "change",
    [{"enforce_eager": True}, {"async_scheduling": False}, {"max_num_batched_tokens": 8}, {"num_kvcache_blocks": 8}],
    ids=str,
)
def test_ways_to_run_change_nothing(tiny_model, options, change):
    model = tiny_model("llama")
    plain, _ = generated(model, **options)
    other, preemptions = generated(model, **(options | change))
    agree(other, plain, 1e-3)
    assert (preemptions > 0) == ("num_kvcache_blocks" in change)


@pytest.mark.parametrize("family", TINY)
def test_every_family_in_bfloat16_against_the_reference_in_float32(tiny_model, options, monkeypatch, family):
    reference = {"device": "cpu", "kernels": "torch", "attention_backend": "reference", "dtype": "float32"}
    params = GREEDY
    if options is INTERPRETED:
        multiply_bfloat16(monkeypatch)
        monkeypatch.setattr(triton_attention, "_interpreter_reason", lambda dtype: None)
        params = dataclasses.replace(GREEDY, max_tokens=5)
    wanted, _ = generated(tiny_model(family), params, **(ON_GPU | reference), kvcache_memory="64MiB")
    found, _ = generated(tiny_model(family), params, **(options | {"dtype": "bfloat16"}))
    agree(found, wanted, CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "granite-hybrid", "mixtral"])
def test_steps_that_decode_are_graphs(tiny_model, family):
    with LLM(str(tiny_model(family)), **ON_GPU) as llm:
        runner = llm.engine._executor._runner
        assert isinstance(runner._graphs, DecodeGraphs)
        assert set(runner._graphs._kept) == {1, 2, 4, 8}
        llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
        assert isinstance(runner._graphs, DecodeGraphs)


@pytest.mark.gpu
def test_ranks_sum_by_nccl_within_graphs(tiny_model, monkeypatch):
    """All that one GPU can show of several: a group of one, whose sums and gathers are NCCL's."""
    import torch.distributed as dist

    from nanovllm.distributed.torch_group import NCCLCommunicator

    model = tiny_model("llama")
    plain, _ = generated(model, **ON_GPU)
    comm = NCCLCommunicator(dist.HashStore(), 0, 1, torch.device("cuda", 0), 60.0)
    try:
        x = torch.randn(5, 7, device="cuda")
        assert torch.equal(comm.all_reduce(x), x)
        assert torch.equal(comm.gather(x, 4, root=0), x[:, :4])
        monkeypatch.setattr(base, "ModelRunner", functools.partial(ModelRunner, tp=TPGroup(0, 1, comm)))
        summed, _ = generated(model, **ON_GPU)
        agree(summed, plain, 1e-3)
    finally:
        comm.close()


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_worker_process_has_the_next_step_waiting(tiny_model, penalty):
    """Penalties read tokens that no process's host knows yet."""
    params = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    plain, _ = generated(tiny_model("llama"), params, **ON_GPU, async_scheduling=False)
    found, _ = generated(tiny_model("llama"), params, **ON_GPU, executor="mp")
    agree(found, plain, 1e-3)


@pytest.mark.gpu
def test_two_engines_share_a_gpu(tiny_model):
    share = ON_GPU | {"gpu_memory_utilization": 0.2}
    with LLM(str(tiny_model("llama")), **share) as first, LLM(str(tiny_model("gpt2")), **share) as second:
        texts = [[o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] for llm in (first, second)]
        assert texts == [[o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] for llm in (first, second)]


@pytest.mark.parametrize(("device", "seconds"), [pytest.param("cuda", 90, marks=pytest.mark.gpu), ("cpu", 1)])
@pytest.mark.parametrize("family", ["qwen3", "granite-hybrid"])
def test_soak(tiny_model, family, device, seconds):
    """Three minutes of requests that come, are aborted and are preempted at random; nothing is lost or leaks."""
    random = np.random.default_rng(0)
    options = ON_GPU | {"max_num_seqs": 40, "max_num_batched_tokens": 256, "num_kvcache_blocks": 90}
    options |= {"device": device, "async_scheduling": True}
    with LLM(str(tiny_model(family)), **options) as llm:
        engine, unfinished, end = llm.engine, {}, time.monotonic() + seconds
        while time.monotonic() < end or unfinished:
            while time.monotonic() < end and len(unfinished) < 60:
                length, count = (int(n) for n in random.integers(1, 64, 2))
                kinds = [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}, {"logprobs": 3}]
                params = SamplingParams(max_tokens=count, ignore_eos=True, seed=length, **random.choice(kinds))
                request = engine.prepare(random.integers(1, 90, length).tolist(), params)
                engine.add(request)
                unfinished[request.request_id] = count
            if unfinished and random.random() < 0.02:
                request_id = random.choice(list(unfinished))
                engine.abort(str(request_id))
                del unfinished[request_id]
            for output in engine.step():
                if output.finished:
                    assert len(output.outputs[0].token_ids) == unfinished.pop(output.request_id)
        blocks = engine.scheduler.cache.blocks
        assert engine.stats.preemptions and blocks.num_free == blocks.num_usable
