"""On a GPU a step lets the host wait for nothing but its result: what would wait there is an error here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tensors of the CPU stand for those of a GPU", allow_module_level=True)
from kernels import normal
from test_cuda_graph import on_a_device
from tiny_models import TINY

from nanovllm import LLM, SamplingParams
from nanovllm.layers.sampler import sample
from nanovllm.ops.torch_sampling import TorchSampling
from nanovllm.ops.triton_sampling import TritonSampling
from nanovllm.sample_row import PENDING, SampleRow

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's
aten = torch.ops.aten
# how many numbers there are in the result, or what the host does next, depends on what the device has found
ASKS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default),
    aten.repeat_interleave.Tensor,
}
COPIES = {
    *(torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist),
    *(torch.tensor, torch.as_tensor, torch.asarray),
}


class Waits(AssertionError):
    pass


def elsewhere() -> bool:
    """Neither in transfer.py, whose copies are asynchronous, nor in Triton's interpreter, which stands for the GPU."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith("nanovllm/transfer.py") or "/triton/" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return True


class Copies(TorchFunctionMode):
    """Between the host and the device, of which one waits for the other."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        index = args[1] if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) else None
        if function in COPIES or (function is torch.Tensor.to and moves(*args[1:], *kwargs.values())):
            problem = function.__name__
        else:
            problem = index_of_hosts(index if isinstance(index, tuple) else (index,), args[2:])
        if problem and elsewhere():
            raise Waits(problem)
        return function(*args, **kwargs)


def index_of_hosts(parts: tuple, values: tuple) -> str | None:
    """An index that goes to the device; or by the device's own, a number that does."""
    if any(isinstance(part, (list, np.ndarray)) for part in parts):
        return "an index of the host's"
    by_tensor = any(isinstance(part, torch.Tensor) for part in parts)
    return "a number of the host's" if by_tensor and not all(isinstance(v, torch.Tensor) for v in values) else None


def moves(*args) -> bool:
    return any(isinstance(arg, (str, torch.device)) for arg in args)


class Asks(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (func in ASKS or masked) and elsewhere():
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


def from_numpy(array, plain=torch.from_numpy):
    """Which no mode sees."""
    if elsewhere():
        raise Waits("from_numpy")
    return plain(array)


@contextmanager
def no_waiting() -> Iterator[None]:
    with mock.patch.object(torch, "from_numpy", from_numpy), Asks(), Copies():
        yield


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cuda"),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: bool(x[0] > 0),
        lambda x: float(x[0]),
        lambda x: range(int(x[0])),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x.__setitem__([0], 0.0),
        lambda x: x.__setitem__(torch.arange(2), 0.0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1, 2]),
        lambda x: torch.from_numpy(np.zeros(2)),
    ],
)
def test_what_waits_is_noticed(wait):
    with pytest.raises(Waits), no_waiting():
        wait(torch.ones(3))


def make_row(index, prompt=(1, 2, 3), output=(5, 6, 7), stop_ids=(), bad_words=(), **params) -> SampleRow:
    prompt, output = (np.array(ids, dtype=np.int32) for ids in (prompt, output))
    return SampleRow(SamplingParams(**params), 3, index, prompt, output, stop_ids, bad_words)


WAYS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"typical_p": 0.5, "top_k": 20, "temperature": 1.5},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 0.9, "frequency_penalty": 0.4},
    {"stop_ids": (4, 9)},
    {"bad_words": ((7, 11), (6, 7, 12), (6, 8, 13), (14,), (9, 7, 15))},
    {"logit_bias": {3: 4.0, 8: -3.0}},
    {"allowed_token_ids": [2, 3, 5, 8, 13, 21]},
    {"allowed_token_ids": [7], "stop_ids": (7,)},
    {"logprobs": 0},
    {"logprobs": 5, "top_p": 0.9},
    {"logprobs": -1, "temperature": 0.0},
]


@pytest.mark.parametrize("ways", [*([way] for way in WAYS), WAYS], ids=str)
def test_no_way_to_sample_waits(ways):
    """And it gives what torch's sampling does, whose every line may wait. Tokens that the host does not know, as the
    step before has not come back, are looked up; where it knows them the result is the same."""
    rows = [make_row(i, **way) for i, way in enumerate(ways)]
    pending = [replace(row, output=np.array([5, 6, PENDING], np.int32)) for row in rows]
    logits, last = normal(len(rows), 40) * 2, torch.full((len(rows),), 7)
    with no_waiting():
        drawn = [
            sample(logits.clone(), rows, TritonSampling()),
            sample(logits.clone(), pending, TritonSampling(), last),
        ]
    drawn.append(sample(logits.clone(), pending, TorchSampling(), last))
    wanted, logprobs = read(sample(logits.clone(), rows, TorchSampling()))
    for other in drawn:
        found, others = read(other)
        assert found.tolist() == wanted.tolist()
        for one, theirs in zip(others, logprobs, strict=True):
            assert (one is None) == (theirs is None)
            if one is not None:
                assert one.token_ids.tolist() == theirs.token_ids.tolist() and one.rank == theirs.rank
                np.testing.assert_allclose(one.logprobs, theirs.logprobs, rtol=1e-5)


def read(drawn):
    return drawn.to_host(lambda *found: found).result()


USUAL = ("llama", "granite-hybrid", "mixtral")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in USUAL else pytest.mark.slow) for f in TINY])
def test_no_step_waits(tiny_model, family):
    """Prompts in chunks beside decodes, and all that may be asked of a row and of a prompt."""
    params = [
        SamplingParams(seed=1, max_tokens=3, typical_p=0.7, top_k=20, logprobs=2),
        SamplingParams(seed=2, max_tokens=3, logit_bias={3: 4.0}, repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(seed=3, max_tokens=3, allowed_token_ids=range(2, 90), min_tokens=3, prompt_logprobs=2),
    ]
    prompts, found = [[7 + i] * (3 + 9 * i) for i in range(3)], []
    options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "kvcache_memory": "8MiB"}
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 16}
    for makers in (("torch", "reference"), ("triton", "triton")):
        kernels = dict(zip(("kernels", "attention_backend"), makers, strict=True))
        with LLM(str(tiny_model(family)), **options, **sizes, **kernels) as llm:
            if found:
                on_a_device(llm)
                guard(llm.engine._executor._runner)
            found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1]


def guard(runner) -> None:
    execute = runner.execute

    def guarded(plan):
        with no_waiting():
            return execute(plan)

    runner.execute = guarded
