"""From tokens to what the user sees: text, stop strings, logprobs, metrics, lifetimes."""

import gc

import pytest
from helpers import EOS, byte_tokenizer, mock_engine, run_all

from nanovllm import EngineClosed, RequestError, SamplingParams


def generate(text, params, **options):
    """Let the mock write `text`, a byte a token."""
    engine, _ = mock_engine(script=[*text.encode(), EOS], **options)
    request = engine.prepare([1], params)
    engine.add(request)
    return run_all(engine)[request.request_id].outputs[0]


def test_text_is_that_of_the_tokens():
    output = generate("naïve 🦙!", SamplingParams(max_tokens=50))
    assert output.text == "naïve 🦙!"
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.token_ids[-1] == EOS


def test_pieces_never_split_a_character():
    engine, _ = mock_engine(script=[*"🦙é".encode(), EOS])
    engine.add(engine.prepare([1], SamplingParams(max_tokens=50)))
    texts = []
    while engine.has_unfinished:
        texts += [output["text"] for output in engine.step()]
    assert texts == ["", "", "", "🦙", "🦙", "🦙é", "🦙é"]


def test_a_cut_character_is_shown_as_replacement():
    assert generate("aé", SamplingParams(max_tokens=2)).text == "a\ufffd"


@pytest.mark.parametrize(("include", "text"), [(False, "one, "), (True, "one, STOP")])
def test_stop_string_over_several_tokens(include, text):
    params = SamplingParams(max_tokens=50, stop=["STOP", "never"], include_stop_str_in_output=include)
    output = generate("one, STOP two", params)
    assert output.text == text
    assert (output.finish_reason, output.stop_reason) == ("stop", "STOP")
    assert output.token_ids == list(b"one, STOP")


def test_held_back_text_is_released_at_the_end():
    output = generate("one, STO", SamplingParams(max_tokens=8, stop="STOP"))
    assert (output.text, output.finish_reason) == ("one, STO", "length")


def test_stop_string_with_the_last_allowed_token():
    output = generate("abc", SamplingParams(max_tokens=3, stop="c"))
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "c")


def test_stop_strings_wait_for_min_tokens():
    output = generate("x.y.z.", SamplingParams(max_tokens=20, stop=".", min_tokens=3))
    assert output.text == "x.y"


def test_stop_token_text_is_hidden_unless_asked_for():
    params = {"max_tokens": 9, "stop_token_ids": [ord("!")]}
    assert generate("hey!you", SamplingParams(**params)).text == "hey"
    assert generate("hey!you", SamplingParams(**params, include_stop_str_in_output=True)).text == "hey!"


def test_special_tokens_are_skipped_or_shown():
    engine, _ = mock_engine(script=[65, 256, 66], eos=())
    outputs = []
    for skip in (True, False):
        request = engine.prepare([1], SamplingParams(max_tokens=3, skip_special_tokens=skip))
        engine.add(request)
        outputs.append(run_all(engine)[request.request_id]["text"])
    assert outputs == ["AB", "A<s>B"]


def test_without_detokenising_there_is_no_text():
    output = generate("abc", SamplingParams(max_tokens=3, detokenize=False))
    assert (output.text, output.token_ids) == ("", [97, 98, 99])


def test_logprobs_and_their_sum():
    output = generate("ab", SamplingParams(max_tokens=2, logprobs=0))
    assert [list(d) for d in output.logprobs] == [[97], [98]]
    assert (output.logprobs[0][97].decoded_token, output.logprobs[0][97].rank) == ("a", 1)
    assert output.cumulative_logprob == pytest.approx(-0.5)
    assert generate("ab", SamplingParams(max_tokens=2)).logprobs is None


def test_metrics_are_in_order():
    engine, _ = mock_engine()
    request = engine.prepare([1, 2], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.add(request)
    m = run_all(engine)[request.request_id].metrics
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time < m.last_token_time <= m.finished_time
    assert m.time_to_first_token == m.first_token_time - m.arrival_time


def test_stats_count_computed_prompt_tokens_and_output():
    engine, _ = mock_engine(max_num_batched_tokens=16, max_num_seqs=2)
    for _ in range(2):
        engine.add(engine.prepare(list(range(40)), SamplingParams(max_tokens=5, ignore_eos=True)))
        run_all(engine)
    assert (engine.stats.prompt_tokens, engine.stats.generation_tokens) == (40 + 8, 10)


def test_tokens_do_not_set_the_garbage_collector_to_work():
    """A tuple each did, and now and then it looked at all that there is, for a fifth of a second."""
    engine, executor = mock_engine(num_blocks=2000, max_num_seqs=500, max_num_batched_tokens=4096)
    for _ in range(500):
        engine.add(engine.prepare([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True)))
    engine.step()
    result = executor.submit(engine.scheduler.schedule()).result()
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(200)
    try:
        before = gc.get_stats()[0]["collections"]
        outputs, _ = engine._outputs.process(engine.scheduler.update(result), 0.0)
        engine.scheduler.schedule()
        assert gc.get_stats()[0]["collections"] == before and len(outputs) == 500
    finally:
        gc.set_threshold(*thresholds)


def test_closed_engine_refuses_and_closes_its_executor():
    engine, executor = mock_engine()
    engine.close()
    engine.close()
    assert executor.closed
    with pytest.raises(EngineClosed):
        engine.add(engine.prepare([1], SamplingParams()))


def test_request_id_in_use():
    engine, _ = mock_engine()
    engine.add(engine.prepare([1], SamplingParams(), request_id="a"))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add(engine.prepare([1], SamplingParams(), request_id="a"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, 300], "outside the vocabulary of 258"),
        ([1, -1], "outside the vocabulary"),
        ([1, "x"], "integers"),
        (3.5, "a string, a list of token ids or a dict"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either"),
        ({"cache_salt": "a"}, "either"),
        ({"prompt": "a", "speed": 9}, "'speed'"),
        ([0] * 5000, "5000 tokens"),
    ],
)
def test_bad_prompts(prompt, message):
    engine, _ = mock_engine()
    with pytest.raises(RequestError, match=message):
        engine.prepare(prompt, SamplingParams())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {300: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [1, 258]}, "allowed_token_ids"),
        ({"stop_token_ids": [-5]}, "stop_token_ids"),
        ({"logprobs": 500}, "logprobs=500"),
    ],
)
def test_parameters_outside_the_vocabulary(params, message):
    engine, _ = mock_engine()
    with pytest.raises(RequestError, match=message):
        engine.prepare([1], SamplingParams(**params))


def test_without_a_tokenizer_text_options_are_refused():
    engine, _ = mock_engine()
    engine._preparer._tokenizer = None
    for prompt, params in (
        ("text", SamplingParams()),
        ([1], SamplingParams(stop="x")),
        ([1], SamplingParams(bad_words=["x"])),
    ):
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.prepare(prompt, params)


def test_bad_words_are_tokenised_with_and_without_a_space():
    engine, _ = mock_engine(tokenizer=byte_tokenizer())
    request = engine.prepare([1], SamplingParams(bad_words=["no"]))
    assert request.sequences[0].sample_row.bad_words == (tuple(b"no"), tuple(b" no"))


def test_an_oversized_request_does_not_harm_the_others():
    engine, _ = mock_engine()
    good = engine.prepare([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add(good)
    engine.step()
    with pytest.raises(RequestError):
        engine.prepare([1] * 5000, SamplingParams())
    assert len(run_all(engine)[good.request_id]["token_ids"]) == 3


def test_seeds_of_the_engine_and_of_requests():
    def draws(seed, params=None):
        engine, _ = mock_engine(seed=seed)
        return [engine.prepare([1], params or SamplingParams()).sequences[0].seed for _ in range(3)]

    assert draws(1) == draws(1) != draws(2)
    assert len(set(draws(1))) == 3
    assert draws(None) != draws(None)
    assert draws(1, SamplingParams(seed=5)) == [5, 5, 5]
