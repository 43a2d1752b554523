"""Every attention backend against a plain one in float64 that knows no pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.attention import base
from nanovllm.attention.alibi import Alibi, alibi_slopes
from nanovllm.attention.base import load_backend, select_backend
from nanovllm.attention.cpu import CPUAttention
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.engine.runner.batch_builder import build_batch
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.errors import ConfigError

BACKENDS = {"cpu": CPUAttention, "reference": ReferenceAttention}
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = [torch.float32, torch.bfloat16]


def plain_attention(q, keys, values, position, scale, window, bias) -> np.ndarray:
    """One head's query q [D] at `position` over keys and values [L, D] of its sequence, in float64."""
    first = 0 if window is None else max(0, position - window + 1)
    scores = [scale * float(q @ keys[j]) + bias[j] for j in range(first, position + 1)]
    weights = np.exp(np.array(scores) - max(scores))
    return weights @ values[first : position + 1] / weights.sum()


def pages_needed(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def make_batch(
    sequences: list[tuple[int, int]], tables: list[list[int]], block_size: int, backend, device: torch.device = CPU
) -> Batch:
    """sequences: (tokens in the cache before the step, tokens of the step)."""
    planned = [
        PlannedSequence(i, np.arange(new, dtype=np.int32), start, table, state_slot=0, sample=None)
        for i, ((start, new), table) in enumerate(zip(sequences, tables, strict=True))
    ]
    return build_batch(StepPlan(planned), block_size=block_size, device=device, backend=backend, with_states=False)


@dataclass
class Step:
    """A random step: caches full of garbage but for the sequences' own context."""

    sequences: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = 0
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.tables = self.shuffled_tables()

    def shuffled_tables(self) -> list[list[int]]:
        counts = [pages_needed(start + new, self.block_size) for start, new in self.sequences]
        self.num_blocks = sum(counts) + 4
        pages = iter((self.random.permutation(self.num_blocks - 1) + 1).tolist())
        return [[next(pages) for _ in range(count)] for count in counts]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.standard_normal(shape)).to(self.dtype).to(self.device)

    def check(self, backend, *, scale=None, window=None, alibi=None) -> None:
        scale = self.head_dim**-0.5 if scale is None else scale
        spec = PagedKVSpec(self.kv_heads, self.head_dim, self.dtype, window)
        tokens = sum(new for _, new in self.sequences)
        q = self.normal(tokens, self.heads, self.head_dim)
        k, v = (self.normal(tokens, self.kv_heads, self.head_dim) for _ in range(2))
        kv = self.normal(*backend.kv_shape(spec, self.num_blocks, self.block_size)) * 3
        before = kv.clone()
        batch = make_batch(self.sequences, self.tables, self.block_size, backend, self.device)
        arguments = q.clone(), k.clone(), v.clone()
        out = backend.forward(*arguments, kv, batch, scale=scale, window=window, alibi=alibi)
        assert out.shape == q.shape and out.dtype == q.dtype
        for given_to, original in zip(arguments, (q, k, v), strict=True):
            assert torch.equal(given_to, original)
        before, kv, q, k, v, out = (x.cpu() for x in (before, kv, q, k, v, out))
        self.check_writes(before, kv, k, v)
        alibi = None if alibi is None else replace(alibi, slopes=alibi.slopes.cpu())
        expected = self.expected(before, q, k, v, scale, window, alibi)
        limit = TOLERANCE[self.dtype]
        np.testing.assert_allclose(out.double().numpy(), expected, rtol=limit, atol=limit)

    def new_tokens(self):
        """(row, sequence, position) of each token of the step."""
        row = 0
        for i, (start, new) in enumerate(self.sequences):
            for position in range(start, start + new):
                yield row, i, position
                row += 1

    def check_writes(self, before, after, k, v) -> None:
        """The step's tokens lie in their slots, and every other slot is as it was."""
        for row, i, position in self.new_tokens():
            page, offset = self.tables[i][position // self.block_size], position % self.block_size
            before[0, page, offset], before[1, page, offset] = k[row], v[row]
        assert torch.equal(before, after)

    def expected(self, kv, q, k, v, scale, window, alibi) -> np.ndarray:
        """kv: the cache with the step's tokens in it, made by `check_writes`."""
        q = q.double().numpy()
        out = np.empty_like(q)
        for row, i, position in self.new_tokens():
            keys, values = (
                half[self.tables[i]].reshape(-1, self.kv_heads, self.head_dim).double().numpy() for half in kv
            )
            bias = np.zeros((self.heads, position + 1))
            if alibi is not None:
                bias = alibi.bias(torch.arange(position + 1), torch.tensor([position]))[:, 0].numpy()
            for head in range(self.heads):
                kv_head = head // (self.heads // self.kv_heads)
                out[row, head] = plain_attention(
                    q[row, head], keys[:, kv_head], values[:, kv_head], position, scale, window, bias[head]
                )
        return out


MIXED = [(17, 1), (0, 5), (8, 3), (40, 1), (0, 1), (0, 16), (16, 16), (5, 21), (0, 16), (7, 1), (64, 64)]
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def backend(request):
    return request.param()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_mixed_batches(backend, heads, block_size, dtype):
    """Decodes, chunks with and without context, and whole prompts in one step."""
    Step(MIXED, *heads, block_size=block_size, dtype=dtype).check(backend)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(backend, head_dim, dtype):
    Step(MIXED, head_dim=head_dim, dtype=dtype).check(backend)


@pytest.mark.parametrize("window", [1, 2, 8, 17, 1000])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_sliding_window(backend, heads, window):
    Step(MIXED, *heads).check(backend, window=window)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_alibi(backend, heads, window):
    alibi = Alibi(alibi_slopes(heads[0]), factor=0.5)
    Step(MIXED, *heads).check(backend, window=window, alibi=alibi)


def test_rounded_alibi_steps_with_the_key_in_bfloat16(backend):
    """Falcon's: beyond 256 tokens bfloat16 cannot tell neighbouring positions apart."""
    alibi = Alibi(alibi_slopes(4), rounded=True, factor=0.25)
    bias = alibi.bias(torch.arange(600), torch.tensor([599]))
    assert bias.shape == (4, 1, 600) and bias[0, 0, 512] == bias[0, 0, 513] != bias[0, 0, 520]
    Step([(0, 600), (599, 1), (300, 200)]).check(backend, alibi=alibi)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 71])
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt

    slopes = alibi_slopes(heads)
    torch.testing.assert_close(slopes, bloom(torch.ones(1, 2), heads, torch.float32)[:, 0, 1])
    torch.testing.assert_close(slopes, -mpt(heads, 2)[:, 0, 0])
    torch.testing.assert_close(alibi_slopes(heads, 4.0), -mpt(heads, 2, 4)[:, 0, 0])


def test_alibi_in_bfloat16(backend):
    Step(MIXED, dtype=torch.bfloat16).check(backend, alibi=Alibi(torch.tensor([0.5, 0.25, 0.125, 0.0625])))


@pytest.mark.parametrize("scale", [0.01, 0.5])
def test_scale(backend, scale):
    Step(MIXED).check(backend, scale=scale)


@pytest.mark.parametrize(
    "sequences",
    [
        [(0, 1)],
        [(0, 1), (0, 1)],
        [(0, 1), (9, 1)],
        [(7, 1), (8, 1), (15, 1), (16, 1)],
        [(0, 8), (0, 8)],
        [(0, 8), (3, 8), (8, 8)],
        [(0, 5), (3, 5), (0, 5)],
    ],
    ids=str,
)
def test_steps_of_one_kind(backend, sequences):
    """Sequences with equally many tokens in the step, with and without context."""
    Step(sequences).check(backend)
    Step(sequences).check(backend, window=3)


sequence_lists = st.lists(
    st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 30))), min_size=1, max_size=6
)


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    sequences=sequence_lists,
    heads=st.sampled_from(list(HEADS.values())),
    head_dim=st.sampled_from([16, 32, 64]),
    block_size=st.sampled_from([8, 16, 64]),
    window=st.none() | st.integers(1, 40),
    with_alibi=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_steps(name, sequences, heads, head_dim, block_size, window, with_alibi, seed):
    step = Step(sequences, *heads, head_dim=head_dim, block_size=block_size, seed=seed)
    alibi = Alibi(torch.linspace(0.05, 1.0, heads[0])) if with_alibi else None
    step.check(BACKENDS[name](), window=window, alibi=alibi)


class SharedPages(Step):
    """The second sequence's first pages are the first one's, which are written in this very step."""

    def shuffled_tables(self) -> list[list[int]]:
        tables = super().shuffled_tables()
        shared = self.sequences[1][0] // self.block_size
        tables[1][:shared] = tables[0][:shared]
        return tables


@pytest.mark.parametrize(
    "sequences",
    [[(0, 20), (16, 3)], [(0, 20), (16, 1)], [(8, 8), (16, 20)], [(8, 16), (16, 16)], [(15, 1), (16, 1)]],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 10])
def test_a_sequence_reads_pages_that_another_fills_in_the_same_step(backend, sequences, window):
    SharedPages(sequences).check(backend, window=window)


def test_the_reader_may_come_before_the_writer(backend):
    """Tokens of all sequences are stored before any attends, whatever their order in the batch."""

    class ReaderFirst(Step):
        def shuffled_tables(self) -> list[list[int]]:
            tables = super().shuffled_tables()
            tables[0][:2] = tables[1][:2]
            return tables

    ReaderFirst([(16, 3), (0, 20)]).check(backend)


def test_a_sequence_is_the_same_alone_and_in_a_batch(backend):
    """Up to rounding; other sequences' tokens and pages must not leak in."""
    step = Step(MIXED, seed=1)
    tokens = sum(new for _, new in MIXED)
    q, k, v = step.normal(tokens, 4, 16), step.normal(tokens, 2, 16), step.normal(tokens, 2, 16)
    kv = step.normal(2, step.num_blocks, 8, 2, 16)
    together = backend.forward(q, k, v, kv.clone(), make_batch(MIXED, step.tables, 8, backend), scale=0.25)
    row = 0
    for sequence, table in zip(MIXED, step.tables, strict=True):
        mine = slice(row, row + sequence[1])
        batch = make_batch([sequence], [table], 8, backend)
        alone = backend.forward(q[mine], k[mine], v[mine], kv.clone(), batch, scale=0.25)
        torch.testing.assert_close(alone, together[mine], rtol=1e-5, atol=1e-5)
        row = mine.stop


def test_queries_that_are_views_of_one_matrix(backend):
    """Models pass slices of the qkv projection, which are not contiguous."""
    step = Step([(3, 1), (0, 9), (5, 1)])
    qkv = step.normal(11, 8, 16)
    views = qkv.split((4, 2, 2), dim=1)
    batch = make_batch(step.sequences, step.tables, 8, backend)
    kv = step.normal(2, step.num_blocks, 8, 2, 16)
    expected = backend.forward(*(x.contiguous() for x in views), kv.clone(), batch, scale=0.25)
    torch.testing.assert_close(backend.forward(*views, kv.clone(), batch, scale=0.25), expected)


def test_selection(monkeypatch):
    """Of the native one, where it was built: test_native_attention.py; of those for GPUs: test_flash_attention.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = PagedKVSpec(2, 64, torch.float16)
    assert select_backend("auto", CPU, [spec], 16).name == "cpu"
    assert select_backend("auto", torch.device("cuda"), [spec], 16).name == "reference"
    for device in (CPU, torch.device("cuda")):
        assert select_backend("reference", device, [spec], 16).name == "reference"


@pytest.mark.parametrize("name", base._BACKENDS)
def test_backends_are_found_by_name(name):
    assert load_backend(name).name == name.split(",")[0]


def test_a_backend_that_cannot_serve_is_a_config_error_with_the_reason():
    with pytest.raises(ConfigError, match=r"attention_backend='cpu'.*cuda"):
        select_backend("cpu", torch.device("cuda"), [PagedKVSpec(2, 64, torch.float16)], 16)
