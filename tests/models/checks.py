"""What the tests of several families ask of their configs."""

from __future__ import annotations

import dataclasses
from typing import Any

from nanovllm.models.base import CausalLM


def other_defaults(model: type[CausalLM], theirs: Any) -> set[str]:
    """Fields whose value for an empty config.json is not that of transformers' config object."""
    ours = model.config_class.from_hf({})
    return {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name, ...)}
