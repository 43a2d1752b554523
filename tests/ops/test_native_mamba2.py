"""Native Mamba2: the same bits however a sequence is cut, in any company, by any number of threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from kernels import native_library, normal
from mamba2_cases import (
    SIZES,
    SLOTS,
    VARIANTS,
    forget_everything,
    make_layer,
    naive,
    only_the_recurrence,
    run_steps,
    schedules,
    step,
    width,
)

from nanovllm.ops.mamba2 import Mamba2Sizes
from nanovllm.ops.native import NativeOps
from nanovllm.ops.torch_ops import TorchOps

OPS = NativeOps(native_library())
GRANITE = Mamba2Sizes(20, 48, 32, 1, 128, 4, 1e-5)
# heads of a vector, of several, of parts; states that are no multiple of what registers hold
MORE = {
    **VARIANTS,
    "granite": GRANITE,
    "wide": dataclasses.replace(SIZES, num_heads=4, head_dim=64, state_size=21, num_groups=2),
    "slim": dataclasses.replace(SIZES, num_heads=6, head_dim=16, state_size=9, num_groups=2),
}


@pytest.mark.parametrize("variant", MORE)
def test_right_against_float64_and_torch(level, variant):
    sizes = MORE[variant]
    native, torchs = (make_layer(sizes, ops, scale=0.4) for ops in (OPS, TorchOps()))
    inputs = {slot: normal(length, 20, seed=slot) for slot, length in {1: 70, 2: 1, 4: 33}.items()}
    steps = [{1: 40, 4: 33}, {2: 1, 1: 29}, {1: 1}]
    found, theirs = run_steps(native, inputs, steps), run_steps(torchs, inputs, steps)
    for slot, x in inputs.items():
        wanted = naive(native, x).float()
        torch.testing.assert_close(found[slot], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[slot], theirs[slot], rtol=2e-4, atol=2e-4)


def bits(layer, slot, length) -> list[torch.Tensor]:
    """A slot's states, of a sequence of so many tokens; a strip's lanes beyond the channels are nobody's."""
    sizes = layer._sizes
    channels = sizes.inner_size // sizes.num_groups
    state = layer._states[slot].unflatten(0, (sizes.num_groups, -1)).transpose(2, 3).flatten(1, 2)[:, :channels]
    return [layer._conv_states[slot][-length:].clone(), state.clone()]


@pytest.mark.parametrize("variant", MORE)
def test_bits_do_not_depend_on_cuts_company_or_threads(level, threads, variant):
    sizes = MORE[variant]
    layer = only_the_recurrence(make_layer(sizes, OPS))
    inputs = {slot: normal(length, width(sizes), seed=slot) for slot, length in {1: 100, 2: 7, 3: 1, 5: 66}.items()}
    threads(1)
    whole = {slot: (step(layer, [(slot, 0, x)])[0], bits(layer, slot, len(x))) for slot, x in inputs.items()}
    for count in (1, 2, 3):
        threads(count)
        for steps in (
            [{slot: len(x) for slot, x in inputs.items()}],
            [{slot: 1 for slot, x in inputs.items() if t < len(x)} for t in range(100)],
            [{1: 33, 3: 1}, {5: 2, 1: 1, 2: 3}, {1: 31, 5: 33, 2: 4}, {5: 31}, {1: 35}],
        ):
            forget_everything(layer)
            outputs = run_steps(layer, inputs, steps)
            for slot, (rows, states) in whole.items():
                assert torch.equal(outputs[slot], rows)
                assert all(map(torch.equal, bits(layer, slot, len(rows)), states))


@pytest.mark.parametrize("variant", ["groups", "odd", "no-history", "slim"])
@settings(max_examples=30, deadline=None)
@given(schedule=schedules())
def test_bits_of_any_schedule(variant, schedule):
    lengths, steps = schedule
    layer = only_the_recurrence(make_layer(MORE[variant], OPS))
    inputs = {slot: normal(length, width(MORE[variant]), seed=slot) for slot, length in lengths.items()}
    whole = {slot: (step(layer, [(slot, 0, x)])[0], bits(layer, slot, len(x))) for slot, x in inputs.items()}
    forget_everything(layer)
    outputs = run_steps(layer, inputs, steps)
    for slot, (rows, states) in whole.items():
        assert torch.equal(outputs[slot], rows)
        assert all(map(torch.equal, bits(layer, slot, len(rows)), states))


def test_only_the_slots_of_the_batch_are_touched(level):
    layer = only_the_recurrence(make_layer(GRANITE, OPS))
    for states in (layer._conv_states, layer._states):
        states.fill_(3.0)
    step(layer, [(2, 0, normal(5, width(GRANITE))), (7, 40, normal(1, width(GRANITE)))])
    for slot in set(range(SLOTS)) - {2, 7}:
        assert (layer._conv_states[slot] == 3).all() and (layer._states[slot] == 3).all()


@pytest.mark.parametrize("value", [-200.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 15.0, 90.0, 1e6])
def test_softplus_of_any_size(level, value):
    """With A = 0 nothing is forgotten, and with B = C = 1 the state holds dt x: y is dt x N + D x."""
    sizes = dataclasses.replace(SIZES, conv_kernel=1, num_heads=1, head_dim=32, state_size=1)
    layer = make_layer(sizes, OPS, A_log=-200.0, D=0.0)
    projected = torch.zeros(1, width(sizes))
    projected[0, :32] = 30.0  # the gate
    projected[0, -1] = value - layer.dt_bias.item()
    layer._weights = dataclasses.replace(
        layer._weights, filters=torch.zeros(1, 34), conv_bias=torch.full((34,), 20.0), norm=torch.ones(32)
    )
    only_the_recurrence(layer)
    step(layer, [(1, 0, projected)])
    wanted = torch.nn.functional.softplus((projected[0, -1] + layer.dt_bias[0]).double()) * 400
    torch.testing.assert_close(layer._states[1, 0, 0].double(), wanted.expand(32), rtol=3e-6, atol=1e-30)
