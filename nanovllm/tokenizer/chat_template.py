"""Chat templates: the model's own Jinja text, rendered in a sandbox, as transformers does."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.errors import RequestError

Message = Mapping[str, Any]


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class's way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    return env.from_string(source)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any
) -> str:
    """The prompt's text; RequestError if a message is malformed or the template refuses it."""
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(m, Mapping) and "role" in m and ("content" in m or "tool_calls" in m) for m in messages)
    ):
        raise RequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
    # templates written for transformers test `tools is not none`: without tools these are None, not undefined
    variables = {"tools": None, "documents": None, **variables}
    try:
        return _compile(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except TemplateError as error:
        raise RequestError(f"the model's chat template refused the messages: {error}") from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise RequestError(f"the model's chat template could not use the messages: {error}") from error
