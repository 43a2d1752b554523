"""A recorded step gives what the step gives, on what its inputs hold by then."""

import pytest
import torch
from kernels import native_library

from nanovllm.ops.graph import CannotRecord
from nanovllm.ops.native import NativeOps


@pytest.fixture
def ops():
    return NativeOps(native_library())


@torch.inference_mode()
def test_a_replay_reads_its_inputs_anew(ops, threads):
    torch.manual_seed(0)
    weight, norm = ops.pack(torch.randn(64, 64), gated=False), torch.rand(64)
    x = torch.randn(9, 64)

    def step() -> torch.Tensor:
        y = x
        for _ in range(5):
            y = y + ops.linear(ops.rms_norm(y, norm, 1e-6), weight, 64, None) * 0.5
        return (y / 3.0).clamp(-1.0, 1.0).unflatten(1, (8, 8)).flatten(1)

    result, graph = ops.recorder().record(step)
    for count in (1, 2):
        threads(count)
        x.normal_()
        expected = step()
        graph.replay()
        assert torch.equal(result, expected)


@torch.inference_mode()
def test_nothing_is_computed_while_recording(ops):
    x, weight = torch.full((2, 4), torch.nan), torch.ones(4)
    result, graph = ops.recorder().record(lambda: ops.rms_norm(x, weight, 1e-6))
    x.fill_(2.0)
    graph.replay()
    torch.testing.assert_close(result, torch.ones(2, 4))


@torch.inference_mode()
def test_tensors_that_live_together_do_not_share_memory(ops):
    x = torch.arange(8.0).view(2, 4)

    def step() -> torch.Tensor:
        kept = [x * float(i) for i in range(5)]
        for part in kept:
            (x * 100.0).unsqueeze(0)  # gone at once: its memory is the next one's
            kept[0] = kept[0] + part
        return kept[0]

    result, graph = ops.recorder().record(step)
    graph.replay()
    assert torch.equal(result, step())


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.softmax(-1),
        lambda x: x + x[:1],  # broadcast
        lambda x: x.double() * 2.0,
        lambda x: x * x,
        lambda x: x.t().reshape(-1),  # a copy
        lambda x: x * x[0, 0].item(),
        lambda x: x * float(x.tolist()[0][0]),
        lambda x: x * float(x.numpy()[0, 0]),
        lambda x: x if x[0, 0] > 0 else -x,
    ],
)
@torch.inference_mode()
def test_what_a_replay_would_miss_is_refused(ops, step):
    x = torch.ones(2, 4)
    with pytest.raises(CannotRecord):
        ops.recorder().record(lambda: step(x))
    assert torch.equal(ops.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))  # it computes again
