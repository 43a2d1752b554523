"""ALiBi: a bias on attention scores that is linear in the distance (Press et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Alibi:
    """What an attention layer adds to its scores.

    slopes: [H] fp32, of this rank's heads.
    rounded: Falcon's way: slope, key position and their product are rounded to bfloat16. The
        product takes the key's absolute position, which differs from the distance by a constant
        a query, so that softmax cannot tell; only rounding can.
    factor: on the whole bias, after rounding.
    """

    slopes: torch.Tensor
    rounded: bool = False
    factor: float = 1.0

    def bias(self, key_positions: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
        """int64 [L] and [..., S] -> fp32 [..., H, S, L]; S is 1 where all queries have the same bias."""
        if self.rounded:
            biases = (self.slopes.bfloat16()[:, None, None] * key_positions.bfloat16()).float()
            return self.factor * biases.expand(*query_positions.shape[:-1], -1, -1, -1)
        distance = key_positions - query_positions[..., None]  # [..., S, L]
        return self.factor * self.slopes[:, None, None] * distance.unsqueeze(-3)


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> torch.Tensor:
    """fp32 [H]: 2^(-max_bias * i / n) for i = 1..n where n = H is a power of two; otherwise those
    of the power below, then every other one of the power above."""
    below = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, below + 1, dtype=torch.float64) / below
    between = torch.arange(1, 2 * below, 2, dtype=torch.float64) / (2 * below)
    return torch.exp2(-max_bias * torch.cat([exponents, between])[:num_heads]).float()
