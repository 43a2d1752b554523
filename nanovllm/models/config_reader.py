"""Reading Hugging Face's config.json into a family's own small dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from nanovllm.errors import ModelNotSupported
from nanovllm.layers.rotary_embedding import RopeConfig

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
            raise ModelNotSupported(
                f"config.json: {key}={found!r} is not supported, only {value!r}; model_impl='transformers' may run it"
            )


def rope_fields(config: dict[str, Any], max_positions: int, default_theta: float = 10000.0) -> dict[str, Any]:
    """`rope`, and `max_position_embeddings` as far as its scaling stretches that.

    max_positions, default_theta: the family's defaults.
    """
    limit = config.get("max_position_embeddings") or max_positions
    rope = RopeConfig.from_hf({**config, "max_position_embeddings": limit}, default_theta)
    return {"rope": rope, "max_position_embeddings": rope.max_positions(limit)}


def layer_windows(layer_types: Sequence[str], num_layers: int, window: int | None) -> tuple[int | None, ...]:
    """How many tokens each layer's queries see (None: all), from HF's `layer_types`.

    ModelNotSupported for other layers than full and sliding attention, and for a window that is missing.
    """
    kinds = {"full_attention": None, "sliding_attention": window}
    if unknown := set(layer_types) - set(kinds):
        raise ModelNotSupported(f"config.json: layer_types names {', '.join(sorted(unknown))}, not among {list(kinds)}")
    if len(layer_types) != num_layers:
        raise ModelNotSupported(f"config.json: layer_types names {len(layer_types)} layers of {num_layers}")
    if "sliding_attention" in layer_types and (window is None or window < 1):
        raise ModelNotSupported(f"config.json: sliding_attention layers need a sliding_window, got {window}")
    return tuple(kinds[kind] for kind in layer_types)
