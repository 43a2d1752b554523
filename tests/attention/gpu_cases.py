"""Steps that every attention backend for GPUs has to get right: interpreted on the CPU, and run where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from test_backends import TOLERANCE, Step, make_batch
from test_codes import cache_of

from nanovllm.attention.alibi import Alibi, alibi_slopes
from nanovllm.attention.reference import ReferenceAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# decodes, chunks with and without history, whole prompts, sequences of one token
MIXED = [(17, 1), (0, 5), (40, 1), (0, 1), (16, 16), (5, 21), (100, 30), (7, 1), (63, 1), (64, 1), (0, 33)]
LONG = [(700, 1), (0, 1), (1030, 1), (511, 1), (256, 1), (512, 1)]


@dataclass(frozen=True)
class Case:
    sequences: list[tuple[int, int]] = field(default_factory=lambda: MIXED)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    bias: str = "none"

    def check(self, backend, dtype: torch.dtype) -> None:
        step = Step(*(self.sequences, self.heads, self.kv_heads, self.head_dim, self.block_size, dtype), device=DEVICE)
        alibi = None
        if self.bias != "none":
            alibi = Alibi(alibi_slopes(self.heads).to(DEVICE), rounded=self.bias == "rounded", factor=0.5)
        step.check(backend, window=self.window, alibi=alibi)

    def check_codes(self, backend, dtype: torch.dtype) -> None:
        """Against the reference, with the same codes and scales in every page, to the bit."""
        step = Step(*(self.sequences, self.heads, self.kv_heads, self.head_dim, self.block_size, dtype), device=DEVICE)
        tokens = sum(new for _, new in self.sequences)
        q, k, v = (step.normal(tokens, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads))
        k[0], v[0, 0], k[-1] = 0.0, 1e-20, k[-1] * 100  # of nothing, next to nothing, and large
        alibi = None if self.bias == "none" else Alibi(alibi_slopes(self.heads).to(DEVICE))
        how = {"scale": self.head_dim**-0.5, "window": self.window, "alibi": alibi}
        kv = cache_of(step, torch.float8_e4m3fn)
        caches, found = (kv, kv.clone()), []
        for each, cache in zip((ReferenceAttention(), backend), caches, strict=True):
            batch = make_batch(step.sequences, step.tables, step.block_size, each, DEVICE)
            found.append(each.forward(q, k, v, cache, batch, **how))
        assert torch.equal(*(cache.view(torch.uint8) for cache in caches))
        torch.testing.assert_close(found[1], found[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


CASES = {
    "GQA": Case(),
    "MHA": Case(heads=3, kv_heads=3),
    "71 heads of one": Case([(9, 1), (30, 4), (0, 3)], 71, 1, 16),
    "head of 64": Case([(70, 2), (130, 1), (0, 3)], head_dim=64),
    "head of 80": Case(head_dim=80),
    "head of 96": Case([(70, 2), (130, 1), (0, 3)], head_dim=96),
    "head of 128": Case([(70, 2), (130, 1), (0, 3)], head_dim=128),
    "head of 160": Case([(70, 2), (30, 1), (0, 3)], head_dim=160),
    "head of 192": Case([(70, 2), (30, 1), (0, 3)], head_dim=192),
    "head of 256": Case([(20, 20), (130, 1)], head_dim=256),
    "pages of 32": Case(block_size=32),
    "pages of 64": Case(block_size=64),
    "pages of 256": Case(block_size=256),
    "window": Case(window=9),
    "window of one": Case(window=1),
    "window of pages": Case([*LONG, (300, 40)], window=300),
    "long decodes": Case(LONG),
    "long chunk": Case([(150, 150), (0, 200)]),
    "alibi": Case(bias="distance"),
    "alibi and window": Case(window=20, bias="distance"),
    "rounded alibi": Case([(0, 5), (599, 1), (300, 60)], bias="rounded"),
    "one decode": Case([(45, 1)]),
    "one prompt": Case([(0, 45)]),
}
CODED = ("GQA", "71 heads of one", "head of 80", "pages of 256", "window", "alibi", "long decodes")
