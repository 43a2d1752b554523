"""torchrun: every rank runs the script, and all get rank 0's answers."""

import json
import time

import numpy as np
import pytest
from distributed.ranks import ROOT, torchrun
from rank_models import KILL, OPTIONS, RAISE, sum_model

from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.engine.executors.torchrun import digest
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.sample_row import SampleRow

SCRIPT = """
import json, os, sys
from nanovllm import LLM, RanksDiffer, SamplingParams
rank = int(os.environ["RANK"])
prompts = [[1, 2, 3], [4], [5] * 30]
params = [SamplingParams(max_tokens=20, logprobs=2), SamplingParams(n=3, max_tokens=9), SamplingParams(max_tokens=4)]
answers = []
for seed in (1, None):  # two engines, one after the other; the second draws by seeds of its own on each rank
    with LLM(sys.argv[1], executor="torchrun", seed=seed, **json.loads(sys.argv[2])) as llm:
        assert llm.engine.config.tensor_parallel_size == 2
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([[c.token_ids for c in output.outputs] for output in outputs])
        if seed is None:
            try:
                llm.generate([[rank]], use_tqdm=False)
            except RanksDiffer as error:
                answers.append(str(error))
with open(f"{sys.argv[3]}/{rank}.json", "w") as file:
    json.dump(answers, file)
"""


@pytest.fixture
def model(tmp_path):
    return sum_model(tmp_path)


def test_outputs_are_equal_on_all_ranks(model, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun(2, str(tmp_path / "script.py"), model, json.dumps(OPTIONS), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert "makes another step than rank 0" in first[2]
    params = [SamplingParams(max_tokens=20), SamplingParams(n=3, max_tokens=9), SamplingParams(max_tokens=4)]
    with LLM(model, seed=1, **OPTIONS) as llm:
        outputs = llm.generate([[1, 2, 3], [4], [5] * 30], params, use_tqdm=False)
    assert first[0] == [[c.token_ids for c in output.outputs] for output in outputs]


def test_the_example_answers_once(chat_model):
    options = ["--executor", "torchrun", "--model", str(chat_model), "--max-tokens", "5"]
    assert torchrun(2, str(ROOT / "example.py"), *options).stdout.count("Completion:") == 2


@pytest.mark.parametrize(("sizes", "token"), [({}, RAISE), ({}, KILL), ({"damaged": 1}, 1)])
def test_a_rank_that_fails_ends_all(tmp_path, sizes, token):
    """Long before worker_timeout."""
    model, script = sum_model(tmp_path, **sizes), tmp_path / "script.py"
    engine = f"LLM({model!r}, executor='torchrun', **{OPTIONS!r})"
    script.write_text(f"from nanovllm import LLM\n{engine}.generate([[{token}]])")
    start = time.monotonic()
    assert torchrun(2, str(script), check=False).returncode != 0
    assert time.monotonic() - start < 60


def test_torchrun_must_have_started_us(model, monkeypatch):
    with pytest.raises(ConfigError, match="torchrun did not start this process"):
        LLM(model, executor="torchrun", **OPTIONS)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun did not start this process"):
        LLM(model, executor="torchrun", **OPTIONS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun started 2 processes"):
        LLM(model, executor="torchrun", tensor_parallel_size=3, **OPTIONS)


def plan(**changes):
    row = SampleRow(SamplingParams(), 5, 0, np.arange(3), np.arange(0))
    values = {"seq_id": 1, "token_ids": np.array([1, 2]), "start": 0, "block_table": np.array([3]), "state_slot": 0}
    return StepPlan([PlannedSequence(**{**values, "sample": row, **changes})])


@pytest.mark.parametrize(
    "change",
    [
        {"seq_id": 2},
        {"token_ids": np.array([1, 3])},
        {"start": 1},
        {"block_table": np.array([4])},
        {"state_slot": 1},
        {"sample": None},
        {"resume_from": 1},
        {"capture_to": 1},
    ],
)
def test_a_digest_sees_every_difference_but_the_seeds(change):
    assert digest(plan()) != digest(plan(**change))
    assert digest(plan()) == digest(plan(sample=SampleRow(SamplingParams(), 6, 0, np.arange(3), np.arange(0))))
