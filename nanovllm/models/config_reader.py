"""Reading Hugging Face's config.json into a family's own small dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from nanovllm.errors import ModelNotSupported

T = TypeVar("T")


def read_config(cls: type[T], config: dict[str, Any], **derived: Any) -> T:
    """Fill dataclass `cls` by its field names; absent and null keys keep the field's default."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in derived:
            values[field.name] = derived[field.name]
        elif config.get(field.name) is not None:
            values[field.name] = config[field.name]
    return cls(**values)


def refuse_unless(config: dict[str, Any], **only: Any) -> None:
    """ModelNotSupported where a key has another value than the one that the model file implements."""
    for key, value in only.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ModelNotSupported(f"config.json: {key}={found!r} is not supported, only {value!r}")
