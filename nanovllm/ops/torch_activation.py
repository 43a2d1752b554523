"""Activations by the names that Hugging Face's configs use, as torch computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def activate(x: torch.Tensor, act: str, *, gated: bool) -> torch.Tensor:
    """As `Ops.activate`."""
    if not gated:
        return ACTIVATIONS[act](x)
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up
