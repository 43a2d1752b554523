"""What Triton's Mamba2 has to give: that of torch's ops. For an interpreter on the CPU and for GPUs."""

from __future__ import annotations

import dataclasses

import torch
from kernels import normal
from mamba2_cases import SIZES, VARIANTS, forget_everything, make_batch, make_layer, only_the_recurrence, step, width

from nanovllm.layers.mamba2 import Mamba2
from nanovllm.ops.mamba2 import Mamba2Sizes
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_ops import TritonOps
from nanovllm.triton_kernels.mamba2_plan import CELL

TORCH, TRITON = TorchOps(), TritonOps()
UNIT = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of rounding, and of fp32's sums
MORE = {name: dataclasses.replace(sizes, num_heads=3) for name, sizes in VARIANTS.items()}
# several heads of a group; several blocks of channels, of heads' rows and of a state's columns
MORE["wide"] = dataclasses.replace(SIZES, num_heads=4, head_dim=80, state_size=140, num_groups=2)
LENGTHS = {1: 280, 2: 1, 4: CELL + 1, 6: 2}  # several cells, one token, a last cell of one token, and a few
Steps = list[dict[int, tuple[int, int]]]
STEPS: Steps = [
    {1: (0, 128), 4: (0, 129)},
    {2: (0, 1), 1: (128, 257), 6: (0, 2)},
    {1: (257, 280)},  # not at the beginning of a cell: right as well
]


def inputs_for(sizes: Mamba2Sizes, device: str, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """What the input projection might give; large enough that the state has all kinds of decays."""
    lengths = LENGTHS.items()
    return {slot: normal(length, width(sizes), seed=slot).to(device, dtype).mul_(2) for slot, length in lengths}


def recurrence(sizes: Mamba2Sizes, ops: TorchOps, device: str, dtype: torch.dtype, **values: float) -> Mamba2:
    return only_the_recurrence(make_layer(sizes, ops, 0.5, dtype, device, **values))


def run(layer: Mamba2, inputs: dict[int, torch.Tensor], steps: Steps) -> dict[int, torch.Tensor]:
    """steps: {slot: (first, end) of its tokens}."""
    found: dict[int, list[torch.Tensor]] = {slot: [] for slot in inputs}
    for members in steps:
        chunks = [(slot, first, inputs[slot][first:end]) for slot, (first, end) in members.items()]
        for (slot, *_), out in zip(chunks, step(layer, chunks), strict=True):
            found[slot].append(out)
    return {slot: torch.cat(parts) for slot, parts in found.items()}


def check_mixed_steps(device: str, dtype: torch.dtype, variant: str) -> None:
    """Rows, and what slots hold, in fp32; weights and inputs are numbers of the dtype."""
    sizes = MORE[variant]
    layers = [recurrence(sizes, TRITON, device, dtype), recurrence(sizes, TORCH, device, torch.float32)]
    for mine, theirs in zip(*(layer.parameters() for layer in layers), strict=True):
        theirs.copy_(mine)
    layers[1].finalize_weights()
    inputs = inputs_for(sizes, device, dtype)
    found = run(layers[0], inputs, STEPS)
    wanted = run(layers[1], {slot: x.float() for slot, x in inputs.items()}, STEPS)
    unit = 32 * UNIT[dtype]
    for slot in inputs:
        assert found[slot].dtype == dtype
        scale = wanted[slot].square().mean().sqrt().item()
        # a sum of large terms that is small itself is wrong by more than others
        torch.testing.assert_close(found[slot].float(), wanted[slot], rtol=unit, atol=2 * unit * scale)
        torch.testing.assert_close(layers[0]._conv_states[slot].float(), layers[1]._conv_states[slot], rtol=0, atol=0)
        scale = layers[1]._states[slot].square().mean().sqrt().item()
        torch.testing.assert_close(layers[0]._states[slot], layers[1]._states[slot], rtol=unit, atol=unit * scale)


def check_cuts_change_no_bit(device: str, dtype: torch.dtype, variant: str) -> None:
    """A prompt that is cut between cells, in any company, and one that goes on in a copy of its slot."""
    layer = recurrence(MORE[variant], TRITON, device, dtype)
    inputs = inputs_for(MORE[variant], device, dtype)
    whole, states = {}, {}
    for slot, x in inputs.items():
        [whole[slot]] = step(layer, [(slot, 0, x)])
        states[slot] = [kept[slot].clone() for kept in (layer._conv_states, layer._states)]
    forget_everything(layer)
    cut: Steps = [
        {1: (0, 128), 2: (0, 1), 4: (0, 128)},
        {6: (0, 2), 4: (128, 129), 1: (128, 280)},
    ]
    found = run(layer, inputs, cut)
    for slot, rows in whole.items():
        assert torch.equal(found[slot], rows)
        for kept, wanted in zip((layer._conv_states, layer._states), states[slot], strict=True):
            assert torch.equal(kept[slot], wanted)
    step(layer, [(1, 0, inputs[1][:128])])
    for kept in (layer._conv_states, layer._states):
        kept[7] = kept[1]
    [resumed] = step(layer, [(7, 128, inputs[1][128:])])
    assert torch.equal(resumed, whole[1][128:])


def check_padding(device: str, dtype: torch.dtype) -> None:
    """Rows of a padded decode step, all in slot 0, change neither other rows nor other slots."""
    layer = recurrence(SIZES, TRITON, device, dtype)
    for kept in (layer._conv_states, layer._states):
        kept.fill_(3.0)
    x = normal(5, width(SIZES)).to(device, dtype)
    batch = make_batch([(2, 0, 1), (7, 40, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1)], device)
    batch.seq_lens[3:] = torch.tensor([0, 1])
    out = layer(x, TRITON.plan_mamba2(batch, SIZES))
    states = [kept[[2, 7]].clone() for kept in (layer._conv_states, layer._states)]
    for kept in (layer._conv_states, layer._states):
        assert (kept[[1, 3, 4, 5, 6, 8]] == 3).all()
        kept[:] = 3.0
    alone = step(layer, [(2, 0, x[:1]), (7, 40, x[1:2])])
    assert torch.equal(torch.cat(alone), out[:2])
    for kept, wanted in zip((layer._conv_states, layer._states), states, strict=True):
        assert torch.equal(kept[[2, 7]], wanted)


def check_infinite_sequence(device: str, dtype: torch.dtype) -> None:
    layer = recurrence(MORE["plain"], TRITON, device, dtype)
    spoilt, sound = (normal(CELL + 2, width(MORE["plain"]), seed=seed).to(device, dtype) for seed in (0, 1))
    [alone] = step(layer, [(1, 0, sound)])
    spoilt[30:] = float("inf")
    for chunks in ([(2, 0, spoilt), (1, 0, sound)], [(1, 0, sound), (2, 0, spoilt)]):
        out = step(layer, chunks)[[slot for slot, _, _ in chunks].index(1)]
        assert torch.equal(out, alone) and out.isfinite().all()


def check_several_ranks(device: str, dtype: torch.dtype) -> None:
    """The sums of squares go through a callback; what it returns is what rows are divided by."""
    sizes = dataclasses.replace(MORE["plain"], whole_norm_size=2 * MORE["plain"].inner_size)
    found, wanted = [], []
    for ops, outs in ((TRITON, found), (TORCH, wanted)):
        layer = recurrence(sizes, ops, device, dtype)
        layer._sum_squares = lambda squares: squares * 3 + 1
        inputs = inputs_for(sizes, device, dtype)
        outs += step(layer, [(4, 0, inputs[4]), (2, 0, inputs[2])])
    unit = 32 * UNIT[dtype]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)


def check_extreme_decays(device: str, dt_bias: float, A_log: float) -> None:
    """Sums of logarithms must neither overflow nor lose the small ones beside one that forgets everything."""
    layers = [recurrence(SIZES, ops, device, torch.float32, dt_bias=dt_bias, A_log=A_log) for ops in (TRITON, TORCH)]
    x = normal(150, width(SIZES)).to(device)
    x[40] *= 100
    found, wanted = (step(layer, [(1, 0, x)])[0] for layer in layers)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def check_capture() -> None:
    """A captured step of decoding sequences reads its slots and lengths anew."""
    layer = recurrence(SIZES, TRITON, "cuda", torch.bfloat16)
    inputs = inputs_for(SIZES, "cuda", torch.bfloat16)
    for slot, x in inputs.items():
        step(layer, [(slot, 0, x)])
    states = [kept.clone() for kept in (layer._conv_states, layer._states)]
    rows = normal(2, width(SIZES), seed=9).to("cuda", torch.bfloat16)
    wanted = torch.cat(step(layer, [(1, 280, rows[:1]), (4, CELL + 1, rows[1:])]))
    batch = make_batch([(2, 1, 1), (6, 2, 1)], "cuda")
    static = torch.zeros_like(rows)
    layer(static, TRITON.plan_mamba2(batch, SIZES))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(static, TRITON.plan_mamba2(batch, SIZES))
    for kept, before in zip((layer._conv_states, layer._states), states, strict=True):
        kept.copy_(before)
    static.copy_(rows)
    batch.state_slots.copy_(torch.tensor([1, 4]))
    batch.seq_lens.copy_(torch.tensor([281, CELL + 2]))
    graph.replay()
    assert torch.equal(out, wanted)
