"""The protocol of an attention backend, and which one is taken."""

from __future__ import annotations

import importlib
import logging
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


def load_backend(name: str) -> AttentionBackend:
    module, _, cls = _BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), cls)()


def select_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int = 16,
    *,
    codes: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> AttentionBackend:
    """The configured backend, or for "auto" the first that runs with this device, dtype and page size.

    Whether it serves a given layer is checked once the layer is known (`require_support`).
    codes: as of PagedKVSpec; ConfigError if none of those for "auto" serves a cache of them here.
    batch_invariant: a query's bits do not depend on the others; ConfigError if the configured one has no such way.
    """
    if batch_invariant:
        return _invariant_backend(name, device)
    if name != "auto":
        return load_backend(name)
    probe = PagedKVSpec(num_kv_heads=1, head_dim=64, dtype=dtype, codes=codes)
    reasons: list[str] = []
    for candidate in _PREFERENCE.get(device.type, ("reference",)):
        backend = load_backend(candidate)
        reason = backend.unsupported_reason(device, dtype, probe, block_size)
        if reason is None:
            if reasons:
                logger.info("attention %s: %s", candidate, "; ".join(reasons))
            return backend
        reasons.append(f"{candidate}: {reason}")
    assert codes is not None, "one of them takes every plain cache"
    raise ConfigError(f"no attention backend for this quantised cache: {'; '.join(reasons)}")


def _invariant_backend(name: str, device: torch.device) -> AttentionBackend:
    own = "native" if device.type == "cpu" else "triton"
    if name == "triton" or (name, own) == ("auto", "triton"):
        return load_backend("triton, invariant")
    if name in ("auto", own):
        return load_backend(own)
    raise ConfigError(
        f"batch_invariant=True: attention_backend={name!r} computes a token in an order that follows the others; "
        f"set attention_backend={own!r}"
    )


def require_support(backend: AttentionBackend, device: torch.device, spec: PagedKVSpec, block_size: int) -> None:
    reason = backend.unsupported_reason(device, spec.dtype, spec, block_size)
    if reason:
        raise ConfigError(f"attention_backend={backend.name!r}: {reason}")
