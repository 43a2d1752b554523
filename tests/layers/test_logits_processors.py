"""What each logits processor changes, and that it changes nothing else."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import sampling_makers

from nanovllm.layers import logits_processors
from nanovllm.sample_row import SampleRow
from nanovllm.sampling_params import SamplingParams


@pytest.fixture(autouse=True, params=sampling_makers())
def ops(request):
    process = functools.partial(logits_processors.process_logits, ops=request.param)
    with mock.patch.object(logits_processors, "process_logits", process):
        yield


def make_row(prompt=(), output=(), stop_ids=(), bad_words=(), **params) -> SampleRow:
    prompt, output = (np.array(ids, dtype=np.int32) for ids in (prompt, output))
    return SampleRow(SamplingParams(**params), 0, 0, prompt, output, stop_ids=stop_ids, bad_words=bad_words)


def processed(logits: list[float], row: SampleRow) -> list[float]:
    tensor = torch.tensor([logits])
    logits_processors.process_logits(tensor, [row])
    return tensor[0].tolist()


def forbidden(logits: list[float], row: SampleRow) -> set[int]:
    """Tokens that no distribution over the result could reach."""
    probs = torch.tensor(processed(logits, row)).softmax(0)
    return set((probs == 0).nonzero().flatten().tolist())


ZEROS = [0.0] * 6


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    row = make_row(prompt=[0, 1, 0], output=[2], repetition_penalty=2.0)
    assert processed([4.0, -4.0, 0.0, 4.0], row) == [2.0, -8.0, 0.0, 4.0]


def test_repetition_penalty_counts_a_token_once():
    row = make_row(prompt=[1, 1, 1], output=[1, 1], repetition_penalty=2.0)
    assert processed([0.0, 8.0], row) == [0.0, 4.0]


def test_presence_and_frequency_penalties_look_at_the_output_alone():
    row = make_row(prompt=[0, 0, 3], output=[1, 2, 1], presence_penalty=0.5, frequency_penalty=0.25)
    assert processed([0.0, 0.0, 0.0, 0.0], row) == [0.0, -1.0, -0.75, 0.0]


def test_negative_penalties_encourage():
    row = make_row(output=[1], presence_penalty=-1.0, frequency_penalty=-0.5)
    assert processed([0.0, 0.0], row) == [0.0, 1.5]


def test_biases_come_before_penalties_and_repetition_before_frequency():
    row = make_row(output=[0], logit_bias={0: 5.0}, repetition_penalty=2.0, frequency_penalty=1.0)
    assert processed([-1.0, 1.0], row) == [1.0, 1.0]  # (-1 + 5) / 2 - 1


def test_logit_bias_is_added_to_its_tokens():
    assert processed([1.0, 1.0, 1.0], make_row(logit_bias={0: 2.5, 2: -200})) == [3.5, 1.0, -99.0]


def test_allowed_token_ids_forbid_all_others():
    assert forbidden([9.0, 0.0, 9.0, -9.0], make_row(allowed_token_ids=[1, 3, 1])) == {0, 2}


def test_a_bias_does_not_readmit_a_forbidden_token():
    assert forbidden(ZEROS, make_row(allowed_token_ids=[1], logit_bias={0: 100})) == {0, 2, 3, 4, 5}
    assert forbidden(ZEROS, make_row(stop_ids=(0,), logit_bias={0: 100})) == {0}


def test_stop_ids_are_forbidden_while_they_are_given():
    assert forbidden(ZEROS, make_row(stop_ids=(2, 4))) == {2, 4}
    assert forbidden(ZEROS, make_row()) == set()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([], {5}),
        ([1], {5, 2}),
        ([0, 1], {5, 2}),
        ([1, 2], {5, 4}),
        ([3, 1, 2], {5, 4}),
        ([2, 1], {5, 2}),
        ([1, 2, 3], {5}),
        ([2], {5}),
    ],
)
def test_a_bad_word_is_forbidden_where_it_would_be_completed(output, expected):
    bad_words = ((1, 2), (1, 2, 4), (5,), (1, 2, 3, 3, 0))
    assert forbidden(ZEROS, make_row(prompt=[1, 2, 3, 3], output=output, bad_words=bad_words)) == expected


def test_only_the_rows_that_ask_are_changed():
    rows = [make_row(output=[1]), make_row(output=[1], presence_penalty=1.0), make_row(stop_ids=(1,))]
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    logits_processors.process_logits(logits, rows)
    assert torch.equal(logits[0], before[0])
    for i in (1, 2):
        assert logits[i, [0, 2, 3]].tolist() == before[i, [0, 2, 3]].tolist()
        assert logits[i, 1] < before[i, 1]
