"""What Triton's ops have to give: torch's ops in fp32, rounded once. For an interpreter on the CPU and for GPUs."""

from __future__ import annotations

import torch
from kernels import normal

from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_ops import TritonOps

TORCH, TRITON = TorchOps(), TritonOps()
UNIT = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding, and of fp32's sums
SIZES = [1, 3, 80, 576, 768, 1031]


def assert_rounded(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """wanted: in fp32."""
    unit = UNIT[found.dtype]
    torch.testing.assert_close(found.float(), wanted, rtol=2 * unit, atol=4 * unit)


def check_norms(device: str, dtype: torch.dtype, size: int) -> None:
    """Rows, strided rows, and strided heads; a row of NaN harms no other; a row is the same alone."""
    weight, bias = (normal(size, seed=seed).to(device, dtype) for seed in (1, 2))
    wide = (normal(9, 3, size + 5) * 3 + 1).to(device, dtype)
    for x in (wide[:, 0, 1 : size + 1], wide[:, 1:, :size], wide[None, :, :, :size]):
        for name, norm in norms(TRITON, weight, bias).items():
            found = norm(x)
            assert found.is_contiguous() and found.dtype == dtype
            wanted = norms(TORCH, weight.float(), bias.float())[name](x.float())
            assert_rounded(found, wanted) if size > 1 else assert_rounded(found[..., 0], wanted[..., 0])
    x = wide[:, 0, :size].clone()
    x[4] = float("nan")
    for norm in norms(TRITON, weight, bias).values():
        found = norm(x)
        assert found[4].isnan().all()
        for i in (0, 3, 5, 8):
            assert torch.equal(found[i], norm(x[i : i + 1])[0])
    assert TRITON.rms_norm(x[:0], weight, 1e-5).shape == (0, size)


def norms(ops: TorchOps, weight: torch.Tensor, bias: torch.Tensor) -> dict:
    return {
        "rms": lambda x: ops.rms_norm(x, weight, 1e-5),
        "layer": lambda x: ops.layer_norm(x, weight, bias, 1e-5),
        "plain": lambda x: ops.layer_norm(x, weight, None, 1e-5),
    }


def check_fp32_weights(device: str, dtype: torch.dtype) -> None:
    """Gemma's."""
    x, weight = normal(5, 4, 96).to(device, dtype), (1 + normal(96, seed=1) / 8).to(device)
    found = TRITON.rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    assert_rounded(found, TORCH.rms_norm(x.float(), weight, 1e-6))


HEADS = [(128, 64), (80, 40), (80, 16), (96, 20), (8, 1), (6, 3), (256, 128)]  # size, half of what is rotated


def angles(tokens: int, half: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    turned = normal(tokens, 1, half, seed=7).to(device) * 9
    return turned.cos(), turned.sin()


def check_rotation(device: str, dtype: torch.dtype, size: int, half: int) -> None:
    qkv = normal(7, 14, size).to(device, dtype)
    cos, sin = angles(7, half, device)
    for heads in (1, 11):
        x = qkv[:, 1 : 1 + heads]
        found = TRITON.rotate(x, cos, sin)
        assert found.is_contiguous() and found.dtype == dtype
        assert_rounded(found, TORCH.rotate(x.float(), cos, sin))
        assert torch.equal(found[3:4], TRITON.rotate(x[3:4], cos[3:4], sin[3:4]))
    assert TRITON.rotate(qkv[:0], cos[:0], sin[:0]).shape == (0, 14, size)


def check_norm_and_rotation(device: str, dtype: torch.dtype, size: int, half: int) -> None:
    """Also where a token's keys are not as many as a program has heads."""
    qkv = normal(5, 15, size).to(device, dtype)
    cos, sin = angles(5, half, device)
    weights = [(1 + normal(size, seed=seed) / 4).to(device, dtype) for seed in (1, 2)]
    for q_heads, k_heads in ((9, 3), (1, 1)):
        q, k, _ = qkv.split((q_heads, k_heads, 15 - q_heads - k_heads), dim=1)
        found = TRITON.norm_and_rotate(q, k, *weights, 1e-6, cos, sin)
        whole = [w.float() for w in weights]
        wanted = TORCH.norm_and_rotate(q.float(), k.float(), *whole, 1e-6, cos, sin)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.is_contiguous() and mine.dtype == dtype
            assert_rounded(mine, theirs)


def check_activation(device: str, dtype: torch.dtype, act: str) -> None:
    for tokens, size in ((1, 1536), (5, 37), (3, 1025), (2, 1), (0, 8)):
        x = (normal(tokens, 2 * size + 4) * 3).to(device, dtype)[:, 4:]
        found = TRITON.activate(x, act, gated=True)
        assert found.shape == (tokens, size) and found.dtype == dtype
        assert_rounded(found, TORCH.activate(x.float(), act, gated=True))
    far = torch.tensor([[200.0, -200.0, 0.0, float("nan"), 2.0, 2.0, 2.0, 2.0]], device=device, dtype=dtype)
    wanted = torch.tensor([400.0, 0.0, 0.0, float("nan")], device=device, dtype=dtype)
    torch.testing.assert_close(TRITON.activate(far, act, gated=True)[0], wanted, equal_nan=True)
    assert torch.equal(TRITON.activate(far, act, gated=False).isnan(), far.isnan())


def check_gather(device: str, dtype: torch.dtype) -> None:
    """Also at a shard's borders, and where the table is a part of a wider one."""
    for rows, size in ((50, 576), (7, 1031), (1, 1), (33, 80)):
        table = normal(rows, size + 3).to(device, dtype)[:, 2 : size + 2]
        ids = torch.arange(19, device=device) % rows
        assert torch.equal(TRITON.gather(table, ids), table[ids])
        for first in (0, 100):
            ids = torch.tensor([first - 1, first, first + rows - 1, first + rows, first + 10**6], device=device)
            found = TRITON.embed(table, ids, first)
            assert torch.equal(found, TORCH.embed(table, ids, first))
            assert not found[0].any() and torch.equal(found[1], table[0]) and not found[3:].any()
    assert TRITON.gather(table, ids[:0]).shape == (0, 80)


def check_residual(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = (
        normal(*shape, seed=seed).to(device, dtype) / 8 for seed, shape in enumerate(((5, 64), (48, 64), (48,)))
    )
    for offset in (None, bias):
        residual = normal(5, 48, seed=9).to(device, dtype)
        wanted = TORCH.plain_linear(
            *(x.float(), weight.float(), None if offset is None else offset.float(), residual.float())
        )
        assert_rounded(TRITON.plain_linear(x, weight, offset, residual), wanted)
        assert_rounded(TRITON.plain_linear(x, weight, offset), torch.nn.functional.linear(x, weight, offset).float())
