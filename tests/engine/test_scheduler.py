"""Who runs, how many tokens each: budgets, chunks, order, preemption."""

import pytest
from helpers import EOS, mock_engine, naive_generate, run_all

from nanovllm import RequestError, SamplingParams

LONG = SamplingParams(max_tokens=20, ignore_eos=True, seed=0)


def add(engine, prompt, params=LONG, **options):
    request = engine.prepare(prompt, params, **options)
    engine.add(request)
    return request


def sizes(plan):
    return [s.num_tokens for s in plan.sequences]


def test_decodes_and_prompt_chunks_share_one_step():
    engine, executor = mock_engine(max_num_batched_tokens=32, max_num_seqs=8)
    add(engine, [1, 2, 3])
    engine.step()
    add(engine, [4] * 50)
    add(engine, [5] * 50)
    engine.step()
    assert sizes(executor.plans[-1]) == [1, 31]
    engine.step()
    assert sizes(executor.plans[-1]) == [1, 19, 12]  # two prompts chunked in one step
    engine.scheduler.check_invariants()


def test_budget_and_number_of_sequences_are_kept():
    engine, executor = mock_engine(max_num_batched_tokens=16, max_num_seqs=3)
    for i in range(10):
        add(engine, [i] * 9, SamplingParams(max_tokens=5, ignore_eos=True))
    run_all(engine)
    assert max(sum(sizes(p)) for p in executor.plans) <= 16
    assert max(len(p.sequences) for p in executor.plans) == 3


def test_a_long_prompt_does_not_stop_decodes_behind_it():
    """A prompt that is older than a decoding sequence (it was preempted, say) must leave it a token."""
    engine, executor = mock_engine(max_num_batched_tokens=8, max_num_seqs=4, scheduling_policy="priority")
    add(engine, [1, 2], priority=5)
    engine.step()
    add(engine, [3] * 40, priority=0)
    for _ in range(5):
        engine.step()
        assert len(executor.plans[-1].sequences) == 2
        assert sum(sizes(executor.plans[-1])) == 8


def test_first_come_first_served_even_if_a_later_one_would_fit():
    engine, executor = mock_engine(num_blocks=9, max_num_batched_tokens=256, max_num_seqs=4)
    add(engine, [1] * 40)
    engine.step()
    big, small = add(engine, [2] * 30), add(engine, [3] * 2)
    engine.step()
    ids = {s.seq_id for s in executor.plans[-1].sequences}
    assert not ids & {big.sequences[0].seq_id, small.sequences[0].seq_id}


def test_priority_orders_admission_and_preemption():
    engine, executor = mock_engine(max_num_seqs=1, scheduling_policy="priority")
    low, high = add(engine, [1, 2], priority=9), add(engine, [3, 4], priority=-1)
    engine.step()
    assert executor.plans[-1].sequences[0].seq_id == high.sequences[0].seq_id
    run_all(engine)
    assert low.sequences[0].finished


def test_fcfs_ignores_priority():
    engine, executor = mock_engine(max_num_seqs=1)
    first = add(engine, [1, 2], priority=9)
    add(engine, [3, 4], priority=-1)
    engine.step()
    assert executor.plans[-1].sequences[0].seq_id == first.sequences[0].seq_id


def test_preemption_takes_the_newest_and_repeats_its_tokens():
    engine, _ = mock_engine(num_blocks=8, max_num_seqs=4)
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
    requests = [add(engine, [i, i + 1], params) for i in range(3)]
    finished = run_all(engine)
    assert engine.stats.preemptions > 0
    assert requests[0].sequences[0].num_preemptions == 0
    for i, request in enumerate(requests):
        assert finished[request.request_id]["token_ids"] == naive_generate([i, i + 1], 30, eos=None)
    assert finished[requests[2].request_id].metrics.num_preemptions > 0


def test_a_victim_is_not_readmitted_in_the_step_that_evicts_it():
    engine, executor = mock_engine(num_blocks=6, max_num_seqs=4)
    for i in range(2):
        add(engine, [i] * 14, LONG)
    while engine.has_unfinished:
        before = engine.scheduler.num_preemptions
        engine.step()
        if engine.scheduler.num_preemptions > before:
            assert len(executor.plans[-1].sequences) == 1
            return
    raise AssertionError("nothing was preempted")


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17])
def test_pages_at_block_boundaries(length):
    """Off-by-one in when a page is added at a boundary (nano-vllm's can_append / may_append reports)."""
    engine, executor = mock_engine(num_blocks=4)
    request = add(engine, list(range(length)), SamplingParams(max_tokens=24 - length, ignore_eos=True, seed=0))
    output = run_all(engine)[request.request_id]
    assert output["token_ids"] == naive_generate(list(range(length)), 24 - length, eos=None)
    assert all(len(p.sequences[0].block_table) <= 3 for p in executor.plans)


def test_abort_while_waiting_running_and_after_the_end():
    engine, _ = mock_engine(max_num_seqs=1)
    running, waiting = add(engine, [1, 2]), add(engine, [3, 4])
    engine.step()
    for request in (waiting, running):
        output = engine.abort(request.request_id)
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
        engine.scheduler.check_invariants()
    assert not engine.has_unfinished
    assert engine.abort(running.request_id) is None
    assert engine.scheduler.cache.blocks.num_free == engine.scheduler.cache.blocks.num_usable


def test_stops_at_max_model_len_with_reason_length():
    engine, _ = mock_engine(max_model_len=20)
    request = add(engine, [1] * 12, SamplingParams(max_tokens=None, ignore_eos=True))
    output = run_all(engine)[request.request_id].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (8, "length")


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers():
    engine, _ = mock_engine(num_blocks=4)  # 24 tokens
    with pytest.raises(RequestError, match=r"24 tokens, and max_model_len=24"):
        engine.prepare([1] * 24, LONG)
    assert engine.prepare([1] * 23, LONG).sequences


def test_eos_and_stop_tokens():
    script = [5, 6, EOS, 7]
    engine, _ = mock_engine(script=script)
    plain = add(engine, [1])
    ended = add(engine, [1], SamplingParams(max_tokens=4))
    stopped = add(engine, [1], SamplingParams(max_tokens=4, stop_token_ids=[6]))
    ignoring = add(engine, [1], SamplingParams(max_tokens=4, ignore_eos=True))
    out = {}
    for _ in range(4):
        out.update({o.request_id: o.outputs[0] for o in engine.step() if o.finished})
    engine.abort(plain.request_id)
    assert (out[ended.request_id].token_ids, out[ended.request_id].stop_reason) == ([5, 6, EOS], None)
    assert out[ended.request_id].finish_reason == "stop"
    assert (out[stopped.request_id].token_ids, out[stopped.request_id].stop_reason) == ([5, 6], 6)
    assert (out[ignoring.request_id].token_ids, out[ignoring.request_id].finish_reason) == (script, "length")


def test_ahead_a_step_is_planned_before_the_last_one_is_done():
    engine, executor = mock_engine(async_scheduling=True)
    request = add(engine, [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True, seed=0))
    assert engine.step() == []
    assert len(executor.plans) == 1
    texts = [list(engine.step()[0].outputs[0].token_ids) for _ in range(3)]
    assert texts[-1] == naive_generate([1, 2, 3], 3, eos=None)
    assert [len(t) for t in texts] == [1, 2, 3]
    assert len(executor.plans) == 3, "its limit is known before: nothing is computed in vain"
    assert request.sequences[0].num_tokens == 6
    assert not engine.has_unfinished


@pytest.mark.parametrize("how", ["token", "string"])
def test_ahead_what_a_sequence_gets_after_its_end_is_dropped(how):
    script = [ord("a"), ord("b"), EOS if how == "token" else ord("c"), 7, 8]
    engine, executor = mock_engine(script=script, async_scheduling=True)
    params = SamplingParams(max_tokens=5, stop=None if how == "token" else ["c"])
    request = add(engine, [1], params)
    output = run_all(engine)[request.request_id].outputs[0]
    assert output.token_ids == script[:3]
    assert (output.text, output.finish_reason) == ("ab", "stop")
    assert len(executor.plans) == 4, "one step too many"
    assert engine.stats.generation_tokens == 3
    second = add(engine, [1], params)  # the step too many is still on its way
    assert run_all(engine)[second.request_id].outputs[0].token_ids == script[:3]
    assert engine.scheduler.cache.blocks.num_free == engine.scheduler.cache.blocks.num_usable


@pytest.mark.parametrize("ahead", [False, True])
def test_output_is_found_as_a_prefix(ahead):
    """Ahead, a page is computed before its last token is known."""
    engine, _ = mock_engine(async_scheduling=ahead)
    first = add(engine, [1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True, seed=0))
    tokens = [1, 2, 3, *run_all(engine)[first.request_id].outputs[0].token_ids]
    second = add(engine, tokens, LONG)
    assert run_all(engine)[second.request_id].num_cached_tokens == 32


def test_ahead_nobody_waits_for_a_step_that_broke_off():
    engine, executor = mock_engine(async_scheduling=True, num_blocks=12, max_num_seqs=3)
    requests = [add(engine, [i] * 20) for i in range(3)]
    for _ in range(4):
        engine.step()
    executor.fail_next = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    engine.scheduler.check_invariants()
    assert not any(seq.num_pending for request in requests for seq in request.sequences)
    finished = run_all(engine)
    for i, request in enumerate(requests):
        assert finished[request.request_id].outputs[0].token_ids == naive_generate([i] * 20, 20, eos=None)
