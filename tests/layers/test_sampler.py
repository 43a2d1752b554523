"""The sampler against a plain one: pure Python, float64, one row and one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import sampling_makers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanovllm.layers import sampler
from nanovllm.layers.sampler import uniforms
from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams


@pytest.fixture(autouse=True, scope="module", params=sampling_makers())
def ops(request):
    plain = sampler.sample

    def sample(logits, rows):
        return plain(logits, rows, request.param).to_host(lambda *found: found).result()

    with mock.patch.object(sampler, "sample", sample):
        yield request.param


def make_row(seed=0, index=0, prompt=(), output=(), stop_ids=(), bad_words=(), **params) -> SampleRow:
    return SampleRow(
        SamplingParams(**params),
        seed=seed,
        index=index,
        prompt=np.array(prompt, dtype=np.int32),
        output=np.array(output, dtype=np.int32),
        stop_ids=tuple(stop_ids),
        bad_words=tuple(tuple(word) for word in bad_words),
    )


# --- the plain sampler ---------------------------------------------------------------------


def clearly_less(a: float, b: float) -> bool:
    """a < b, where the fp32 implementation must agree: examples that rounding decides are dropped."""
    assume(a == b or abs(a - b) > 1e-4 * max(abs(a), abs(b)))
    return a < b


def plain_candidates(row: SampleRow, vocab_size: int) -> list[int]:
    allowed = list(range(vocab_size))
    if row.params.allowed_token_ids is not None:
        allowed = sorted(set(row.params.allowed_token_ids))
    output = row.output.tolist()
    banned = set(row.stop_ids)
    for *start, last in row.bad_words:
        if not start or output[-len(start) :] == start:
            banned.add(last)
    # bans that leave nothing give way; allowed_token_ids never does
    return [t for t in allowed if t not in banned] or allowed


def plain_logits(logits: list[float], row: SampleRow) -> list[float]:
    params, logits = row.params, list(logits)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    output = row.output.tolist()
    for token in set(row.prompt.tolist()) | set(output):
        if logits[token] > 0:
            logits[token] /= params.repetition_penalty
        else:
            logits[token] *= params.repetition_penalty
    for token, count in Counter(output).items():
        logits[token] -= count * params.frequency_penalty + params.presence_penalty
    return logits


def plain_probs(scaled: dict[int, float]) -> dict[int, float]:
    top = max(scaled.values())
    weights = {t: math.exp(x - top) for t, x in scaled.items()}
    total = math.fsum(weights.values())
    return {t: w / total for t, w in weights.items()}


def plain_truncate(scaled: dict[int, float], params: SamplingParams) -> dict[int, float]:
    """min_p, top_k, top_p, typical_p in turn, each over what the one before left."""
    probs = plain_probs(scaled)
    floor = params.min_p * max(probs.values())
    scaled = {t: x for t, x in scaled.items() if not clearly_less(probs[t], floor)}

    if 0 < params.top_k < len(scaled):
        smallest = sorted(scaled.values(), reverse=True)[params.top_k - 1]
        scaled = {t: x for t, x in scaled.items() if x >= smallest}

    if params.top_p < 1:
        probs, mass = plain_probs(scaled), 0.0
        for token in sorted(scaled, key=lambda t: -scaled[t]):
            mass += probs[token]
            if not clearly_less(mass, params.top_p):
                break
        scaled = {t: x for t, x in scaled.items() if x >= scaled[token]}

    if params.typical_p < 1:
        probs, mass = plain_probs(scaled), 0.0
        entropy = -sum(p * math.log(p) for p in probs.values() if p > 0)
        distance = {t: abs(-math.log(p) - entropy) if p > 0 else math.inf for t, p in probs.items()}
        for token in sorted(scaled, key=lambda t: distance[t]):
            mass += probs[token]
            if not clearly_less(mass, params.typical_p):
                break
        tied = scaled[token]
        # another logit at the very same distance: rounding decides, not the test
        assume(all(x == tied or abs(distance[t] - distance[token]) > 1e-4 for t, x in scaled.items()))
        scaled = {t: x for t, x in scaled.items() if distance[t] <= distance[token] or x == tied}
    return scaled


def plain_distribution(logits: list[float], row: SampleRow) -> list[float]:
    """The probability of each token."""
    candidates = plain_candidates(row, len(logits))
    changed = plain_logits(logits, row)
    if row.params.temperature < 1e-5:
        best = max(candidates, key=lambda t: (changed[t], -t))
        return [float(t == best) for t in range(len(logits))]
    scaled = {t: changed[t] / row.params.temperature for t in candidates}
    probs = plain_probs(plain_truncate(scaled, row.params))
    return [probs.get(t, 0.0) for t in range(len(logits))]


def plain_draw(distribution: list[float], u: float) -> int:
    """The token whose stretch of the cumulative mass, in order of the vocabulary, holds u."""
    mass = 0.0
    for token, p in enumerate(distribution):
        mass += p
        assume(p == 0 or abs(u - mass) > 1e-4)
        if u < mass:
            return token
    raise AssertionError("the mass is below u")


# --- strategies ----------------------------------------------------------------------------

# Multiples of an eighth are exact in fp32 and give many ties.
eighths = st.integers(-16, 16).map(lambda n: n / 8)


@st.composite
def logits_rows(draw, vocab_size: int) -> list[float]:
    spread = draw(st.sampled_from([1, 2, 6, 24]))
    quarters = st.integers(-spread, spread).map(lambda n: n / 4)
    return draw(st.lists(quarters, min_size=vocab_size, max_size=vocab_size))


@st.composite
def sample_rows(draw, vocab_size: int) -> SampleRow:
    tokens = st.integers(0, vocab_size - 1)

    def sometimes(strategy, otherwise):
        return draw(st.one_of(st.just(otherwise), strategy))

    share = st.floats(0.05, 0.99)
    return make_row(
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        index=draw(st.integers(0, 5000)),
        prompt=draw(st.lists(tokens, min_size=1, max_size=5)),
        output=draw(st.lists(tokens, max_size=5)),
        stop_ids=sometimes(st.lists(tokens, max_size=3), ()),
        bad_words=sometimes(st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=3), ()),
        temperature=draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.3, 5.0))),
        top_k=sometimes(st.integers(1, vocab_size + 2), 0),
        top_p=sometimes(share, 1.0),
        min_p=sometimes(st.one_of(st.just(1.0), st.floats(0.01, 0.9)), 0.0),
        typical_p=sometimes(share, 1.0),
        repetition_penalty=sometimes(st.sampled_from([0.5, 0.8, 1.25, 2.0]), 1.0),
        presence_penalty=sometimes(eighths, 0.0),
        frequency_penalty=sometimes(eighths, 0.0),
        logit_bias=sometimes(st.dictionaries(tokens, eighths, max_size=3), None),
        allowed_token_ids=sometimes(st.lists(tokens, min_size=1, max_size=vocab_size), None),
        logprobs=sometimes(st.integers(-1, vocab_size), None),
    )


@st.composite
def batches(draw, max_rows: int = 5) -> tuple[torch.Tensor, list[SampleRow]]:
    vocab_size = draw(st.sampled_from([1, 2, 5, 16]))
    size = draw(st.integers(1, max_rows))
    rows = [draw(sample_rows(vocab_size)) for _ in range(size)]
    return torch.tensor([draw(logits_rows(vocab_size)) for _ in range(size)]), rows


# --- tests ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(batches(max_rows=1))
def test_every_stretch_of_the_distribution_is_the_plain_one(batch):
    """The row is drawn at both ends and in the middle of each token's stretch of the mass, which
    pins down what can be drawn and how likely it is."""
    logits, (row,) = batch
    distribution = plain_distribution(logits[0].tolist(), row)
    probes, expected, mass = [], [], 0.0
    for token, p in enumerate(distribution):
        if p > 1e-3:
            probes += [mass + 2e-4, mass + p / 2, mass + p - 2e-4]
            expected += [token] * 3
        mass += p
    with mock.patch.object(sampler, "uniforms", return_value=np.array(probes)):
        tokens, _ = sampler.sample(logits.repeat(len(probes), 1), [row] * len(probes))
    assert tokens.tolist() == expected


@settings(deadline=None, max_examples=200)
@given(batches())
def test_mixed_batches_draw_the_plain_tokens(batch):
    logits, rows = batch
    us = uniforms(rows)
    expected = [
        plain_draw(plain_distribution(values, row), u) for values, row, u in zip(logits.tolist(), rows, us, strict=True)
    ]
    tokens, _ = sampler.sample(logits.clone(), rows)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == expected


@settings(deadline=None, max_examples=150)
@given(batches(max_rows=6), st.randoms(use_true_random=False))
def test_a_row_is_the_same_alone_and_in_any_order(batch, random):
    logits, rows = batch
    tokens, logprobs = sampler.sample(logits.clone(), rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled, shuffled_logprobs = sampler.sample(logits[order].clone(), [rows[i] for i in order])
    assert shuffled.tolist() == tokens[order].tolist()
    for place, i in enumerate(order):
        alone, (alone_logprobs,) = sampler.sample(logits[i : i + 1].clone(), [rows[i]])
        assert alone[0] == tokens[i]
        assert_same_logprobs(logprobs[i], alone_logprobs)
        assert_same_logprobs(logprobs[i], shuffled_logprobs[place])


def assert_same_logprobs(one, other) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert one.rank == other.rank
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_a_row_of_a_large_vocabulary_is_the_same_alone_and_in_a_batch():
    """Long rows take torch's parallel paths, whose sums depend on the shape of the tensor."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(12, 50257, generator=generator) * 3).half().float()  # half: ties
    options = [
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.999, "logprobs": 20},
        {"typical_p": 0.4, "logprobs": 0},
        {"top_k": 700, "top_p": 0.95, "temperature": 2.0},
        {"min_p": 0.001, "typical_p": 0.9},
        {"repetition_penalty": 1.3, "prompt": range(0, 50000, 7), "logprobs": 100},
    ]
    rows = [make_row(seed=i, index=i, **options[i % len(options)]) for i in range(12)]
    tokens, logprobs = sampler.sample(logits.clone(), rows)
    for i, row in enumerate(rows):
        alone, (alone_logprobs,) = sampler.sample(logits[i : i + 1].clone(), [row])
        assert alone[0] == tokens[i]
        assert_same_logprobs(logprobs[i], alone_logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([0.5, -1.0, 2.0, 2.0, 0.0, 1.0, -3.0, 1.5])
    draws = 8000
    rows = [make_row(seed=1234, index=i, temperature=temperature) for i in range(draws)]
    tokens, _ = sampler.sample(logits.repeat(draws, 1), rows)
    expected = torch.softmax(logits.double() / temperature, 0).numpy() * draws
    counts = np.bincount(tokens, minlength=len(logits))
    assert ((counts - expected) ** 2 / expected).sum() < 29.9  # chi-square, 7 degrees, p = 1e-4


def test_frequencies_over_seeds_follow_the_softmax():
    """Sequences with neighbouring seeds must not draw alike."""
    draws = 8000
    rows = [make_row(seed=seed, index=5) for seed in range(draws)]
    tokens, _ = sampler.sample(torch.zeros(draws, 10), rows)
    counts = np.bincount(tokens, minlength=10)
    assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 33.7  # chi-square, 9 degrees, p = 1e-4


def test_neighbouring_streams_are_independent():
    """Pairs (seed s, index i) and (seed s + 1, index i), and (s, i) and (s, i + 1), fill the square."""
    seeds, indices = np.meshgrid(np.arange(60), np.arange(60), indexing="ij")
    rows = [make_row(seed=int(s), index=int(i)) for s, i in zip(seeds.flat, indices.flat, strict=True)]
    us = uniforms(rows).reshape(60, 60)
    assert len(np.unique(us)) == us.size
    for one, other in ((us[:-1], us[1:]), (us[:, :-1], us[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.06


def test_uniforms_lie_in_the_half_open_unit_interval_and_depend_on_seed_and_index_alone():
    rows = [make_row(seed=s, index=i) for s in (-(2**63), -1, 0, 1, 2**64 - 1) for i in (0, 1, 2**31)]
    us = uniforms(rows)
    assert ((us >= 0) & (us < 1)).all()
    assert us[::-1].tolist() == uniforms(rows[::-1]).tolist()
    other = [
        dataclasses.replace(row, params=SamplingParams(temperature=0.3), output=np.array([1], np.int32)) for row in rows
    ]
    assert us.tolist() == uniforms(other).tolist()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_tokens(u):
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    row = make_row(allowed_token_ids=[3, 500, 900])
    with mock.patch.object(sampler, "uniforms", return_value=np.array([u])):
        assert sampler.sample(logits, [row])[0].tolist() == [3 if u == 0 else 900]


@pytest.mark.parametrize("vocab_size", [511, 512, 513, 3000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_top_p_whose_nucleus_exceeds_the_first_look(vocab_size, top_p):
    """Flat rows need nearly the whole vocabulary, steep ones a token; one batch holds both."""
    generator = torch.Generator().manual_seed(vocab_size)
    steepness = torch.tensor([0.01, 0.1, 1.0, 8.0])[:, None]
    logits = torch.randn(4, vocab_size, generator=generator) * steepness
    rows = [make_row(top_p=top_p) for _ in steepness]
    for i, values in enumerate(logits):
        probs = values.double().softmax(-1)
        ordered, order = probs.sort(descending=True)
        size = int((ordered.cumsum(0) < top_p).sum()) + 1
        first, last = order[:size].min().item(), order[:size].max().item()
        for u, expected in ((0.0, first), (1 - 2**-53, last)):
            with mock.patch.object(sampler, "uniforms", return_value=np.full(4, u)):
                assert sampler.sample(logits.clone(), rows)[0][i] == expected


def test_ties_at_a_cut_stay_in():
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]])
    for params in ({"top_k": 3}, {"top_p": 0.85}):
        rows = [make_row(index=i, **params) for i in range(400)]
        assert set(sampler.sample(logits.repeat(400, 1), rows)[0].tolist()) == {0, 1, 2, 3, 4}
    rows = [make_row(index=i, top_k=2) for i in range(400)]
    assert set(sampler.sample(logits.repeat(400, 1), rows)[0].tolist()) == {1, 3}


@pytest.mark.parametrize("top_k", [4, 5, 10**9])
def test_top_k_of_the_vocabulary_or_more_keeps_all(top_k):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    seeds = range(50)
    with_k = sampler.sample(logits.repeat(50, 1), [make_row(seed=s, top_k=top_k) for s in seeds])[0]
    without = sampler.sample(logits.repeat(50, 1), [make_row(seed=s) for s in seeds])[0]
    assert with_k.tolist() == without.tolist()


def test_greedy_rows_take_the_first_of_the_largest_among_random_rows():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]]).repeat(40, 1)
    rows = [make_row(index=i, temperature=0.0 if i % 2 else 3.0, top_k=i % 3) for i in range(40)]
    tokens, _ = sampler.sample(logits, rows)
    assert (tokens[1::2] == 1).all()
    assert len(set(tokens[::2].tolist())) > 2


def test_equal_seed_and_index_draw_the_same_and_others_differ():
    logits = torch.zeros(1, 1000)
    draws = [[sampler.sample(logits.clone(), [make_row(seed=s, index=i)])[0][0] for i in range(20)] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 10


FORBIDDING = {
    "all allowed are stop tokens": {"allowed_token_ids": [2, 5], "stop_ids": [2, 5]},
    "all allowed are bad words": {"allowed_token_ids": [2, 5], "bad_words": [[2], [5]]},
    "the whole vocabulary is bad words": {"bad_words": [[t] for t in range(8)]},
    "stop tokens and bad words together": {"stop_ids": range(4), "bad_words": [[t] for t in range(4, 8)]},
}
CUTS = [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.9, "top_k": 2}]


@pytest.mark.parametrize("forbidding", FORBIDDING.values(), ids=FORBIDDING)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_forbidding_everything_still_yields_an_allowed_token(forbidding, cut, penalty):
    allowed = set(forbidding.get("allowed_token_ids", range(8)))
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        row = make_row(seed=seed, prompt=[1, 2], repetition_penalty=penalty, **forbidding, **cut)
        logits = torch.randn(1, 8, generator=generator)
        assert sampler.sample(logits, [row])[0][0] in allowed


EXTREME = [
    {"temperature": 1e9},
    {"temperature": 1e300},
    {"temperature": 1e-5},
    {"repetition_penalty": 1e-9},
    {"repetition_penalty": 1e-40},
    {"repetition_penalty": 1e39},
    {"repetition_penalty": 1e300, "temperature": 1e300, "typical_p": 0.5, "top_p": 0.5},
    {"logit_bias": {0: 100.0, 1: 100.0}, "repetition_penalty": 1e-9},
]


@pytest.mark.parametrize("params", EXTREME, ids=str)
def test_extreme_parameters_never_let_a_forbidden_token_through(params):
    """A ban that was a large finite penalty was undone by a high temperature or a tiny repetition
    penalty; values beyond fp32 made NaN of whole rows."""
    draws = 200
    rows = [make_row(index=i, prompt=range(8), stop_ids=[0], bad_words=[[1]], **params) for i in range(draws)]
    rows += [make_row(index=i, prompt=range(8), allowed_token_ids=[3, 4], **params) for i in range(draws)]
    logits = torch.tensor([3.0, 2.0, -1.0, 0.5, -0.5, 0.0, 1.0, -4.0])
    tokens, _ = sampler.sample(logits.repeat(2 * draws, 1), rows)
    assert set(tokens[:draws].tolist()) <= {2, 3, 4, 5, 6, 7}
    assert set(tokens[draws:].tolist()) <= {3, 4}


def test_an_extreme_temperature_is_uniform():
    tokens, _ = sampler.sample(torch.randn(300, 4), [make_row(index=i, temperature=1e300) for i in range(300)])
    assert (np.bincount(tokens, minlength=4) > 40).all()


@settings(deadline=None, max_examples=150)
@given(batches())
def test_logprobs_are_of_the_unmodified_logits(batch):
    logits, rows = batch
    tokens, found = sampler.sample(logits.clone(), rows)
    for values, row, token, logprobs in zip(logits.tolist(), rows, tokens.tolist(), found, strict=True):
        count = row.params.logprobs
        if count is None:
            assert logprobs is None
            continue
        size = len(values) if count == -1 else count
        total = math.log(math.fsum(math.exp(x) for x in values))
        likeliest = sorted(range(len(values)), key=lambda t: (-values[t], t))[:size]  # ties by token id
        assert logprobs.token_ids.tolist() == [token, *likeliest]
        assert logprobs.logprobs == pytest.approx([values[t] - total for t in (token, *likeliest)], abs=1e-5)
        assert logprobs.rank == 1 + sum(x > values[token] for x in values)


def test_the_greedy_token_is_the_first_of_the_likeliest():
    logits = torch.zeros(2, 3000)
    tokens, logprobs = sampler.sample(logits, [make_row(temperature=0.0, logprobs=count) for count in (1, 5)])
    assert tokens.tolist() == [0, 0]
    assert [found.token_ids.tolist() for found in logprobs] == [[0, 0], [0, 0, 1, 2, 3, 4]]


def test_token_logprobs_of_given_tokens(ops):
    logprobs = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]).log()
    table = ops.token_logprobs(logprobs, torch.tensor([0, 2]), [2, 0])
    one, other = table.read(table.values.numpy())
    assert (one.token_ids.tolist(), one.rank) == ([0, 2, 1], 3)
    assert np.exp(one.logprobs) == pytest.approx([0.1, 0.7, 0.2])
    assert (other.token_ids.tolist(), other.rank) == ([2], 2)


def test_not_a_number_stays_in_its_row():
    """A broken model's NaN must neither crash the step nor change another row's token."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    rows = [SampleRow(SamplingParams(seed=1), 1, i, np.empty(0, np.int32), np.empty(0, np.int32)) for i in range(2)]
    expected = sampler.sample(logits.clone(), rows)[0][1]
    logits[0] = float("nan")
    token_ids = sampler.sample(logits, rows)[0]
    assert 0 <= token_ids[0] < 50
    assert token_ids[1] == expected
