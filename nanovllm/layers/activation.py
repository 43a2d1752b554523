"""Activations by the names that Hugging Face's configs use."""

from __future__ import annotations

from nanovllm.errors import ModelNotSupported
from nanovllm.ops.torch_activation import ACTIVATIONS, Activation


def activation(name: str) -> Activation:
    """The function that config.json names; ModelNotSupported lists what there is."""
    if name not in ACTIVATIONS:
        raise ModelNotSupported(
            f"config.json: activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
