"""Rotary position embedding (Su et al. 2021) and its scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: the base of the frequencies. scaling: HF's dict of the scaling, with "rope_type"."""

    theta: float
    scaling: dict[str, Any]

    @classmethod
    def from_hf(cls, config: dict[str, Any], default_theta: float = 10000.0) -> RopeConfig:
        """Read either generation: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
        both = config.get("rope_parameters") or {}
        scaling = dict(both or config.get("rope_scaling") or {})
        theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or default_theta
        scaling["rope_type"] = scaling.get("rope_type") or scaling.pop("type", None) or "default"
        return cls(float(theta), scaling)


class RotaryEmbedding(nn.Module):
    """cos and sin for positions below max_model_len, in fp32; pairs are (i, i + dim / 2)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, dim: int, config: RopeConfig, ctx: BuildContext) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(ctx.max_model_len).float(), inverse_frequencies(dim, config))
        self.register_buffer("cos", angles.cos().to(ctx.device), persistent=False)
        self.register_buffer("sin", angles.sin().to(ctx.device), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, dim / 2] for positions [T]; once a step for all layers."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads x [T, H, dim]; computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def inverse_frequencies(dim: int, config: RopeConfig) -> torch.Tensor:
    """theta^(-2i/dim), scaled; fp32 [dim / 2]. ModelNotSupported for other scalings."""
    try:
        return _scaled(dim, config)
    except (KeyError, TypeError) as error:
        raise ModelNotSupported(f"config.json: RoPE scaling {config.scaling} is incomplete: {error}") from error


def _scaled(dim: int, config: RopeConfig) -> torch.Tensor:
    plain = 1.0 / config.theta ** (torch.arange(0, dim, 2).float() / dim)
    kind, scaling = config.scaling["rope_type"], config.scaling
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "factors":  # one a frequency, as GGUF files carry them
        return plain / torch.tensor(scaling["factors"])
    if kind == "llama3":
        return _llama3(plain, scaling)
    raise ModelNotSupported(f"RoPE scaling {kind!r} is not supported (default, linear and llama3 are)")


def _llama3(plain: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, blend between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the trained context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / scaling["factor"] + blend * plain
