"""int8: a signed byte for each weight and one scale a row of the weight, which is an output channel."""

from __future__ import annotations

import torch

from nanovllm.quantization.blocks import Blocks, int8_blocks
from nanovllm.quantization.pieces import row_pieces


def quantize_int8(weight: torch.Tensor) -> Blocks:
    """Symmetric: the largest of a row becomes 127. weight: [rows, cols] of any float dtype."""
    data = torch.cat([_quantize(weight[piece].float()).data for piece in row_pieces(*weight.shape)])
    return Blocks("INT8", data, weight.shape[1])


def _quantize(weight: torch.Tensor) -> Blocks:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = weight / scales.where(scales > 0, 1.0)
    return int8_blocks(codes.round_().clamp_(-127, 127).to(torch.int8), scales)
