"""Triton's attention against a plain one in float64: interpreted on the CPU, or on the GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import CASES, CODED, DEVICE, MIXED, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import CPU, SharedPages, Step, make_batch
from test_codes import cache_of

from nanovllm.attention.alibi import Alibi
from nanovllm.attention.base import select_backend
from nanovllm.attention.codes import encode, split_pages
from nanovllm.attention.reference import ReferenceAttention
from nanovllm.attention.triton import InvariantTritonAttention, TritonAttention
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.errors import ConfigError

pytest.importorskip("triton")
import triton
import triton.language as tl
from interpreter import dots_in_order, multiply_bfloat16
from kernels import normal

from nanovllm.triton_kernels import decode_attention
from nanovllm.triton_kernels.kv_codes import codes_on, decode
from nanovllm.triton_kernels.prompt_attention import QueryTiles
from nanovllm.triton_kernels.store_kv import store_kv

BACKEND = TritonAttention()
ON_A_GPU = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="compiled")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps(case):
    case.check(BACKEND, torch.float32)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    multiply_bfloat16(monkeypatch)


@pytest.mark.parametrize("name", ["GQA", "head of 80", "window"])
def test_steps_in_float16(name):
    CASES[name].check(BACKEND, torch.float16)


QUICK = ("GQA", "71 heads of one", "head of 96", "window", "rounded alibi")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_steps_in_bfloat16(name):
    CASES[name].check(BACKEND, torch.bfloat16)


@settings(deadline=None, max_examples=8)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=4
    ),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2), (20, 1)]),
    head_dim=st.sampled_from([8, 16, 24]),
    block_size=st.sampled_from([16, 32, 128]),
    window=st.none() | st.integers(1, 80),
    bias=st.sampled_from(["none", "distance", "rounded"]),
)
def test_random_steps(sequences, heads, head_dim, block_size, window, bias):
    Case(sequences, *heads, head_dim, block_size, window, bias).check(BACKEND, torch.float32)


@pytest.mark.parametrize("sequences", [[(0, 20), (16, 3)], [(0, 20), (16, 1)]], ids=str)
def test_a_sequence_reads_pages_that_another_fills_in_the_same_step(sequences):
    SharedPages(sequences, block_size=16, device=DEVICE).check(BACKEND)


def attend(sequences, tables, q, k, v, kv, backend=BACKEND, **options) -> torch.Tensor:
    batch = make_batch(sequences, tables, kv.shape[2], backend, kv.device)
    return backend.forward(q, k, v, kv, batch, scale=q.shape[2] ** -0.5, **options)


def random_step(sequences, dtype=torch.float32, heads=4, kv_heads=2):
    step = Step(sequences, block_size=16, device=DEVICE, dtype=dtype)
    tokens = sum(new for _, new in sequences)
    qkv = step.normal(tokens, heads + 2 * kv_heads, 16)
    kv = step.normal(2, step.num_blocks, 16, kv_heads, 16)
    return step, qkv.split((heads, kv_heads, kv_heads), dim=1), kv


def test_views_of_one_matrix_and_wider_numbers_than_the_cache():
    """Models pass slices of the qkv projection, and those of wider hidden streams are rounded here."""
    step, views, kv = random_step(MIXED)
    expected = attend(step.sequences, step.tables, *(x.contiguous() for x in views), kv.clone())
    assert torch.equal(attend(step.sequences, step.tables, *views, kv.clone()), expected)
    half = attend(step.sequences, step.tables, *views, kv.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=1e-2)


def test_the_order_of_a_batch_does_not_change_its_rows():
    step, (q, k, v), kv = random_step(MIXED)
    alibi = Alibi(torch.linspace(0.05, 1.0, 4).to(DEVICE))
    together = attend(step.sequences, step.tables, q, k, v, kv.clone(), alibi=alibi)
    starts = np.cumsum([0, *(new for _, new in MIXED)])
    order = np.random.default_rng(1).permutation(len(MIXED))
    rows = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])).to(DEVICE)
    shuffled = attend(
        *([MIXED[i] for i in order], [step.tables[i] for i in order]),
        *(q[rows], k[rows], v[rows], kv.clone()),
        alibi=alibi,
    )
    assert torch.equal(shuffled, together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, ON_A_GPU])
@pytest.mark.parametrize("window", [None, 9])
def test_a_query_has_the_same_bits_alone_as_in_any_chunk(monkeypatch, dtype, window):
    if DEVICE.type == "cpu":
        dots_in_order(monkeypatch)
    backend, sequences = InvariantTritonAttention(), [(17, 1), (0, 5), (40, 1), (16, 16), (5, 61), (0, 1)]
    step, (q, k, v), kv = random_step(sequences, dtype)
    options = {"backend": backend, "window": window, "alibi": Alibi(torch.linspace(0.05, 1.0, 4).to(DEVICE))}
    together = attend(sequences, step.tables, q, k, v, kv, **options)
    first = 0
    for (context, new), table in zip(sequences, step.tables, strict=True):
        for i in {0, new // 2, new - 1}:
            row = slice(first + i, first + i + 1)
            assert torch.equal(
                attend([(context + i, 1)], [table], q[row], k[row], v[row], kv, **options), together[row]
            )
        first += new


@pytest.mark.parametrize("case", [CASES["GQA"], CASES["71 heads of one"], CASES["alibi and window"]], ids=str)
def test_invariant_steps(case):
    case.check(InvariantTritonAttention(), torch.float32)


@pytest.mark.parametrize("window", [None, 300])
def test_divided_contexts_give_what_whole_ones_give(monkeypatch, window):
    step, (q, k, v), kv = random_step([(700, 1), (0, 1), (511, 1), (0, 3), (600, 3)])
    found = {}
    for splits in (1, 3):
        monkeypatch.setattr(decode_attention, "division", lambda programs, length, splits=splits: (splits, 256))
        found[splits] = attend(step.sequences, step.tables, q, k, v, kv.clone(), window=window)
        torch.testing.assert_close(found[splits], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[1], found[3])  # they were divided


@pytest.mark.parametrize("dtype", [torch.float32, ON_A_GPU])
@pytest.mark.parametrize(("window", "codes"), [(9, False), (300, False), (300, True)])
@pytest.mark.parametrize("backend", [TritonAttention(), InvariantTritonAttention()], ids=["usual", "invariant"])
def test_pages_behind_a_window_are_given_back(backend, window, codes, dtype):
    """Page 0 takes their place, where rows that pad a step write: its values were summed as no number times zero."""
    step, (q, k, v), kv = random_step([(600, 1), (90, 5), (26, 1)], dtype)
    if codes:
        kv = cache_of(step, torch.float8_e4m3fn)
    expected = attend(step.sequences, step.tables, q, k, v, kv, backend, window=window)
    for (context, _), table in zip(step.sequences, step.tables, strict=True):
        behind = max(0, context - window + 1) // 16
        table[:behind] = [0] * behind
    if codes:
        kv[:, 0].view(torch.uint8).fill_(0xFF)
    else:
        kv[:, 0] = float("nan")
    assert torch.equal(attend(step.sequences, step.tables, q, k, v, kv, backend, window=window), expected)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_contexts_are_divided_to_fill_a_chip_and_no_more(programs, max_seq_len):
    splits, span = decode_attention.division(programs, max_seq_len)
    assert 1 <= splits <= -(-max_seq_len // span) and splits <= 64
    assert splits == 1 or splits * programs <= 8192
    if programs >= 512 and max_seq_len <= 2048:
        assert splits == 1
    if programs <= 8 and max_seq_len <= 256 * 64:
        assert splits == -(-max_seq_len // 256)


def padded(sequences: int, pages: int) -> Batch:
    """A captured step whose rows all pad it: page 0, slot 0, lengths that say nothing."""
    zeros = torch.zeros(sequences, dtype=torch.int64, device=DEVICE)
    return Batch(
        input_ids=zeros,
        positions=zeros,
        query_start=torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.zeros(sequences, dtype=torch.int32, device=DEVICE),
        slot_mapping=zeros.clone(),
        block_tables=torch.zeros(sequences, pages, dtype=torch.int32, device=DEVICE),
        state_slots=None,
        logits_rows=zeros,
        max_query_len=1,
        max_seq_len=pages * 16,
    )


@pytest.mark.parametrize("pages", [3, 200])
def test_rows_that_pad_a_captured_step_are_harmless(pages):
    """Lengths of 0 and 1 beside a sequence, with the longest context that the graph is for."""
    step, (q, k, v), kv = random_step([(40, 1)])
    kv[:, 0] = float("nan")  # what is written there may be no number
    expected = attend(step.sequences, step.tables, q, k, v, kv.clone())
    batch = padded(4, pages)
    batch.seq_lens[1:3] = torch.tensor([41, 1])
    batch.block_tables[1, :3] = torch.tensor(step.tables[0])
    batch.slot_mapping[1] = step.tables[0][2] * 16 + 8
    q, k, v = (x.repeat(4, 1, 1) for x in (q, k, v))
    out = BACKEND.forward(q, k, v, kv, batch, scale=0.25)
    torch.testing.assert_close(out[1:2], expected, rtol=1e-5, atol=1e-5)
    assert out.isfinite().all()  # of which row 2 reads what is written to slot 0 in this step


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_slots_out_of_range_are_never_written(kv_heads):
    k, v = torch.randn(2, 6, kv_heads, 80, device=DEVICE).half()
    memory = torch.zeros(2, 5, 16, kv_heads, 80, device=DEVICE, dtype=torch.half)
    slots = torch.tensor([-1, 17, 80, 10**9, -(2**40), 79], device=DEVICE)
    store_kv(k, v, memory, slots)
    expected = torch.zeros_like(memory).flatten(1, 2)
    expected[0, [17, 79]], expected[1, [17, 79]] = k[[1, 5]], v[[1, 5]]
    assert torch.equal(memory.flatten(1, 2), expected)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([16, 64, 128]),
    st.sampled_from([1, 2, 3, 71]),
)
def test_tiles_of_queries(counts, rows, group):
    """Every row of a sequence with several queries is in one tile, and the rest of the tiles is of none."""
    step = Step([(3, n) for n in counts], block_size=16)
    batch = make_batch(step.sequences, step.tables, 16, ReferenceAttention())
    sequences, starts = (x.tolist() for x in QueryTiles(batch).of(rows, group))
    expected = [i for i, n in enumerate(counts) if n > 1 for _ in range(-(-n * group // rows))]
    assert sequences[: len(expected)] == expected
    assert set(sequences[len(expected) :]) <= {len(counts)}
    assert starts == [expected.index(i) if i in expected else sum(e < i for e in expected) for i in range(len(starts))]


SPEC = PagedKVSpec(2, 64, torch.float32)


@pytest.mark.parametrize(
    ("changes", "block_size", "reason"),
    [
        ({"head_dim": 257}, 16, "head sizes up to 256, not 257; set attention_backend='reference'"),
        ({"head_dim": 257, "dtype": torch.float16}, 16, "up to 256, not 257"),
        ({"dtype": torch.float64}, 16, "no kernels for torch.float64"),
        ({}, 8, "a power of two from 16, not 8"),
        ({}, 48, "a power of two from 16, not 48"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_is_a_config_error(changes, block_size, reason):
    spec = PagedKVSpec(**{"num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32, **changes})
    with pytest.raises(ConfigError, match=f"attention_backend='triton'.*{reason}"):
        select_backend("triton", DEVICE, [SPEC, spec], block_size)
    assert select_backend("triton", DEVICE, [SPEC], 16).name == "triton"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the interpreter")
def test_the_interpreter_runs_only_for_who_asks_for_it(monkeypatch):
    import triton

    assert select_backend("auto", CPU, [SPEC], 16).name != "triton"
    assert select_backend("triton", CPU, [SPEC], 16).name == "triton"
    assert "interpreter cannot multiply bfloat16" in BACKEND.unsupported_reason(CPU, torch.bfloat16, SPEC, 16)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert BACKEND.unsupported_reason(CPU, torch.float32, SPEC, 16) == "runs on NVIDIA GPUs, not on cpu"


@pytest.mark.parametrize("name", CODED)
def test_codes(name):
    CASES[name].check_codes(BACKEND, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("GQA", torch.bfloat16), ("head of 80", torch.float16)], ids=str)
def test_codes_for_queries_of_16_bits(name, dtype):
    CASES[name].check_codes(BACKEND, dtype)


def test_codes_invariant():
    CASES["GQA"].check_codes(InvariantTritonAttention(), torch.float32)


def test_codes_are_the_nearest():
    """Where two are as near, the even one; from both sides of every step, and below the smallest normal code."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, middles, middles * (1 - 1e-6), middles * (1 + 1e-6)])
    check_stored(torch.stack([near, -near])[None])
    check_stored(normal(400, 4, 80).bfloat16())  # many of which lie in a middle, but for rounding


def check_stored(x: torch.Tensor) -> None:
    """As keys, and thrice as values."""
    x, (tokens, heads, head_dim) = x.to(DEVICE), x.shape
    kv = torch.zeros(2, -(-tokens // 16), 16, heads, head_dim + 4, dtype=torch.float8_e4m3fn, device=DEVICE)
    store_kv(x, 3 * x, kv, torch.arange(tokens, device=DEVICE))
    pages, scales = (part.flatten(1, 2)[:, :tokens] for part in split_pages(kv))
    for i, values in enumerate((x, 3 * x)):
        wanted, scale = encode(values, torch.float8_e4m3fn)
        assert torch.equal(pages[i].contiguous().view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(scales[i], scale)


@triton.jit
def decode_kernel(codes, out, count, N: tl.constexpr, CODES: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, decode(tl.load(codes + place, place < count, 0), out.dtype.element_ty, CODES), place < count)


def test_every_code_is_read_as_what_it_stands_for():
    """But for those that are no number, which no key or value becomes."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes = codes[codes & 0x7F != 0x7F]
    found = torch.empty(len(codes), dtype=torch.float16, device=DEVICE)
    how = codes_on(DEVICE)
    decode_kernel[(1,)](codes, found, len(codes), 256, how)
    assert torch.equal(found.float() * (256 if how == "computed" else 1), codes.view(torch.float8_e4m3fn).float())
