"""What `batch_invariant` takes of Triton's kernels: a row's bits are its own. For an interpreter on the CPU and for
GPUs."""

from __future__ import annotations

import torch
from kernels import normal
from mamba2_cases import SIZES, forget_everything, step
from triton_cases import assert_rounded
from triton_mamba2_cases import inputs_for, recurrence, run

from nanovllm.ops.invariant_ops import InvariantTritonOps
from nanovllm.ops.torch_ops import TorchOps

OPS = InvariantTritonOps()


def check_linear(device: str, dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    """Also of rows that begin at odd places, and beside a row that is no number."""
    x, weight = (normal(*size, seed=seed).to(device, dtype) / 8 for seed, size in enumerate(((rows, shape[1]), shape)))
    bias = normal(shape[0], seed=3).to(device, dtype)
    for offset in (None, bias):
        residual = normal(rows, shape[0], seed=9).to(device, dtype)
        wanted = TorchOps().plain_linear(
            *(x.float(), weight.float(), None if offset is None else offset.float(), residual.float())
        )
        found = OPS.plain_linear(x, weight, offset, residual.clone())
        assert found.dtype == dtype
        assert_rounded(found, wanted)
        for part in (slice(rows - 1, rows), slice(rows // 3, rows)):
            assert torch.equal(OPS.plain_linear(x[part], weight, offset, residual[part].clone()), found[part])
    alone = OPS.plain_linear(x[-1:], weight, None)
    x[0] = float("nan")
    assert torch.equal(OPS.plain_linear(x, weight, None)[-1:], alone) or rows == 1
    assert OPS.plain_linear(x[:0], weight, None).shape == (0, shape[0])


def check_mixture(device: str, dtype: torch.dtype) -> None:
    """Tokens alone, and in a batch of so many that other tiles would suit them."""
    gate_up, down = (normal(4, *size, seed=1).to(device, dtype) / 6 for size in ((34, 40), (40, 17)))
    x = normal(300, 40).to(device, dtype)
    weights, chosen = TorchOps().route(normal(300, 4, seed=3).to(device), 2, normalise=True)
    found = OPS.mixture(x, weights, chosen, gate_up, down, 17, "silu")
    for part in (slice(299, 300), slice(0, 1), slice(90, 125)):
        rows = x[part], weights[part].contiguous(), chosen[part].contiguous()
        assert torch.equal(OPS.mixture(*rows, gate_up, down, 17, "silu"), found[part])


def check_recurrence(device: str, dtype: torch.dtype) -> None:
    """A prompt in one step, cut anywhere, and token by token: rows and what slots hold."""
    layer, inputs = recurrence(SIZES, OPS, device, dtype), inputs_for(SIZES, device, dtype)
    inputs = {slot: inputs[slot] for slot in (1, 2, 6)}
    inputs[1] = inputs[1][:40]
    assert layer.cache_spec.grid == 1
    whole, states = {}, {}
    for slot, x in inputs.items():
        [whole[slot]] = step(layer, [(slot, 0, x)])
        states[slot] = [kept[slot].clone() for kept in (layer._conv_states, layer._states)]
    cuts = [{1: (0, 3), 2: (0, 1)}, {6: (0, 1), 1: (3, 4)}, {1: (4, 39), 6: (1, 2)}, {1: (39, 40)}]
    forget_everything(layer)
    found = run(layer, inputs, cuts)
    for slot, rows in whole.items():
        assert torch.equal(found[slot], rows)
        for kept, wanted in zip((layer._conv_states, layer._states), states[slot], strict=True):
            assert torch.equal(kept[slot], wanted)


def check_log_softmax(device: str, size: int) -> None:
    """Rows that lie at odd places in memory, and infinite ones."""
    logits = (normal(5, size) * 4).to(device)
    logits[1, size // 2] = float("-inf")
    found = OPS.sampling.log_softmax(logits)
    torch.testing.assert_close(found, logits.log_softmax(1), rtol=1e-6, atol=1e-5)
    for i in range(5):
        assert torch.equal(OPS.sampling.log_softmax(logits[i : i + 1].clone())[0], found[i])
    logits[2, 0], logits[3, 0], logits[4] = float("nan"), float("inf"), float("-inf")
    odd = OPS.sampling.log_softmax(logits)
    assert odd[2:].isnan().any(1).all() and torch.equal(odd[:2], found[:2])
