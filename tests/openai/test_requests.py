"""From the bodies of requests to prompts and SamplingParams."""

from __future__ import annotations

import pytest
from helpers import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import RequestError
from nanovllm.openai.errors import APIError, api_error
from nanovllm.openai.fields import _NEUTRAL
from nanovllm.openai.requests import check_model, read_request
from nanovllm.sampling_params import SamplingParams

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    "{{ mood }}{% if add_generation_prompt %}>{% endif %}"
)
SAME = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "typical_p": 0.9,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "seed": 5,
    "stop": ["x", "yz"],
    "stop_token_ids": [7],
    "bad_words": ["no"],
    "min_tokens": 2,
    "max_tokens": 9,
    "ignore_eos": True,
    "prompt_logprobs": 2,
    "logit_bias": {"5": 1.5},
    "allowed_token_ids": [1, 2],
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}
"""Fields of both endpoints that SamplingParams knows under the same name."""


def chat(**fields):
    return {"messages": [{"role": "user", "content": "hi"}], **fields}


def completion(**fields):
    return {"prompt": "hi", **fields}


def refused(url: str, body: dict) -> APIError:
    with pytest.raises(APIError) as found:
        read_request(url, body)
    return found.value


@pytest.mark.parametrize(("url", "make"), [(CHAT, chat), (COMPLETION, completion)])
def test_every_sampling_parameter_arrives_and_null_is_as_good_as_none(url, make):
    assert read_request(url, make(**SAME)).params({}) == SamplingParams(**SAME)
    nothing = dict.fromkeys([*SAME, *_NEUTRAL, "model", "logprobs", "cache_salt"])
    assert read_request(url, make(**nothing)) == read_request(url, make())
    own_names = set(SAME) | {"logprobs", "detokenize"}  # detokenize: a response without text would be none
    assert own_names == set(SamplingParams.__slots__)


@pytest.mark.parametrize(
    ("url", "body", "expected"),
    [
        (CHAT, chat(), {"max_tokens": None}),
        (CHAT, chat(max_tokens=5), {"max_tokens": 5}),
        (CHAT, chat(max_tokens=5, max_completion_tokens=6), {"max_tokens": 6}),
        (CHAT, chat(logprobs=True), {"max_tokens": None, "logprobs": 0}),
        (CHAT, chat(logprobs=True, top_logprobs=4), {"max_tokens": None, "logprobs": 4}),
        (CHAT, chat(logprobs=False), {"max_tokens": None}),
        (COMPLETION, completion(), {"max_tokens": 16}),
        (COMPLETION, completion(max_tokens=None), {"max_tokens": 16}),
        (COMPLETION, completion(logprobs=0), {"max_tokens": 16, "logprobs": 0}),
    ],
)
def test_lengths_and_logprobs_by_endpoint(url, body, expected):
    assert read_request(url, body).params({}) == SamplingParams(**expected)


def test_what_is_given_goes_before_the_checkpoints_defaults():
    defaults = {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert read_request(CHAT, chat(top_k=-1)).params(defaults) == SamplingParams(temperature=0.6, max_tokens=99)
    assert read_request(COMPLETION, completion(max_tokens=3)).params(defaults).max_tokens == 3


@given(st.sampled_from([(CHAT, chat), (COMPLETION, completion)]), st.text(), st.none() | st.integers() | st.text())
def test_a_field_that_is_not_known_is_refused_by_name(endpoint, name, value):
    url, make = endpoint
    known = {*SAME, *_NEUTRAL, "model", "messages", "prompt", "cache_salt", "return_token_ids", "logprobs"}
    if name not in known:
        error = refused(url, {**make(), name: value})
        assert (error.param, error.code, error.status) == (name, "unknown_parameter", 400)


@pytest.mark.parametrize("name", [name for name, values in _NEUTRAL.items() if values is not None])
def test_a_field_that_asks_for_something_else_is_refused_and_neutral_ones_are_not(name):
    for value in _NEUTRAL[name]:
        assert read_request(COMPLETION, completion(**{name: value})) == read_request(COMPLETION, completion())
    error = refused(COMPLETION, completion(**{name: "something"}))
    assert (error.param, error.code) == (name, "unsupported_value")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "what") for name in SAME if name != "stop"],
        *[("n", 0), ("n", True), ("temperature", -1), ("top_p", 0), ("min_tokens", -1), ("max_tokens", 0)],
        *[("seed", 2**70), ("stop", [""]), ("stop", 3), ("logit_bias", {"a": 1}), ("ignore_eos", 1)],
        *[("prompt_logprobs", -2), ("allowed_token_ids", []), ("min_tokens", 10**6), ("logprobs", "many")],
    ],
)
def test_a_value_that_is_wrong_is_an_error_of_its_field(name, value):
    """SamplingParams' messages begin with the field's name, on which `api_error` relies."""
    body = completion(**{name: value})
    with pytest.raises(RequestError) as found:
        read_request(COMPLETION, body).params({})
    error = api_error(found.value, body)
    assert error.param == name
    assert error.as_object()["message"].startswith(name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"max_completion_tokens": 0}, "max_completion_tokens"), ({"logprobs": True, "top_logprobs": -2}, "top_logprobs")],
)
def test_errors_speak_of_the_names_that_were_used(fields, param):
    with pytest.raises(RequestError) as found:
        read_request(CHAT, chat(**fields)).params({})
    error = api_error(found.value, chat(**fields))
    assert error.param == param
    assert str(error).startswith(f"{param} must be")


def test_an_error_without_a_field_is_the_prompts():
    assert api_error(RequestError("the prompt has 9 tokens"), completion()).param == "prompt"
    assert api_error(RequestError("the prompt has 9 tokens"), chat()).param == "messages"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
        (chat(top_logprobs=2), "top_logprobs"),
        (chat(logprobs=2), "logprobs"),
        (chat(tools=[{"type": "function"}]), "tools"),
        (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
        (chat(cache_salt=""), "cache_salt"),
        (chat(model=3), "model"),
    ],
)
def test_chats_that_are_refused(body, param):
    assert refused(CHAT, body).param == param


@pytest.mark.parametrize("prompt", [None, "?", [], ["a", 1], [[1], "a"], {"a": 1}, 5])
def test_prompts_that_are_refused(prompt):
    if prompt == "?":
        assert refused(COMPLETION, {}).param == "prompt"
    else:
        assert refused(COMPLETION, {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_one_prompt_or_several(prompt, prompts):
    assert read_request(COMPLETION, {"prompt": prompt}).prompts(byte_tokenizer()) == prompts


def test_messages_go_through_the_chat_template():
    tokenizer = byte_tokenizer(TEMPLATE)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s", "refusal": None}, {"role": "user", "content": parts}]

    def rendered(template=None, **fields) -> str:
        (ids,) = read_request(CHAT, {"messages": messages, **fields}).prompts(tokenizer, template)
        return tokenizer.decode(ids)

    assert rendered() == "system=s;user=a\nb;>"
    assert rendered(add_generation_prompt=False, chat_template_kwargs={"mood": "!"}) == "system=s;user=a\nb;!"
    assert rendered(template="{{ messages | length }}") == "2"


def test_other_addresses_and_models():
    assert refused("/v1/embeddings", {}).status == 404
    request = read_request(CHAT, chat(model="a"))
    check_model(request, ["b", "a"])
    check_model(read_request(CHAT, chat()), ["b"])
    with pytest.raises(APIError, match="'a' does not exist here; there is 'b'") as found:
        check_model(request, ["b"])
    assert (found.value.status, found.value.param, found.value.code) == (404, "model", "model_not_found")
