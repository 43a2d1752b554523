"""int8: a signed byte for each weight; 32 columns of a row share a scale in half precision. That is ggml's Q8_0.

One scale for a whole row would be 6% smaller, and its error three times as large (docs/quantization.md).
"""

from __future__ import annotations

import torch

from nanovllm.quantization.ggml import GGMLBlocks, q8_0_blocks
from nanovllm.quantization.pieces import in_groups, row_pieces, weights_of_piece


def quantize_int8(weight: torch.Tensor) -> GGMLBlocks:
    """The largest of a group becomes 127. weight: [rows, cols] of any float dtype."""
    pieces = row_pieces(len(weight), weight.shape[1], weights_of_piece(weight.device))
    found = [_quantize(in_groups(weight[rows])).data for rows in pieces]
    return GGMLBlocks("Q8_0", torch.cat(found), weight.shape[1])


def _quantize(groups: torch.Tensor) -> GGMLBlocks:
    """[rows, groups, 32] in fp32."""
    scales = (groups.abs().amax(dim=-1) / 127).half()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    codes = (groups * inverse[..., None]).round_().clamp_(-127, 127)
    return q8_0_blocks(codes.to(torch.int8), scales)
