"""Lines of OpenAI's batch files."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from nanovllm.openai.errors import APIError

_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of a batch file; body is not looked at."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_custom_id(line: bytes, number: int) -> str:
    """number: of the line, from 1. APIError if this is no object with a custom_id."""
    custom_id = _read_object(line, number).get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise APIError(f"line {number}: custom_id must be a non-empty string", "custom_id")
    return custom_id


def read_line(line: bytes) -> BatchLine:
    """Of a line with a custom_id. APIError if another field is wrong."""
    values = _read_object(line, 0)
    for name in values:
        if name not in _FIELDS:
            raise APIError(f"{name} is not a field of a batch file's line", name, code="unknown_parameter")
    if values.get("method") != "POST":
        raise APIError(f"method must be 'POST', got {values.get('method')!r}", "method")
    if not isinstance(values.get("url"), str):
        raise APIError("url must be a string such as '/v1/chat/completions'", "url")
    if not isinstance(values.get("body"), dict):
        raise APIError("body must be an object", "body")
    return BatchLine(values["custom_id"], values["url"], values["body"])


def answer_line(custom_id: str, body: dict[str, Any]) -> bytes:
    """body: of a response."""
    return _result(custom_id, 200, body, None)


def error_line(custom_id: str | None, error: APIError) -> bytes:
    """The error is where OpenAI's clients look for it (the response's body) and where vLLM's do (error)."""
    found = error.as_object()
    return _result(custom_id, error.status, {"error": found}, found)


def _result(custom_id: str | None, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    values = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which came in escaped
        return json.dumps(values).encode() + b"\n"


def _read_object(line: bytes, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise APIError(f"line {number} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise APIError(f"line {number} is not a JSON object")
    return values
