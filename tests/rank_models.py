"""A model for tests of executors, given to workers as a plugin. Its ranks add what each has counted, so that none
gets far without the others. Some tokens make a rank misbehave."""

import json
import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm import WeightError
from nanovllm.cache_spec import StateSpec
from nanovllm.layers.attention import CachedLayer
from nanovllm.models.base import CausalLM

OPTIONS = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "device": "cpu",
    "kvcache_memory": "1MiB",
    "model_plugin": __file__,
}
VOCAB = 200
RAISE, EXIT, KILL, HANG, STOP = range(190, 195)  # what the last rank does when it sees one of them


def sum_model(folder, **sizes):
    """A directory of such a model."""
    (folder / "config.json").write_text(json.dumps({"architectures": ["SumForCausalLM"], **sizes}))
    return str(folder)


@dataclass(frozen=True)
class SumConfig:
    """damaged: the rank whose weights are. wide: the rank whose state takes eight times the memory."""

    damaged: int
    wide: int
    vocab_size: int = VOCAB
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, config):
        return cls(config.get("damaged", -1), config.get("wide", -1))


class RunningSum(CachedLayer):
    """Its state is the sum of the sequence's tokens so far, of which each rank adds those at some positions."""

    def __init__(self, width, tp):
        super().__init__()
        self.tp = tp
        self.cache_spec = StateSpec(shapes=((width,),), dtypes=(torch.float64,))

    def bind(self, *caches):
        (self.state,) = caches

    def forward(self, batch):
        out = torch.empty(len(batch.input_ids), 1, dtype=torch.float64)
        mine = batch.input_ids.double() * (batch.positions % self.tp.size == self.tp.rank)
        for b, slot in enumerate(batch.state_slots.tolist()):
            rows = slice(int(batch.query_start[b]), int(batch.query_start[b + 1]))
            carried = self.state[slot, 0] if batch.positions[rows][0] > 0 else 0.0
            out[rows, 0] = carried + mine[rows].cumsum(0)
            self.state[slot, 0] = out[rows, 0][-1]
        return self.tp.all_reduce(out)


class SumForCausalLM(CausalLM):
    config_class = SumConfig
    weight_rules = ()

    def __init__(self, config, ctx):
        nn.Module.__init__(self)
        self.tp, self.config = ctx.tp, config
        self.sum = RunningSum(8 if config.wide == ctx.tp.rank else 1, ctx.tp)

    def load_dummy(self, seed):
        if self.config.damaged == self.tp.rank:
            raise WeightError("the shard is damaged")

    def forward(self, batch):
        if self.tp.rank == self.tp.size - 1:
            misbehave(set(batch.input_ids.tolist()))
        return self.sum(batch)

    def compute_logits(self, hidden):
        wanted = (hidden.long().squeeze(1) * 7 + 3) % 190
        logits = nn.functional.one_hot(wanted, VOCAB).float() * 3
        logits[:, RAISE:] = float("-inf")
        return logits


def misbehave(token_ids):
    if RAISE in token_ids:
        raise ArithmeticError("a sum went wrong")
    if EXIT in token_ids:
        os._exit(3)
    if KILL in token_ids:
        os.kill(os.getpid(), signal.SIGKILL)
    if HANG in token_ids:
        time.sleep(60)
    if STOP in token_ids:
        os.kill(os.getpid(), signal.SIGSTOP)


def rank_of(model):
    return model.tp.rank


def pid_of(model):
    return os.getpid()


def state_slots(model):
    return len(model.sum.state)


def threads(model):
    return torch.get_num_threads()


def fail(model):
    raise KeyError("asked for too much")


def communicator(model):
    """How its ranks speak, by the first layer that says so."""
    groups = (vars(module).get("tp") or vars(module).get("_tp") for module in model.modules())
    return type(next(group for group in groups if group is not None).comm).__name__


def ray_node(model):
    import ray

    return ray.get_runtime_context().get_node_id()
