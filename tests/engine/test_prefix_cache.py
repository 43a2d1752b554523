"""Prefix caching, siblings, state slots; the bugs that users of small engines report most."""

import pickle

import pytest
from helpers import mock_engine, naive_generate, run_all

from nanovllm import SamplingParams

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True, seed=0)
PROMPT = list(range(40))


def generate(engine, prompt, params=GREEDY):
    request = engine.prepare(prompt, params)
    engine.add(request)
    return run_all(engine)[request.request_id]


def test_second_request_is_served_from_the_cache_and_counts_it():
    engine, executor = mock_engine()
    assert generate(engine, PROMPT).num_cached_tokens == 0
    executor.plans.clear()
    output = generate(engine, [*PROMPT[:32], 99, 98])
    assert output.num_cached_tokens == 32
    assert executor.plans[0].sequences[0].start == 32
    assert output["token_ids"] == naive_generate([*PROMPT[:32], 99, 98], 4, eos=None)


def test_full_hit_still_computes_one_token():
    """nano-vllm #144, #199: a prompt that is cached to its last token left nothing to compute."""
    engine, executor = mock_engine()
    generate(engine, PROMPT)
    executor.plans.clear()
    output = generate(engine, PROMPT)  # 40 = 5 pages of 8
    assert executor.plans[0].sequences[0].start == 32
    assert output.num_cached_tokens == 32
    assert output["token_ids"] == naive_generate(PROMPT, 4, eos=None)


def test_generated_tokens_are_cached_too():
    engine, _ = mock_engine()
    first = generate(engine, PROMPT, SamplingParams(max_tokens=20, ignore_eos=True, seed=0))
    conversation = PROMPT + first["token_ids"]
    assert generate(engine, [*conversation, 1]).num_cached_tokens == 56  # 59 computed tokens, 7 whole pages


def test_prefix_hit_after_preemption():
    """nano-vllm #207, #210, #211, #233: a preempted sequence that found its own pages again used
    counters from before the preemption."""
    engine, executor = mock_engine(num_blocks=9, max_num_seqs=4, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=0)
    prompts = [[i] * 10 for i in range(4)]
    requests = [engine.prepare(p, params) for p in prompts]
    for request in requests:
        engine.add(request)
    finished = run_all(engine)
    resumed = [s for plan in executor.plans for s in plan.sequences if s.start > 0 and s.num_tokens > 1]
    assert engine.stats.preemptions > 0
    assert resumed, "no preempted sequence was resumed from cached pages"
    for prompt, request in zip(prompts, requests, strict=True):
        assert finished[request.request_id]["token_ids"] == naive_generate(prompt, 24, eos=None)


def test_cached_count_is_that_of_the_first_admission():
    """nano-vllm #110: re-admission after preemption must not be booked as a prompt cache hit."""
    engine, _ = mock_engine(num_blocks=9, max_num_seqs=4, max_num_batched_tokens=16)
    requests = [engine.prepare([i] * 10, SamplingParams(max_tokens=24, ignore_eos=True)) for i in range(4)]
    for request in requests:
        engine.add(request)
    outputs = run_all(engine).values()
    assert any(o.metrics.num_preemptions for o in outputs)
    assert all(o.num_cached_tokens == 0 for o in outputs)


def test_chunks_continue_where_the_last_one_ended():
    """nano-vllm #209, #213, #217: lengths of a chunk beyond what is computed."""
    engine, executor = mock_engine(max_num_batched_tokens=16, max_num_seqs=4)
    output = generate(engine, PROMPT)
    chunks = [(s.start, s.num_tokens, s.sample is not None) for p in executor.plans for s in p.sequences]
    assert chunks[:3] == [(0, 16, False), (16, 16, False), (32, 8, True)]
    assert output["token_ids"] == naive_generate(PROMPT, 4, eos=None)


def test_plans_survive_pickling():
    """nano-vllm #103: token ids were lost on their way to another process."""
    engine, executor = mock_engine()
    generate(engine, PROMPT)
    for plan in executor.plans:
        copy = pickle.loads(pickle.dumps(plan))
        for a, b in zip(plan.sequences, copy.sequences, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert (a.start, a.block_table.tolist()) == (b.start, b.block_table.tolist())


def test_same_step_requests_share_pages():
    engine, executor = mock_engine(max_num_batched_tokens=256, max_num_seqs=8)
    requests = [engine.prepare([*PROMPT, i], GREEDY) for i in range(4)]
    for request in requests:
        engine.add(request)
    finished = run_all(engine)
    assert [s.start for s in executor.plans[0].sequences] == [0, 40, 40, 40]
    for i, request in enumerate(requests):
        assert finished[request.request_id]["token_ids"] == naive_generate([*PROMPT, i], 4, eos=None)


def test_salts_separate_tenants():
    engine, _ = mock_engine()

    def cached(salt):
        prompt = {"prompt_token_ids": PROMPT} | ({} if salt is None else {"cache_salt": salt})
        return generate(engine, prompt).num_cached_tokens

    assert [cached(s) for s in (None, "a", "b", "", "a", None, "")] == [0, 0, 0, 0, 32, 32, 32]


def test_caching_off():
    engine, _ = mock_engine(enable_prefix_caching=False)
    assert [generate(engine, PROMPT).num_cached_tokens for _ in range(2)] == [0, 0]


def test_reset():
    engine, _ = mock_engine()
    generate(engine, PROMPT)
    engine.scheduler.cache.reset_prefix_cache()
    assert generate(engine, PROMPT).num_cached_tokens == 0


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_the_prompts_pages(caching):
    engine, executor = mock_engine(enable_prefix_caching=caching)
    output = generate(engine, PROMPT, SamplingParams(n=3, max_tokens=5, ignore_eos=True, seed=11))
    prompt_work = sum(max(0, len(PROMPT) - s.start) for p in executor.plans for s in p.sequences)
    assert prompt_work == 40 + 2 * 8  # the siblings compute the last page alone
    tables = [s.block_table for s in executor.plans[1].sequences]
    assert len({tuple(t[:4]) for t in tables}) == 1
    for i, completion in enumerate(output.outputs):
        assert completion.index == i
        assert completion.token_ids == naive_generate(PROMPT, 5, seed=11 + i, eos=None)


def test_siblings_of_different_requests_do_not_meet_when_caching_is_off():
    engine, _ = mock_engine(enable_prefix_caching=False)
    params = SamplingParams(n=2, max_tokens=2)
    generate(engine, PROMPT, params)
    assert generate(engine, PROMPT, params).num_cached_tokens == 0


def test_prompt_logprobs_compute_the_whole_prompt():
    engine, executor = mock_engine(max_num_batched_tokens=16, max_num_seqs=4)
    generate(engine, PROMPT)
    executor.plans.clear()
    output = generate(engine, PROMPT, SamplingParams(max_tokens=2, prompt_logprobs=1, n=2))
    assert executor.plans[0].sequences[0].start == 0
    assert output.prompt_logprobs[0] is None
    assert [next(iter(d)) for d in output.prompt_logprobs[1:]] == PROMPT[1:]


def test_an_interrupted_step_leaves_no_trust_in_its_pages():
    """Ctrl-C in the middle of a step: the pages it was filling must not be found by later prompts."""
    engine, executor = mock_engine()
    request = engine.prepare(PROMPT, GREEDY)
    engine.add(request)
    executor.fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.scheduler.check_invariants()
    assert run_all(engine)[request.request_id]["token_ids"] == naive_generate(PROMPT, 4, eos=None)


def test_state_slots_belong_to_running_sequences():
    engine, executor = mock_engine(num_slots=3, max_num_seqs=2)
    requests = [engine.prepare([i] * 10, GREEDY) for i in range(5)]
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
        engine.scheduler.check_invariants()
        slots = [s.state_slot for s in executor.plans[-1].sequences]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= {1, 2}


def starts(executor):
    return [(s.start, s.num_tokens) for plan in executor.plans for s in plan.sequences if s.num_tokens > 1]


def test_recurrent_models_resume_from_a_snapshot_at_the_prompts_end():
    engine, executor = mock_engine(num_slots=3, max_num_seqs=2)
    assert generate(engine, PROMPT[:30]).num_cached_tokens == 0
    assert starts(executor) == [(0, 24), (24, 6)]  # it pauses where the state is captured
    executor.plans.clear()
    output = generate(engine, [*PROMPT[:30], 98, 99])
    assert output.num_cached_tokens == 24
    assert starts(executor) == [(24, 8)]
    assert output["token_ids"] == naive_generate([*PROMPT[:30], 98, 99], 4, eos=None)


def test_a_snapshot_is_taken_where_prompts_part():
    """Two prompts share 16 tokens: the second one computes them again and captures their state,
    the third one has it."""
    engine, executor = mock_engine(num_slots=9, max_num_seqs=2)
    shared = PROMPT[:19]
    cached = [generate(engine, shared + [100 + i] * 20).num_cached_tokens for i in range(3)]
    assert cached == [0, 0, 16]
    rest = [(16, 8), (24, 8), (32, 7)]
    assert starts(executor) == [(0, 24), *rest[1:], (0, 16), *rest, *rest]


def test_long_prompts_are_captured_at_intervals():
    engine, executor = mock_engine(num_slots=9, max_num_seqs=2)  # the mock's interval is 24
    generate(engine, [*range(100)])
    assert starts(executor) == [(0, 24), (24, 24), (48, 24), (72, 24), (96, 4)]
    assert generate(engine, [*range(80)]).num_cached_tokens == 72


def test_running_sequences_take_slots_from_snapshots():
    engine, executor = mock_engine(num_slots=3, max_num_seqs=2)
    for i in range(4):
        generate(engine, [i] * 30)
    requests = [engine.prepare([i] * 30, GREEDY) for i in (7, 3)]
    for request in requests:
        engine.add(request)
    finished = run_all(engine)
    assert [finished[r.request_id].num_cached_tokens for r in requests] == [0, 0]
    assert max(len(plan.sequences) for plan in executor.plans) == 2


def test_prompts_are_cut_on_the_grid_while_others_decode():
    """A chunk that ended off the grid would change the sums of all that follow it."""
    engine, executor = mock_engine(num_slots=9, max_num_seqs=4, max_num_batched_tokens=13)
    engine.add(engine.prepare([1, 2], SamplingParams(max_tokens=40, ignore_eos=True)))
    engine.add(engine.prepare([*range(50)], GREEDY))
    run_all(engine)
    assert all(start % 8 == 0 and (count % 8 == 0 or start == 48) for start, count in starts(executor)[1:])


def test_without_a_chunk_grid_prompts_take_the_whole_budget():
    engine, executor = mock_engine(num_slots=9, max_num_seqs=4, max_num_batched_tokens=13, chunk_grid=1)
    output = generate(engine, [*range(50)])
    assert starts(executor) == [(0, 13), (13, 11), (24, 13), (37, 11), (48, 2)]  # and pauses at 24 and 48
    assert output["token_ids"] == naive_generate([*range(50)], 4, eos=None)
    assert generate(engine, [*range(50)]).num_cached_tokens == 48


@pytest.mark.parametrize("reset", ["reset", "salt", "off"])
def test_snapshots_are_not_found_where_pages_are_not(reset):
    engine, _ = mock_engine(num_slots=9, max_num_seqs=4, enable_prefix_caching=reset != "off")
    generate(engine, PROMPT)
    if reset == "reset":
        engine.scheduler.cache.reset_prefix_cache()
    prompt = {"prompt_token_ids": PROMPT} | ({"cache_salt": "b"} if reset == "salt" else {})
    assert generate(engine, prompt).num_cached_tokens == 0


def test_siblings_of_a_recurrent_model_share_the_prompts_state():
    engine, executor = mock_engine(num_slots=9, max_num_seqs=4, enable_prefix_caching=False)
    output = generate(engine, PROMPT, SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=0))
    assert starts(executor) == [(0, 24), (24, 8), (32, 8), (32, 8), (32, 8)]
    for i, completion in enumerate(output.outputs):
        assert completion.token_ids == naive_generate(PROMPT, 4, seed=i, eos=None)


def test_pages_behind_the_window_are_given_back():
    engine, executor = mock_engine(window=10, num_blocks=20, max_num_batched_tokens=32, max_num_seqs=1)
    assert engine.config.max_model_len == 4096  # more than the 152 tokens of the pool
    prompt = [i % 200 for i in range(500)]
    output = generate(engine, prompt, SamplingParams(max_tokens=30, ignore_eos=True, seed=0))
    assert output["token_ids"] == naive_generate(prompt, 30, eos=None)
    held = [sum(block != 0 for block in s.block_table) for plan in executor.plans[-20:] for s in plan.sequences]
    assert max(held) <= 3


def test_a_windowed_prefix_needs_the_pages_of_its_window_alone():
    engine, executor = mock_engine(window=10, num_blocks=12, max_num_batched_tokens=24, max_num_seqs=1)
    prompt = [*range(200)]
    generate(engine, prompt)
    executor.plans.clear()
    output = generate(engine, prompt, SamplingParams(max_tokens=1, seed=0))
    assert output.num_cached_tokens == 192
    (only,) = executor.plans[0].sequences
    assert [block == 0 for block in only.block_table] == [True] * 22 + [False] * 3
    assert output["token_ids"] == naive_generate(prompt, 1, eos=None)
