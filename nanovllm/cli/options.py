"""Command-line options made from the fields of EngineConfig and SamplingParams.

Types, defaults and help come from the dataclasses and their docstrings, so that an option
exists here as soon as it exists there. What is not given stays out of the namespace, and the
dataclass's own default holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

from nanovllm.config import EngineConfig, allowed_values
from nanovllm.sampling_params import SamplingParams

_ENGINE = "engine_"  # prefix of the destinations, as both dataclasses have a seed
_SAMPLING = "sampling_"
SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "min_tokens",
    "ignore_eos",
)


def add_engine_options(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """An option for every field of EngineConfig but `model`, or for some."""
    group = parser.add_argument_group("engine options")
    for field in dataclasses.fields(EngineConfig):
        if field.name != "model" and (only is None or field.name in only):
            flag = "--engine-seed" if field.name == "seed" else _flag(field.name)
            _add_field(group, EngineConfig, field, flag, _ENGINE)


def add_sampling_options(parser: argparse.ArgumentParser, *, n: bool) -> None:
    """The parameters of SamplingParams that a terminal has a use for; n: several completions too."""
    group = parser.add_argument_group("sampling options", "defaults: the checkpoint's, see --generation-config")
    fields = {f.name: f for f in dataclasses.fields(SamplingParams)}
    for name in (*(["n"] if n else []), *SAMPLING_NAMES):
        _add_field(group, SamplingParams, fields[name], _flag(name), _SAMPLING)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keyword arguments of LLM."""
    return _given(args, _ENGINE)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as keyword arguments of SamplingParams."""
    return _given(args, _SAMPLING)


def field_help(cls: type) -> dict[str, str]:
    """{field: its sentence} from a docstring of `name: ...` or `name, name: ...` paragraphs."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        start = re.match(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)", line)
        if start:
            names, text = start[1].split(", "), start[2]
        else:
            text = " " + line.strip()
            names = names if line.startswith("    ") else []  # a paragraph ends its field
        for name in names:
            found[name] = found.get(name, "") + text
    return found


def _add_field(group: Any, cls: type, field: dataclasses.Field, flag: str, prefix: str) -> None:
    hint = typing.get_type_hints(cls)[field.name]
    options: dict[str, Any] = {"dest": prefix + field.name, "default": argparse.SUPPRESS}
    help_text = field_help(cls).get(field.name, "").replace("%", "%%")
    if cls is EngineConfig and field.default is not None:
        help_text += f" (default: {field.default})"
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text, **options)
        return
    item = _item_type(hint)
    if item is not None:
        options |= {"action": "append", "type": item, "metavar": _metavar(item)}
        help_text += " (repeatable)"
    elif choices := allowed_values(field.name):
        options |= {"choices": choices}
    else:
        options |= {"type": _reader(hint, field.default), "metavar": _metavar(hint)}
    group.add_argument(flag, help=help_text, **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in vars(args).items() if name.startswith(prefix)}


def _members(hint: Any) -> list[Any]:
    """The types of a union, None left out."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [t for t in (typing.get_args(hint) if union else (hint,)) if t is not type(None)]


def _item_type(hint: Any) -> type | None:
    """The item's type if the option is a list."""
    for member in _members(hint):
        if typing.get_origin(member) in (Sequence, list, tuple):
            return typing.get_args(member)[0]
    return None


def _reader(hint: Any, default: Any) -> Callable[[str], Any]:
    """From the text on the command line to a value; argparse makes ValueErrors usage errors."""
    members = _members(hint)
    if str in members:
        read: Callable[[str], Any] = str
    elif members[0] in (int, float):
        read = members[0]
    else:
        read = _json_object
    if type(None) in typing.get_args(hint) and default is not None:
        return _or_none(read)
    return read


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def value_or_none(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    value_or_none.__name__ = f"{read.__name__} or none"  # argparse quotes it
    return value_or_none


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"temperature\": 0.5}}'")
    return value


def _metavar(hint: Any) -> str:
    members = _members(hint)
    if str in members:
        return "TEXT"
    return {int: "N", float: "X"}.get(members[0], "JSON")
