"""A recorded step gives what the step gives, on what its inputs hold by then."""

import pytest
import torch
from kernels import native_library

from nanovllm.ops.graph import CannotRecord, StepSizes
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


@torch.inference_mode()
def test_a_replay_is_of_any_size_up_to_the_recorded_one(ops, threads):
    """Tokens and rows that are sampled are told apart; what is behind a smaller step's rows stays as it was."""
    torch.manual_seed(0)
    weight, norm = ops.pack(torch.randn(64, 64), gated=False), torch.rand(64)
    x, chosen, largest = torch.randn(40, 64), torch.arange(9), StepSizes(40, 8, 9)

    def step(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        y = ops.linear(ops.rms_norm(x.unflatten(1, (4, 16)), norm[:16], 1e-6).flatten(1), weight, 64, None) + x
        return (ops.gather(y, rows) * 0.5).clamp(-1.0, 1.0)

    result, graph = ops.recorder().record(lambda: step(x, chosen))
    graph.fit(largest)
    for sizes in (largest, StepSizes(7, 3, 2), StepSizes(1, 1, 1), StepSizes(33, 8, 0), StepSizes(40, 1, 8), largest):
        tokens, _, sampled = sizes
        threads(1 + tokens % 2)
        x.normal_()
        chosen[:sampled] = torch.randint(tokens, (sampled,))
        expected, behind = step(x[:tokens], chosen[:sampled]), result[sampled:].clone()
        graph.resize(sizes)
        graph.replay()
        assert torch.equal(result[:sampled], expected) and torch.equal(result[sampled:], behind)


@pytest.mark.parametrize("rows", [1, 7, 80])
@torch.inference_mode()
def test_calls_over_other_rows_do_not_fit(ops, rows):
    x, weight = torch.ones(rows, 4), torch.ones(4)
    _, graph = ops.recorder().record(lambda: ops.rms_norm(x, weight, 1e-6) + x)
    with pytest.raises(CannotRecord, match="other rows"):
        graph.fit(StepSizes(40, 8, 9))


@torch.inference_mode()
def test_memory_that_is_not_there_is_no_failure_of_a_step(ops):
    with pytest.raises(CannotRecord, match="memory"):
        ops.recorder().record(lambda: torch.empty(1 << 50, 64))


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
