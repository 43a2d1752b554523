"""What the API says of a request that cannot be served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nanovllm.errors import RequestError

# the API's names for parameters of SamplingParams, in requests that use them
_OTHER_NAMES = {"max_tokens": "max_completion_tokens", "logprobs": "top_logprobs"}


class APIError(RequestError):
    """param: the field of the body that is wrong. status: HTTP's. code: a name for programs."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def as_object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}


def api_error(error: RequestError, body: Mapping[str, Any]) -> APIError:
    """The error of an engine that was given what `body` asks for, with the field that is to blame: the one
    that the message begins with, as those about sampling parameters do, or else the prompt."""
    if isinstance(error, APIError):
        return error
    message = str(error)
    name = re.match(r"\w*", message)[0]  # type: ignore[index]
    param = _OTHER_NAMES[name] if _OTHER_NAMES.get(name) in body else name
    if param in body:
        return APIError(param + message[len(name) :], param)
    return APIError(message, "messages" if "messages" in body else "prompt")
