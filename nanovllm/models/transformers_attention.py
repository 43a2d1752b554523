"""The seam between Hugging Face's modules and our attention: what is registered there, and what a
model asks of it, learnt without weights.

transformers looks its attention function up by name. Under our names it finds one that hands the call
to an object which came with the forward pass as a keyword argument, so that whoever runs a model says
who attends: a `Recorder` when the model is built, pages of keys and values in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.batch import Batch
from nanovllm.errors import ModelNotSupported
from nanovllm.layers.attention import Attention

KEYWORD = "nanovllm_attend"
RUN = "nanovllm"  # no mask function has this name, and so transformers builds no mask
TRACE = "nanovllm_trace"

Attend = Callable[..., torch.Tensor]
"""(module, q [1, H, T, D], k [1, KH, T, D], v [1, KH, T, DV], mask, **options) -> [1, T, H, DV]."""

_OLDEST = (5, 6)  # tried with this one, 5.15 and 5.23
_TRACED_TOKENS = 3
# what modules pass along and no attention function reads
_UNREAD = frozenset({"position_ids", "cache_position", "output_attentions", "use_cache"})


def import_transformers() -> Any:
    """The library, with our functions registered; ModelNotSupported where it is missing or too old."""
    try:
        import transformers
    except ImportError as error:
        raise ModelNotSupported(
            "this model has no file here and needs transformers' modules: pip install 'nanovllm[transformers]'"
        ) from error
    if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST:
        raise ModelNotSupported(
            f"transformers {transformers.__version__} is too old: pip install --upgrade 'nanovllm[transformers]'"
        )
    from transformers.masking_utils import AttentionMaskInterface

    for name in (RUN, TRACE):
        transformers.AttentionInterface.register(name, _hand_over)
    AttentionMaskInterface.register(TRACE, _last_mask_rows)
    return transformers


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one attention module needs. head_dim: of queries and keys; values may be narrower."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None


def trace(model: nn.Module, dtype: torch.dtype) -> dict[str, AttentionSpec]:
    """Run a model that lies on the meta device, with attention TRACE; {module's name: what it asks}.

    ModelNotSupported with the reason if one of them asks for what our attention does not do.
    """
    recorder = Recorder({module: name for name, module in model.named_modules()}, dtype)
    ids = torch.zeros(1, _TRACED_TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad():
        # with a mask given, transformers does not look for sequence boundaries in positions without data
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **{KEYWORD: recorder})
    return recorder.specs


class Recorder:
    """Attends to nothing, and writes down what it was asked."""

    def __init__(self, names: Mapping[nn.Module, str], dtype: torch.dtype) -> None:
        self._names, self._dtype = names, dtype
        self.specs: dict[str, AttentionSpec] = {}

    def __call__(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        name = self._names[module]
        reason = _shape_reason(q, k, v, self._dtype) or _option_reason(module, scaling, options)
        if name in self.specs:
            reason = "it attends twice in one forward pass"
        window, length = _window(mask)
        # a mask is what transformers' own default obeys; where the two differ, no one knows which is meant
        if sliding_window is not None and sliding_window < (length or sliding_window + 1) and sliding_window != window:
            reason = f"its mask does not have its sliding_window={sliding_window}"
        if reason:
            raise ModelNotSupported(f"{name}: {reason}")
        self.specs[name] = AttentionSpec(q.shape[1], k.shape[1], q.shape[3], scaling or q.shape[3] ** -0.5, window)
        return q.new_empty(1, _TRACED_TOKENS, q.shape[1], v.shape[3])


def _shape_reason(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> str | None:
    if {q.shape[2], k.shape[2], v.shape[2]} != {_TRACED_TOKENS}:
        return f"it attends from {q.shape[2]} to {k.shape[2]} tokens where the sequence has {_TRACED_TOKENS}"
    if q.shape[3] != k.shape[3] or v.shape[3] > k.shape[3] or k.shape[1] != v.shape[1]:
        return f"heads of queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not match"
    if {q.dtype, k.dtype, v.dtype} != {dtype}:
        return f"its queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}, not all {dtype}"
    return None


def _option_reason(module: nn.Module, scaling: Any, options: dict[str, Any]) -> str | None:
    if False in (options.pop("is_causal", None), getattr(module, "is_causal", None)):
        return "its attention is not causal"
    if scaling is not None and not isinstance(scaling, (int, float)):
        return "its scale is computed from the input"
    options = {name: value for name, value in options.items() if name not in _UNREAD}
    asked = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    asked += [f"{name}={value!r}" for name, value in options.items() if name not in asked and value]
    return f"its attention takes {', '.join(asked)}, which ours does not have" if asked else None


def _window(mask: torch.Tensor | None) -> tuple[int | None, int | None]:
    """(tokens that a query sees or None for all, tokens of the longest sequence) of what `_last_mask_rows` made.

    ModelNotSupported for a mask that is no window up to the query.
    """
    if mask is None:
        return None, None
    if mask.device.type == "meta" or mask.dtype != torch.bool or mask.shape[:3] != (1, 1, 2):
        raise ModelNotSupported("it builds attention masks of its own")
    length = mask.shape[3]
    window = int(mask[0, 0, 1].sum())
    keys, queries = torch.arange(length), torch.arange(length - 2, length)[:, None]
    if not torch.equal(mask[0, 0], (keys <= queries) & (keys > queries - window)):
        raise ModelNotSupported("its attention mask is neither causal nor a sliding window")
    return (window if window < length else None), length


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """One step's attention: by transformers' module, the layer that has its pages."""

    layers: Mapping[nn.Module, Attention]
    batch: Batch

    def __call__(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **options: Any
    ) -> torch.Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, size]
        size = v.shape[2]
        v = F.pad(v, (0, k.shape[2] - size))  # multi-head latent attention has narrower values
        out = self.layers[module](q, k, v, self.batch)
        return out.view(1, *q.shape)[..., :size].contiguous()


def attend_to_itself(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **options: Any
) -> torch.Tensor:
    """Stands for attention that sees no other token, and tells queries and keys apart by their positions."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (v * (q.sigmoid() * k.sigmoid())[..., : v.shape[3]]).transpose(1, 2).contiguous()


def _hand_over(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for attention."""
    if KEYWORD not in options:
        raise ModelNotSupported("its modules do not pass keyword arguments on to their attention")
    attend: Attend = options.pop(KEYWORD)
    return attend(module, query, key, value, attention_mask, **options), None


def _last_mask_rows(*, mask_function: Callable[..., torch.Tensor], config: Any, **_: Any) -> torch.Tensor:
    """What transformers calls for a mask: the rows of the last two positions that the model has, bool
    [1, 1, 2, length] with True where a query may look. Two, as a chunk that ends there looks like a window."""
    length = config.max_position_embeddings
    zero = torch.tensor(0)
    rows = mask_function(zero, zero, torch.arange(length - 2, length)[:, None], torch.arange(length))
    return rows.expand(2, length)[None, None]
