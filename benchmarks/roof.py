"""How fast a machine could be at best: each step reads every weight once and multiplies every row by them, reads
its sequences' keys and values, reads and writes their recurrent states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.workload import Sequences

if TYPE_CHECKING:
    from torch import nn

    from nanovllm import LLM

_STEP = 2048  # prompt tokens that share a reading of the weights


@dataclass(frozen=True, slots=True)
class Work:
    """layers, head: elements of weights that a token is multiplied by, without and in the head. weights: bytes of them
    all. cached: bytes of keys and values a token. attention: operations for a query and a key. states: bytes of a
    sequence's recurrent states."""

    layers: int
    head: int
    weights: int
    cached: int
    attention: int
    states: int

    @classmethod
    def of(cls, config: dict[str, Any], dtype: str, kv_cache_dtype: str = "auto") -> Work | None:
        """From a config.json, with weights in that dtype; None for mixtures, of which a step reads what its tokens
        choose."""
        import torch

        from nanovllm.attention.codes import KV_CODES
        from nanovllm.build_context import BuildContext
        from nanovllm.cache_spec import PagedKVSpec, StateSpec
        from nanovllm.layers.attention import CachedLayer
        from nanovllm.models.registry import model_class
        from nanovllm.quantization.linear_method import LinearWeights

        if config.get("num_experts") or config.get("num_local_experts"):
            return None
        family, kind = model_class(config["architectures"]), getattr(torch, dtype)
        codes = KV_CODES[kv_cache_dtype]
        ctx = BuildContext(torch.device("meta"), kind, 64, kv_codes=codes)
        model = family(family.read_config(config), ctx)
        linears = [m for m in model.modules() if isinstance(m, LinearWeights)]
        head, total = model.lm_head.weight.numel(), sum(m.weight.numel() for m in linears)
        specs = [m.cache_spec for m in model.modules() if isinstance(m, CachedLayer)]
        paged = [spec for spec in specs if isinstance(spec, PagedKVSpec)]
        width = _heads(config) * paged[0].head_dim if paged else 0
        states = sum(spec.slot_bytes for spec in specs if isinstance(spec, StateSpec))
        cached = sum(spec.block_bytes(1) for spec in paged)
        return cls(total - head, head, total * kind.itemsize, cached, 4 * width * len(paged), states)

    def seconds(self, sequences: Sequences, shared: int, probe: dict[str, float]) -> float:
        """That prompts, of which `shared` tokens are common, and then the outputs need at least."""
        read, multiply = probe["read_gb_per_s"] * 1e9, probe["bf16_gflop_per_s"] * 1e9
        lengths = [len(p) for p, _ in sequences]
        own = [n - shared for n in lengths]
        tokens = shared + sum(own)
        pairs = shared**2 / 2 + sum(n * (shared + n / 2) for n in own)
        flop = 2 * (self.layers * tokens + self.head * len(own)) + self.attention * pairs
        total = max(flop / multiply, self.weights * -(-tokens // _STEP) / read)
        for made in range(1, max(count for _, count in sequences)):
            seen = [n + made for n, (_, count) in zip(lengths, sequences, strict=True) if made < count]
            flop = 2 * (self.layers + self.head) * len(seen) + self.attention * sum(seen)
            moved = self.weights + self.cached * sum(seen) + 2 * self.states * len(seen)
            total += max(flop / multiply, moved / read)
        return total


def linear_bytes(llm: LLM) -> int:
    """Of its linear layers' weights, in whatever form they are, and the head's."""
    return sum(llm.apply_model(_linear_bytes))


def _linear_bytes(model: nn.Module) -> int:
    from nanovllm.quantization.linear_method import LinearWeights

    linears = [m for m in model.modules() if isinstance(m, LinearWeights)]
    return sum({id(p): p.nbytes for m in linears for p in m.parameters()}.values())  # a tied head once


def _heads(config: dict[str, Any]) -> int:
    return config.get("num_attention_heads") or config.get("n_head") or config["n_heads"]
