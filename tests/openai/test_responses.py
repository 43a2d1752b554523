"""From outputs to the bodies of responses."""

from __future__ import annotations

import json
import math

import pytest
from helpers import byte_tokenizer

from nanovllm.openai.requests import read_request
from nanovllm.openai.responses import response_body
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
A, B, HALF = ord("a"), ord("b"), 0xC3  # the last is half of a character
STEPS = [
    {A: Logprob(-2.0, 3, "a"), B: Logprob(-0.5, 1, "b"), HALF: Logprob(-1.0, 2, "\ufffd")},
    {HALF: Logprob(-0.1, 1, "\ufffd"), 0xC4: Logprob(-3.0, 2, "\ufffd"), B: Logprob(-math.inf, 3, "b")},
]


def output(*completions: CompletionOutput, **fields) -> RequestOutput:
    return RequestOutput("0", "hi", [1, 2, 3], list(completions), True, RequestMetrics(0.0), **fields)


def text(index: int = 0, **fields) -> CompletionOutput:
    return CompletionOutput(index, "a\ufffd", [A, HALF], finish_reason="length", **fields)


def respond(url: str, fields: dict, *outputs: RequestOutput) -> dict:
    body = response_body(read_request(url, fields), outputs, byte_tokenizer(), "m")
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    return body


def test_a_chat():
    body = respond(CHAT, MESSAGES, output(text(), CompletionOutput(1, "b", [B], finish_reason="stop", stop_reason="x")))
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1.7e9
    said = [{"role": "assistant", "content": content, "refusal": None} for content in ("a\ufffd", "b")]
    assert body == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": said[0], "logprobs": None, "finish_reason": "length", "stop_reason": None},
            {"index": 1, "message": said[1], "logprobs": None, "finish_reason": "stop", "stop_reason": "x"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }


def test_completions_of_several_prompts_are_numbered_through():
    body = respond(COMPLETION, {"prompt": ["a", "b"], "n": 2}, output(text(0), text(1)), output(text(0), text(1)))
    assert body.pop("id").startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][3] == {
        "index": 3,
        "text": "a\ufffd",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}


@pytest.mark.parametrize(("most", "likeliest"), [(0, []), (1, ["b"]), (2, ["b", "\ufffd"])])
def test_logprobs_of_a_chat(most, likeliest):
    """A token that is half a character has its own bytes, not those of U+FFFD."""
    fields = {**MESSAGES, "logprobs": True, "top_logprobs": most}
    first, second = respond(CHAT, fields, output(text(logprobs=STEPS)))["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in first.pop("top_logprobs")] == likeliest
    assert first == {"token": "a", "logprob": -2.0, "bytes": [A]}
    assert second["bytes"] == [HALF]


def test_logprobs_of_a_completion():
    body = respond(COMPLETION, {"prompt": "x", "logprobs": 2}, output(text(logprobs=STEPS)))
    assert body["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [-2.0, -0.1],
        "tokens": ["a", "\ufffd"],
        "top_logprobs": [{"b": -0.5, "\ufffd": -1.0, "a": -2.0}, {"\ufffd": -0.1, "b": -9999.0}],
    }


def test_what_vllm_adds_on_request():
    found = output(text(), prompt_logprobs=[None, {A: Logprob(-1.0, 1, "a")}])
    shown = [None, {str(A): {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}]
    asked = {"prompt_logprobs": 1, "return_token_ids": True}
    chat = respond(CHAT, {**MESSAGES, **asked}, found)
    (choice,) = respond(COMPLETION, {"prompt": "x", **asked}, found)["choices"]
    for holder in (chat, choice):
        assert holder["prompt_logprobs"] == shown
        assert holder["prompt_token_ids"] == [1, 2, 3]
    assert chat["choices"][0]["token_ids"] == choice["token_ids"] == [A, HALF]
