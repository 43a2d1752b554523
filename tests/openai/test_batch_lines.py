"""Lines of batch files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.openai.batch_lines import answer_line, error_line, read_line
from nanovllm.openai.errors import APIError

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def test_a_line_is_read():
    line = read_line(json.dumps(LINE).encode())
    assert (line.custom_id, line.request().prompts(None)) == ("a", ["x"])


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff{}", b"[" * 10**5, b"{}", b'{"custom_id": 3}'])
def test_a_line_without_a_custom_id_is_refused(text):
    with pytest.raises(APIError):
        read_line(text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": "GET"}, "method"),
        ({"url": None}, "url"),
        ({"url": "/v1/models"}, "url"),
        ({"body": []}, "body"),
        ({"extra": 1}, "extra"),
        ({"body": {"prompt": 1}}, "prompt"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields, param):
    with pytest.raises(APIError) as found:
        read_line(json.dumps(LINE | fields).encode()).request()
    assert found.value.param == param


@given(st.text(st.characters(codec=None), min_size=1), st.text())
def test_any_custom_id_comes_back_in_one_line(custom_id, message):
    """Half of a surrogate pair can come in as \\ud800, and UTF-8 cannot hold it."""
    for line in (answer_line(custom_id, {"text": message}), error_line(custom_id, APIError(message, custom_id))):
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert json.loads(line)["custom_id"] == custom_id


def test_answers_and_errors_have_openais_shape():
    answer = json.loads(answer_line("a", {"object": "text_completion"}))
    assert answer.pop("id").startswith("batch_req_")
    assert answer["response"].pop("request_id").startswith("req_")
    assert answer == {
        "custom_id": "a",
        "response": {"status_code": 200, "body": {"object": "text_completion"}},
        "error": None,
    }
    refused = json.loads(error_line(None, APIError("no", "n", code="c")))
    error = {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}
    assert (refused["custom_id"], refused["error"]) == (None, error)
    assert (refused["response"]["status_code"], refused["response"]["body"]) == (400, {"error": error})
