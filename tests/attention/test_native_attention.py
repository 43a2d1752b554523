"""Native attention: right against float64, and the same bits however the work is cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import native_library
from test_backends import CPU, MIXED, make_batch, pages_needed, plain_attention

from nanovllm.attention import base
from nanovllm.attention.alibi import Alibi, alibi_slopes
from nanovllm.attention.base import select_backend
from nanovllm.attention.codes import encode
from nanovllm.attention.native import NativeAttention
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.errors import ConfigError
from nanovllm.ops import library

native_library()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.int8: 1e-3}  # by what pages hold


class Case:
    """Sequences of (context, new) tokens with their queries, keys and values, and a cache of garbage."""

    def __init__(self, sequences, heads=6, kv_heads=2, head_dim=24, block_size=16, dtype=torch.float32, seed=0):
        self.sequences, self.block_size, self.dtype = sequences, block_size, dtype
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        random = np.random.default_rng(seed)
        counts = [pages_needed(sum(s), block_size) for s in sequences]
        pages = iter((random.permutation(sum(counts)) + 1).tolist())
        self.tables = [[next(pages) for _ in range(count)] for count in counts]
        codes = torch.int8 if dtype == torch.int8 else None
        self.spec = PagedKVSpec(kv_heads, head_dim, torch.bfloat16 if codes else dtype, codes=codes)
        shape = NativeAttention().kv_shape(self.spec, sum(counts) + 1, block_size)
        if codes:  # scales may be anything
            self.garbage = torch.from_numpy(random.integers(-128, 128, shape, dtype=np.int8))
        else:
            self.garbage = torch.from_numpy(random.standard_normal(shape) * 3).to(dtype)

        def rows(count, heads):
            return torch.from_numpy(random.standard_normal((count, heads, head_dim))).float()

        # q, k and v as they come from a fused projection: heads side by side, tokens apart
        self.qkv = [rows(sum(s), heads + 2 * kv_heads) for s in sequences]

    def run(self, which, *, cuts=None, company=True, **options) -> list[torch.Tensor]:
        """Outputs of the new tokens of the chosen sequences. cuts: sizes of the steps before and of the
        new tokens; by default the context is one step and the new tokens are another."""
        backend, kv = NativeAttention(), self.garbage.clone()
        outs = {i: [] for i in which}
        todo = {i: list(cuts or self.sequences[i]) for i in which}
        at = dict.fromkeys(which, 0)
        while any(todo.values()):
            step = [(i, todo[i].pop(0)) for i in which if todo[i]]
            step = [(i, n) for i, n in step if n]
            for part in [step] if company else [[one] for one in step]:
                if not part:
                    continue
                batch = make_batch(
                    [(at[i], n) for i, n in part],
                    [self.tables[i][: pages_needed(at[i] + n, self.block_size)] for i, n in part],
                    self.block_size,
                    backend,
                )
                qkv = torch.cat([self.qkv[i][at[i] : at[i] + n] for i, n in part])
                q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
                out = backend.forward(q, k, v, kv, batch, scale=self.head_dim**-0.5, **options)
                for (i, n), rows in zip(part, out.split([n for _, n in part]), strict=True):
                    outs[i].append(rows)
                    at[i] += n
        return [torch.cat(outs[i])[-self.sequences[i][1] :] for i in which]

    def rounded(self, qkv: torch.Tensor) -> torch.Tensor:
        """What is left of q, k and v, but for q beside int8 pages."""
        if self.dtype != torch.int8:
            return qkv.to(self.dtype)
        codes, scales = encode(qkv[:, self.heads :], torch.int8)
        return torch.cat([qkv[:, : self.heads], codes * scales[..., None]], dim=1)

    def check(self, *, window=None, alibi=None) -> None:
        found = self.run(range(len(self.sequences)), window=window, alibi=alibi)
        rounded = [self.rounded(x).double().numpy() for x in self.qkv]
        for i, (context, new) in enumerate(self.sequences):
            q, k, v = np.split(rounded[i], [self.heads, self.heads + self.kv_heads], axis=1)
            expected = np.empty((new, self.heads, self.head_dim))
            for row, position in enumerate(range(context, context + new)):
                bias = np.zeros((self.heads, position + 1))
                if alibi is not None:
                    bias = alibi.bias(torch.arange(position + 1), torch.tensor([position]))[:, 0].double().numpy()
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    expected[row, head] = plain_attention(
                        *(q[position, head], k[:, kv_head], v[:, kv_head], position),
                        *(self.head_dim**-0.5, window, bias[head]),
                    )
            limit = TOLERANCE[self.dtype]
            np.testing.assert_allclose(found[i].numpy(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1), (71, 1)], ids=str)
def test_mixed_batches(level, heads, dtype):
    Case(MIXED, *heads, dtype=dtype).check()


@pytest.mark.parametrize("head_dim", [2, 10, 16, 18, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_sizes(level, head_dim, dtype):
    Case(MIXED, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("window", [1, 2, 17, 250, 1000])
@pytest.mark.parametrize("block_size", [16, 64])
def test_sliding_window(level, window, block_size):
    Case([*MIXED, (300, 40), (0, 280), (600, 1)], block_size=block_size).check(window=window)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_alibi(level, rounded, dtype):
    alibi = Alibi(alibi_slopes(6), rounded=rounded, factor=0.5)
    Case([*MIXED, (520, 1)], dtype=dtype).check(alibi=alibi)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_do_not_depend_on_company_cuts_or_threads(level, threads, dtype):
    sequences = [(0, 700), (0, 300), (299, 1), (0, 33), (1200, 1), (0, 1), (15, 2)]
    case, every = Case(sequences, dtype=dtype), range(len(sequences))
    for options in ({}, {"window": 70}, {"alibi": Alibi(alibi_slopes(6))}):
        together = case.run(every, **options)
        for count in (1, 2):
            threads(count)
            alone = case.run(every, company=False, **options)
            again = case.run(every[::-1], **options)[::-1]
            chunks = case.run([0], cuts=[17, 1, 255, 256, 100, 71], **options)
            assert all(map(torch.equal, alone, together))
            assert all(map(torch.equal, again, together))
            assert torch.equal(chunks[0], together[0])
        decoded = case.run([3], cuts=[1] * 33, **options)
        assert torch.equal(decoded[0], together[3])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (3, 1), (6, 2), (5, 5), (16, 1)]),
    st.integers(1, 40).map(lambda n: 2 * n),
    st.sampled_from([16, 32, 128]),
    st.none() | st.integers(1, 80),
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 99),
)
def test_random_steps(sequences, heads, head_dim, block_size, window, dtype, seed):
    Case(sequences, *heads, head_dim, block_size, dtype, seed).check(window=window)


def test_a_value_beside_the_last_token_is_cleared():
    """It is read with weight zero: were it NaN, so would be the result."""
    case = Case([(0, 5)], dtype=torch.bfloat16)
    case.garbage.fill_(float("nan"))
    assert case.run([0])[0].isfinite().all()


@pytest.mark.parametrize(("block_size", "chosen"), [(16, "native"), (8, "cpu"), (64, "native")])
def test_it_is_chosen_where_it_runs(block_size, chosen):
    assert select_backend("auto", CPU, [PagedKVSpec(2, 64, torch.bfloat16)], block_size).name == chosen
    assert select_backend("auto", CPU, [PagedKVSpec(2, 64, torch.float16)], block_size).name == "cpu"


@pytest.mark.parametrize("head_dim", [17, 258])
def test_head_sizes_that_it_does_not_take(head_dim, caplog):
    """Where it was asked for; else torch attends, in all layers, though others have heads that it takes."""
    specs = [PagedKVSpec(2, size, torch.bfloat16) for size in (64, head_dim)]
    with pytest.raises(ConfigError, match=f"attention_backend='native'.* not {head_dim}; set attention_backend='cpu'"):
        select_backend("native", CPU, specs, 16)
    caplog.set_level("INFO", base.logger.name)
    assert select_backend("auto", CPU, specs, 16).name == "cpu"
    assert caplog.messages == [f"attention cpu: native: takes even head sizes up to 256, not {head_dim}"]


def test_without_the_library_torch_attends(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_PATH", tmp_path / "none.so")
    library.library_or_reason.cache_clear()
    try:
        assert select_backend("auto", CPU, [PagedKVSpec(2, 64, torch.bfloat16)], 16).name == "cpu"
    finally:
        library.library_or_reason.cache_clear()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_only_the_slots_of_a_step_are_written(level, dtype):
    """By bytes: those of its tokens, and in bfloat16 perhaps what shares a word with the last one's values."""
    case, backend = Case([(0, 21)], dtype=dtype, block_size=32), NativeAttention()
    kv, written = case.garbage.clone(), torch.zeros(case.garbage.nbytes, dtype=torch.bool)
    for seed in range(3):  # a byte may be what it was by chance
        torch.manual_seed(seed)
        k, v = torch.randn(2, 21, case.kv_heads, case.head_dim)
        batch = make_batch([(0, 21)], case.tables, 32, backend)
        backend.forward(torch.randn(21, case.heads, case.head_dim), k, v, kv, batch, scale=1.0)
        written |= (kv.view(torch.uint8) != case.garbage.view(torch.uint8)).flatten()
    words = 21 * 2 * case.kv_heads * case.spec.row * case.spec.stored.itemsize
    beside = case.kv_heads * case.head_dim * 2 if dtype == torch.bfloat16 else 0
    assert 0.9 * words < written.sum() <= words + beside
