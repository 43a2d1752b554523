"""The runner with a toy model: state slots, logits rows, memory."""

from dataclasses import dataclass

import pytest
import torch
from helpers import byte_tokenizer, run_all
from torch import nn

from nanovllm import ConfigError, SamplingParams
from nanovllm.cache_spec import StateSpec
from nanovllm.config import EngineConfig
from nanovllm.engine.build import fit_model_len
from nanovllm.engine.executors.base import InProcessExecutor
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.runner import control_group, memory
from nanovllm.layers.attention import CachedLayer
from nanovllm.models.base import CausalLM

VOCAB = 200


@dataclass(frozen=True)
class SumConfig:
    vocab_size: int = VOCAB
    max_position_embeddings: int = 256

    @classmethod
    def from_hf(cls, config):
        return cls()


class RunningSum(CachedLayer):
    """A recurrent layer: its state is the sum of the sequence's tokens so far."""

    def __init__(self):
        super().__init__()
        self.cache_spec = StateSpec(shapes=((1,),), dtypes=(torch.float64,))

    def bind(self, *caches):
        (self.state,) = caches

    def forward(self, batch):
        out = torch.empty(len(batch.input_ids), 1, dtype=torch.float64)
        for b, slot in enumerate(batch.state_slots.tolist()):
            assert slot > 0, "slot 0 is the sink"
            rows = slice(int(batch.query_start[b]), int(batch.query_start[b + 1]))
            carried = self.state[slot] if batch.positions[rows][0] > 0 else torch.zeros(1)
            out[rows, 0] = carried + batch.input_ids[rows].double().cumsum(0)
            self.state[slot] = out[rows][-1]
        return out


class SumModel(CausalLM):
    config_class = SumConfig
    weight_rules = ()

    def __init__(self, config, ctx):
        nn.Module.__init__(self)
        self.sum = RunningSum()

    def forward(self, batch):
        return self.sum(batch)

    def compute_logits(self, hidden):
        wanted = (hidden.long().squeeze(1) * 7 + 3) % VOCAB
        return nn.functional.one_hot(wanted, VOCAB).float()


def sum_engine(**options):
    config = EngineConfig.from_options("sum", {"load_format": "dummy", "device": "cpu", **options})
    config = config.resolve(checkpoint_dtype="float32", max_positions=256, cuda=False)
    executor = InProcessExecutor(config, SumModel, SumConfig(), None)
    config = fit_model_len(config, executor.capacity, None)
    return LLMEngine(config, byte_tokenizer(), executor, vocab_size=VOCAB, eos_ids=[])


def expected(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(tokens) * 7 + 3) % VOCAB)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},  # chunks resume their state
        {"num_kvcache_blocks": 6, "kvcache_block_size": 8, "max_num_seqs": 4},  # preempted ones start anew
    ],
)
def test_state_belongs_to_its_sequence(options):
    """nano-vllm-go kept one state in the layer, so that two live sequences corrupted each other."""
    engine = sum_engine(**options)
    prompts = [list(range(i, i + 5 + 3 * i)) for i in range(1, 6)]
    params = SamplingParams(temperature=0, max_tokens=12)
    requests = [engine.prepare(p, params) for p in prompts]
    for request in requests:
        engine.add(request)
    finished = run_all(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert finished[request.request_id]["token_ids"] == expected(prompt, 12)
    assert (engine.stats.preemptions > 0) == ("num_kvcache_blocks" in options)


def test_states_are_counted_in_the_memory():
    assert sum_engine(max_num_seqs=5)._executor.capacity.num_slots == 11  # five run, five are snapshots
    assert sum_engine(max_num_seqs=5, enable_prefix_caching=False)._executor.capacity.num_slots == 6
    assert sum_engine(max_num_seqs=5, kvcache_memory=32)._executor.capacity.num_slots == 4
    with pytest.raises(ConfigError, match="hold no sequence"):
        sum_engine(max_num_seqs=4, kvcache_memory=15)


def test_a_snapshot_carries_the_state():
    engine = sum_engine(kvcache_block_size=8)
    prompt = list(range(30))
    for tail, cached in (([], 0), ([9, 9], 24), ([5], 24)):
        request = engine.prepare(prompt + tail, SamplingParams(temperature=0, max_tokens=12))
        engine.add(request)
        output = run_all(engine)[request.request_id]
        assert output["token_ids"] == expected(prompt + tail, 12)
        assert output.num_cached_tokens == cached


def test_host_memory_respects_the_control_group(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(control_group, "_ROOT", tmp_path)
    assert memory.free_host_memory() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_host_memory() > 2**20


def test_ranks_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)
    assert memory.host_cache_memory(EngineConfig("m"), ranks=2) == 200
    assert memory.host_cache_memory(EngineConfig("m", kvcache_memory=900), ranks=3) == 300
    assert memory.host_cache_memory(EngineConfig("m", num_kvcache_blocks=4), ranks=4) == 250


class Device:
    """A GPU's memory, of which somebody else has some."""

    def __init__(self, monkeypatch, total, others):
        self.total, self.used = total, others
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.used, self.total))

    def take(self, size):
        self.used += size
        if self.used > self.total:
            raise torch.cuda.OutOfMemoryError


@pytest.mark.parametrize(("others", "share", "left"), [(0, 0.9, 600), (300, 0.9, 400), (500, 0.5, 200)])
def test_device_memory_is_the_share_less_weights_and_steps(monkeypatch, others, share, left):
    """Two engines fit beside one another if their shares do."""
    device = Device(monkeypatch, 1000, others)
    before = memory.DeviceMemory(torch.device("cuda"))
    device.take(200)
    config = EngineConfig("m", gpu_memory_utilization=share)
    assert before.left(config, lambda: device.take(100)) == left


def test_what_to_do_where_device_memory_does_not_suffice(monkeypatch):
    device = Device(monkeypatch, 1000, 0)
    before = memory.DeviceMemory(torch.device("cuda"))
    device.take(800)
    with pytest.raises(ConfigError, match=r"utilization=0\.9 .* 800 of weights and 150 for a step: raise it"):
        before.left(EngineConfig("m"), lambda: device.take(150))
    with pytest.raises(ConfigError, match=r"beside 950 bytes of weights: lower max_num_batched_tokens"):
        before.left(EngineConfig("m"), lambda: device.take(150))


def sum_engine_with_a_request():
    engine = sum_engine(enforce_eager=True)
    engine.add(engine.prepare([1, 2], SamplingParams(max_tokens=2)))
    return engine


@pytest.mark.parametrize(
    ("method", "helps"),
    [
        ("__init__", "tensor_parallel_size"),
        ("load_dummy", "quantization='int8'"),
        ("forward", "max_num_batched_tokens"),
    ],
)
def test_too_little_device_memory_names_what_to_change(monkeypatch, method, helps):
    """Of weights and steps it said how many MiB torch had wanted."""

    def take(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SumModel, method, take)
    with pytest.raises(ConfigError, match=helps):
        run_all(sum_engine_with_a_request())
