"""Rotary position embedding (Su et al. 2021) and its scalings.

Keys are rotated before they are cached, so a scaling must not follow the length of the day: it is
fixed for max_model_len when the model is built. Two scalings notice. Hugging Face computes `dynamic`
for the longer of the current and the trained length, here it is for max_model_len; `longrope` has a
short and a long set of factors, and here the long one holds if max_model_len exceeds the trained
length. Both give Hugging Face's numbers for a sequence of max_model_len tokens, and for all shorter
ones if max_model_len is no longer than the trained length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.ops.base import Ops


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: the base of the frequencies.
    scaling: HF's dict of the scaling, with "rope_type"; where the scaling needs the trained length,
        it is "original_max_position_embeddings".
    partial_rotary_factor: share of a head that is rotated, its first dimensions.
    """

    theta: float
    scaling: dict[str, Any]
    partial_rotary_factor: float = 1.0

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], default_theta: float = 10000.0, *, layer_type: str | None = None
    ) -> RopeConfig:
        """Read either generation: `rope_parameters`, or `rope_theta` with `rope_scaling`.

        layer_type: for models that rotate by layer type, the one to read. Their older configs have
        `rope_local_base_freq` for "sliding_attention", and scale only the other layers.
        """
        scaling = _found_scaling(config, layer_type)
        scaling["rope_type"] = _first(scaling.get("rope_type"), scaling.pop("type", None), "default")
        theta_key = "rope_local_base_freq" if layer_type == "sliding_attention" else "rope_theta"
        scaling["rope_theta"] = _first(
            scaling.get("rope_theta"), config.get(theta_key), config.get("rotary_emb_base"), default_theta
        )
        scaling["partial_rotary_factor"] = _first(
            scaling.get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct"), 1.0
        )
        theta, share = _number(scaling, "rope_theta"), _number(scaling, "partial_rotary_factor")
        del scaling["rope_theta"], scaling["partial_rotary_factor"]
        return cls(theta, _completed(scaling, config), share)

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated. All for "proportional", some of them by nothing."""
        return head_dim if self.scaling["rope_type"] == "proportional" else int(head_dim * self.partial_rotary_factor)

    def max_positions(self, max_position_embeddings: int) -> int:
        """Positions that the model can take, as vLLM derives them from config.json's own limit.

        linear and dynamic stretch that limit, yarn the trained length; llama3 and longrope configs
        state the stretched one.
        """
        kind = self.scaling["rope_type"]
        if kind not in ("linear", "dynamic", "yarn"):
            return max_position_embeddings
        if kind == "yarn":
            max_position_embeddings = int(_number(self.scaling, "original_max_position_embeddings"))
        return int(max_position_embeddings * _number(self.scaling, "factor"))


class Rope(NamedTuple):
    """A step's rotations: cos and sin [T, 1, dim / 2], and what rotates by them."""

    cos: torch.Tensor
    sin: torch.Tensor
    ops: Ops


class RotaryEmbedding(nn.Module):
    """cos and sin for positions below max_model_len, in fp32; pairs are (i, i + dim / 2).

    dim: rotated dimensions of a head, `RopeConfig.rotary_dim`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, dim: int, config: RopeConfig, ctx: BuildContext) -> None:
        super().__init__()
        self._ops = ctx.ops
        frequencies = inverse_frequencies(dim, config, ctx.max_model_len)
        angles = torch.outer(torch.arange(ctx.max_model_len).float(), frequencies)
        factor = attention_factor(config)
        self.register_buffer("cos", angles.cos().mul_(factor).to(ctx.device), persistent=False)
        self.register_buffer("sin", angles.sin().mul_(factor).to(ctx.device), persistent=False)

    def forward(self, positions: torch.Tensor) -> Rope:
        """For positions [T]; once a step for all layers."""
        cos, sin = (self._ops.gather(table, positions).unsqueeze(1) for table in (self.cos, self.sin))
        return Rope(cos, sin, self._ops)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ops: Ops) -> torch.Tensor:
    """Rotate the first dimensions of heads x [T, H, D], twice as many as cos and sin are wide, and
    leave the rest; computed in fp32, returned in x's dtype."""
    return ops.rotate(x, cos, sin)


def apply_normed_rotary(
    q: torch.Tensor, k: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for heads of queries [T, H, D] and of keys [T, KH, D], each normed first."""
    if not rope.ops.norms_and_rotates:
        return rope.ops.rotate(q_norm(q), rope.cos, rope.sin), rope.ops.rotate(k_norm(k), rope.cos, rope.sin)
    assert q_norm.eps == k_norm.eps
    return rope.ops.norm_and_rotate(q, k, q_norm.weight, k_norm.weight, q_norm.eps, rope.cos, rope.sin)


def inverse_frequencies(dim: int, config: RopeConfig, max_model_len: int = 0) -> torch.Tensor:
    """Radians a position, scaled: fp32 [dim / 2].

    max_model_len: for the scalings that depend on it; 0 stands for no more than the trained length.
    Raises ModelNotSupported for another scaling, and for one that lacks a number.
    """
    theta, scaling = config.theta, config.scaling
    match scaling["rope_type"]:
        case "default":
            return 1.0 / _powers(dim, theta)
        case "linear":
            return 1.0 / _powers(dim, theta) / _number(scaling, "factor")
        case "factors":  # one a frequency, as GGUF files carry them
            return 1.0 / _powers(dim, theta) / _numbers(scaling, "factors", dim)
        case "dynamic":
            return 1.0 / _powers(dim, _dynamic_theta(dim, config, max_model_len))
        case "longrope":
            is_long = max_model_len > _number(scaling, "original_max_position_embeddings")
            return 1.0 / (_numbers(scaling, "long_factor" if is_long else "short_factor", dim) * _powers(dim, theta))
        case "llama3":
            return _llama3(1.0 / _powers(dim, theta), scaling)
        case "yarn":
            return _yarn(_powers(dim, theta), dim, config)
        case "proportional":
            return _proportional(1.0 / _powers(dim, theta), config)
        case kind:
            raise ModelNotSupported(
                f"RoPE scaling {kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn, "
                "longrope, proportional"
            )


def attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by."""
    scaling = config.scaling
    if scaling["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    factor = _number(scaling, "factor")
    if factor <= 1:
        return 1.0
    if scaling["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(_number(scaling, "original_max_position_embeddings")))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):  # DeepSeek's
        above, below = (0.1 * _number(scaling, key) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        return above / below
    return 0.1 * math.log(factor) + 1


def _powers(dim: int, theta: float) -> torch.Tensor:
    """theta^(2i/dim), fp32 [dim / 2]: positions a radian."""
    return theta ** (torch.arange(0, dim, 2).float() / dim)


def _dynamic_theta(dim: int, config: RopeConfig, max_model_len: int) -> float:
    """NTK-aware: raise the base so that the lowest frequency spans max_model_len."""
    factor, trained = (_number(config.scaling, key) for key in ("factor", "original_max_position_embeddings"))
    stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
    return config.theta * stretch ** (dim / (dim - 2))


def _llama3(plain: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, blend between."""
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    turns = _number(scaling, "original_max_position_embeddings") / (2 * math.pi / plain)  # in the trained context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / _number(scaling, "factor") + blend * plain


def _yarn(powers: torch.Tensor, dim: int, config: RopeConfig) -> torch.Tensor:
    """Peng et al. 2023: keep frequencies that turn more than beta_fast times in the trained context,
    divide by `factor` those that turn less than beta_slow times, and blend linearly between."""
    scaling = config.scaling
    trained = _number(scaling, "original_max_position_embeddings")

    def index_of(turns: float) -> float:  # of the frequency with so many turns, as a real number
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = index_of(_number(scaling, "beta_fast", 32)), index_of(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # a step, if both ends fall together
    keep = 1 - ((torch.arange(len(powers)).float() - low) / width).clamp(0, 1)
    return (1 - keep) * (1.0 / (_number(scaling, "factor") * powers)) + keep * (1.0 / powers)


def _proportional(plain: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Gemma 4: the first pairs of the whole head turn, the others stand still."""
    turning = int(config.partial_rotary_factor * 2 * len(plain) // 2)
    still = torch.arange(len(plain)) >= turning
    return plain.masked_fill(still, 0.0) / _number(config.scaling, "factor", 1)


def _found_scaling(config: dict[str, Any], layer_type: str | None) -> dict[str, Any]:
    """A copy of HF's dict for the layer type, of either generation; empty if there is none."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelNotSupported(f"config.json: the RoPE parameters must be a dict, found {found!r}")
    if not any(isinstance(value, dict) for value in found.values()):
        return {} if layer_type == "sliding_attention" else dict(found)
    if layer_type is None:
        raise ModelNotSupported(f"config.json: a RoPE for each of {', '.join(found)} is not supported in this model")
    return dict(found.get(layer_type) or {})


def _completed(scaling: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Add what Hugging Face adds: the trained length, and a factor that follows from it."""
    kind, key = scaling["rope_type"], "original_max_position_embeddings"
    if kind == "su":  # as early Phi-3 files call it
        kind = scaling["rope_type"] = "longrope"
    limit = config.get("max_position_embeddings")
    if kind == "dynamic":
        scaling[key] = limit
    elif kind in ("llama3", "yarn", "longrope"):
        scaling[key] = _first(config.get(key), scaling.get(key), limit)  # Phi-3 has it outside
    derived = kind == "longrope" or (kind == "yarn" and "factor" in scaling)
    if derived and scaling.get("factor") is None and limit is not None:
        scaling["factor"] = _number(config | scaling, "max_position_embeddings") / _number(scaling, key)
    return scaling


def _first(*values: Any) -> Any:
    """The first that is not None, if any."""
    return next((value for value in values if value is not None), None)


def _number(scaling: dict[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; null stands for the default."""
    value = _first(scaling.get(key), default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _incomplete(scaling, key, "a positive number", value)
    return value


def _numbers(scaling: dict[str, Any], key: str, dim: int) -> torch.Tensor:
    """One positive number for each frequency, fp32 [dim / 2]."""
    values, count = scaling.get(key), (dim + 1) // 2
    if not isinstance(values, list) or len(values) != count:
        raise _incomplete(scaling, key, f"a list of {count} numbers", values)
    return torch.tensor([_number({**scaling, key: value}, key) for value in values])


def _incomplete(scaling: dict[str, Any], key: str, wanted: str, found: Any) -> ModelNotSupported:
    kind = scaling["rope_type"]
    return ModelNotSupported(f"config.json: RoPE scaling {kind!r} is incomplete: {key!r} is {found!r}, not {wanted}")
