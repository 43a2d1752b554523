"""Activations by the names that Hugging Face's configs use."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanovllm.errors import ModelNotSupported

Activation = Callable[[torch.Tensor], torch.Tensor]

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def activation(name: str) -> Activation:
    """The function that config.json names; ModelNotSupported lists what there is."""
    if name not in _ACTIVATIONS:
        raise ModelNotSupported(
            f"config.json: activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]
