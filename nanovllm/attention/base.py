"""The protocol of an attention backend, and which one is taken."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from nanovllm.attention.alibi import Alibi
from nanovllm.batch import Batch
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.errors import ConfigError

logger = logging.getLogger(__name__)


class AttentionBackend(Protocol):
    """Stores new keys and values in their pages, quantised if the cache is, then attends over the pages.

    Every token's KV is stored before any row attends, so a sequence may read pages that
    another one fills in the same step.
    """

    name: str

    def unsupported_reason(
        self, device: torch.device, dtype: torch.dtype, spec: PagedKVSpec, block_size: int
    ) -> str | None:
        """None if this backend can serve such a layer here, else why not."""
        ...

    def kv_shape(self, spec: PagedKVSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape of one layer's cache tensor, of `spec.stored` numbers: `spec.block_bytes` for each page."""
        ...

    def prepare(self, batch: Batch, block_size: int) -> Any:
        """Work that all layers of a step share; the result is `batch.attention`."""
        ...

    def forward(
        self,
        q: torch.Tensor,  # [T, H, D]
        k: torch.Tensor,  # [T, KH, D]
        v: torch.Tensor,  # [T, KH, D]
        kv: torch.Tensor,  # kv_shape
        batch: Batch,
        *,
        scale: float,
        window: int | None = None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:  # [T, H, D]
        """q, k and v may be wider floats than the cache; so may the result."""
        ...


_BACKENDS = {
    "native": "nanovllm.attention.native:NativeAttention",
    "cpu": "nanovllm.attention.cpu:CPUAttention",
    "flash": "nanovllm.attention.flash:FlashAttention",
    "triton": "nanovllm.attention.triton:TritonAttention",
    "triton, invariant": "nanovllm.attention.triton:InvariantTritonAttention",
    "torch_varlen": "nanovllm.attention.torch_varlen:TorchVarlenAttention",
    "reference": "nanovllm.attention.reference:ReferenceAttention",
}
# What "auto" takes, the first that can. On GPUs flash goes first, because nobody has flash-attn by chance. triton
# divides long contexts and reads small pages; torch_varlen does neither, but needs nothing beside torch.
_PREFERENCE = {
    "cpu": ("native", "cpu"),
    "cuda": ("flash", "triton", "torch_varlen", "reference"),
}
# Those whose queries do not depend on one another, by the device or the backend's own name.
_INVARIANT = {"cpu": "native", "cuda": "triton, invariant", "triton": "triton, invariant"}


def load_backend(name: str) -> AttentionBackend:
    module, _, cls = _BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), cls)()


def select_backend(
    name: str,
    device: torch.device,
    specs: Sequence[PagedKVSpec],
    block_size: int,
    *,
    batch_invariant: bool = False,
) -> AttentionBackend:
    """The configured backend, or for "auto" the first that serves all these layers here; ConfigError if none does.

    batch_invariant: a query's bits do not depend on the others.
    """
    if batch_invariant:
        candidates: tuple[str, ...] = (_INVARIANT.get(device.type if name == "auto" else name, name),)
    else:
        candidates = _PREFERENCE.get(device.type, ("reference",)) if name == "auto" else (name,)
    reasons: list[str] = []
    for candidate in candidates:
        backend = load_backend(candidate)
        reason = next(filter(None, (backend.unsupported_reason(device, s.dtype, s, block_size) for s in specs)), None)
        if reason is None:
            if reasons:
                logger.info("attention %s: %s", candidate, "; ".join(reason.partition(";")[0] for reason in reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}" if len(candidates) > 1 else reason)
    if len(candidates) == 1:
        raise ConfigError(f"attention_backend={backend.name!r}: {reasons[0]}")
    raise ConfigError(f"no attention backend serves this model here: {', '.join(reasons)}")
