"""SamplingParams: defaults, normalisation, and errors that name the parameter."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nanovllm.errors import NanoVLLMError, RequestError
from nanovllm.sampling_params import SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "min_tokens": 0,
    "max_tokens": 16,
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}


@pytest.mark.parametrize(("name", "value"), VLLM_DEFAULTS.items())
def test_defaults_are_those_of_vllm(name, value):
    assert getattr(SamplingParams(), name) == value


def test_defaults_without_a_counterpart_are_off():
    params = SamplingParams()
    assert params.typical_p == 1.0
    assert len(params.stop) == len(params.stop_token_ids) == len(params.bad_words) == 0
    assert not params.greedy and not params.uses_penalties


def test_stop_may_be_a_string_a_list_or_none():
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=None).stop_strings == ()


def test_collections_are_copied():
    stop, ids, words, allowed, bias = ["a"], [1], ["b"], [2], {3: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, bad_words=words, allowed_token_ids=allowed, logit_bias=bias)
    for collection in (stop, ids, words, allowed, bias):
        collection.clear()
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("a",), (1,), ("b",))
    assert (params.allowed_token_ids, params.logit_bias) == ((2,), {3: 1.0})


def test_top_k_of_minus_one_is_zero():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(top_k=-1) == SamplingParams()


def test_logit_bias_takes_the_keys_of_the_openai_api_and_is_clamped():
    bias = SamplingParams(logit_bias={"5": 1, 7: 250.5, "9": -1e9, 11: math.inf, 12: "2.5"}).logit_bias
    assert bias == {5: 1.0, 7: 100.0, 9: -100.0, 11: 100.0, 12: 2.5}
    assert all(type(key) is int and type(value) is float for key, value in bias.items())


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-6, 9.9e-6])
def test_tiny_temperatures_are_greedy(temperature):
    assert SamplingParams(temperature=temperature).greedy


@pytest.mark.parametrize("temperature", [1e-5, 0.1, 2])
def test_other_temperatures_are_not_greedy(temperature):
    assert not SamplingParams(temperature=temperature).greedy


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_uses_penalties(name):
    assert SamplingParams(**{name: 0.5}).uses_penalties


NAN, INF = math.nan, math.inf
REFUSED = {
    "n": [0, -1, 1.0, "1", True, None],
    "temperature": [-0.1, -INF, NAN, INF, "1", None, True],
    "top_k": [-2, 1.5, "5", True, None],
    "top_p": [0.0, -0.1, 1.1, NAN, INF, "1", None, False],
    "min_p": [-0.1, 1.1, NAN, "0", None],
    "typical_p": [0.0, -1, 1.1, NAN, None],
    "repetition_penalty": [0.0, -1.0, NAN, INF, "1", None],
    "presence_penalty": [-2.1, 2.1, NAN, INF, None],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF, None],
    "seed": [1.5, "1", True, -(2**63) - 1, 2**64],
    "stop": [[1], [""], [None], "", 5, [["a"]], b"a"],
    "stop_token_ids": [["a"], "1", [1.0], [True], 5],
    "min_tokens": [-1, 1.0, None, 17],
    "max_tokens": [0, -1, 1.5, "16", True],
    "logprobs": [-2, 1.5, "1", True],
    "prompt_logprobs": [-2, 1.5, "1", False],
    "logit_bias": [{"a": 1}, {1: "b"}, {1: NAN}, {None: 1}, {1: None}, [1, 2], 5, {INF: 1}, {1.5: 1}],
    "allowed_token_ids": [[], ["a"], "12", [1.0], [None], 5],
    "bad_words": [[""], ["  "], [5], "word", 5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_bad_values_are_request_errors_that_name_the_parameter(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


ACCEPTED = {
    "n": [1, 100],
    "temperature": [0, 100.0, 1],
    "top_k": [0, 1, 10**9],
    "top_p": [1e-9, 1, 1.0],
    "min_p": [0, 1],
    "typical_p": [1e-9, 1],
    "repetition_penalty": [0.01, 2, 50],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2.0, 2.0],
    "seed": [0, -1, -(2**63), 2**64 - 1, None],
    "min_tokens": [0, 16],
    "max_tokens": [1, None],
    "logprobs": [-1, 0, 20],
    "prompt_logprobs": [-1, 0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_the_ends_of_the_ranges_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_min_tokens_above_max_tokens_names_both():
    with pytest.raises(RequestError, match=r"min_tokens=9.*max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    SamplingParams(min_tokens=9, max_tokens=None)


def test_stop_strings_need_text():
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)
    SamplingParams(stop_token_ids=[1], detokenize=False)


def test_a_request_error_is_ours_and_a_value_error():
    assert issubclass(RequestError, NanoVLLMError) and issubclass(RequestError, ValueError)


def test_frozen_and_without_room_for_typos():
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5
    with pytest.raises((AttributeError, TypeError)):
        params.temprature = 0.5
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


def test_replace_keeps_normalised_values():
    params = SamplingParams(stop="a", top_k=-1, logit_bias={"1": 500}, allowed_token_ids=[1])
    assert dataclasses.replace(params) == params
    assert dataclasses.replace(params, n=3).logit_bias == {1: 100.0}
