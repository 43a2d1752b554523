"""Lines of OpenAI's batch files."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from nanovllm.openai.errors import APIError
from nanovllm.openai.requests import ChatRequest, CompletionRequest, read_request

_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """An object with a custom_id; the rest of it is checked by `request`."""

    custom_id: str
    values: dict[str, Any]

    def request(self) -> ChatRequest | CompletionRequest:
        """APIError for a field that is wrong, not known or not supported."""
        for name in self.values:
            if name not in _FIELDS:
                raise APIError(f"{name} is not a field of a batch file's line", name, code="unknown_parameter")
        method, url, body = (self.values.get(name) for name in _FIELDS[1:])
        if method != "POST":
            raise APIError(f"method must be 'POST', got {method!r}", "method")
        if not isinstance(url, str):
            raise APIError("url must be a string such as '/v1/chat/completions'", "url")
        if not isinstance(body, dict):
            raise APIError("body must be an object", "body")
        return read_request(url, body)


def read_line(text: bytes) -> BatchLine:
    """APIError if this is no object with a custom_id."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise APIError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise APIError("not a JSON object")
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise APIError("custom_id must be a non-empty string", "custom_id")
    return BatchLine(custom_id, values)


def answer_line(custom_id: str, body: dict[str, Any]) -> bytes:
    """body: of a response."""
    return _result(custom_id, 200, body, None)


def error_line(custom_id: str | None, error: APIError) -> bytes:
    """The error is where OpenAI's clients look for it (the response's body) and where vLLM's do (error)."""
    found = error.as_object()
    return _result(custom_id, error.status, {"error": found}, found)


def _result(custom_id: str | None, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    values = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body},
        "error": error,
    }
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which came in escaped
        return json.dumps(values).encode() + b"\n"
