"""Any other causal LM: Hugging Face's modules, with our paged attention in the place of theirs.

transformers builds the model and loads its weights. Each of its attention modules gets one of our
Attention layers, with the heads, the scale and the window that the module asked for when the model was
run once on the meta device. A step is one sequence of T tokens to transformers, without a mask and
without its cache: the tokens of all our sequences end to end, with their positions. Only attention, which
is ours, knows where a sequence begins; everything else must treat tokens one by one, and a loaded model
is tried on that. So batches, chunks, the prefix cache, preemption and sampling are what they are for
models with a file here, of which this has no speed: no merged projections, no packed weights, and in
bfloat16 a token's bits may depend on the batch.

Refused, with the reason: models with a recurrent state or convolutions; encoders; attention that is
code of its own, or takes softcaps, sinks, biases, or masks other than causal and sliding windows;
modules that do not pass keyword arguments on. RoPE keeps one set of frequencies: longrope's long one
if max_model_len exceeds the trained length, else its short one, and max_model_len stays within
config.json's max_position_embeddings, up to where `dynamic` changes nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nanovllm.batch import Batch
from nanovllm.build_context import BuildContext
from nanovllm.errors import ConfigError, ModelNotSupported, WeightError
from nanovllm.layers.attention import Attention
from nanovllm.models.base import CausalLM
from nanovllm.models.registry import supported_architectures
from nanovllm.models.transformers_attention import (
    KEYWORD,
    RUN,
    TRACE,
    Attend,
    AttentionSpec,
    PagedAttention,
    attend_to_itself,
    import_transformers,
    trace,
)
from nanovllm.weights.loader import require_fit

if TYPE_CHECKING:
    from nanovllm.weights.checkpoint import Checkpoint

_PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_TRIED_TOKENS = 5


@dataclass(frozen=True)
class TransformersConfig:
    """hf: transformers' own config object. max_position_embeddings: of config.json, stretched by no RoPE scaling."""

    architecture: str
    hf: Any
    vocab_size: int
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> TransformersConfig:
        architecture = next(iter(config.get("architectures") or []), "(none named in config.json)")
        try:
            return cls._read(architecture, config)
        except ModelNotSupported as error:
            raise _not_supported(architecture, str(error)) from error

    @classmethod
    def _read(cls, architecture: str, config: dict[str, Any]) -> TransformersConfig:
        transformers = import_transformers()
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind = str(config.get("model_type"))
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != architecture:
            raise ModelNotSupported(
                f"transformers {transformers.__version__} has no such causal LM for model_type {kind!r}"
            )
        try:
            hf = transformers.CONFIG_MAPPING[kind].from_dict(config)
        except Exception as error:  # each of its config classes validates in its own way
            raise ModelNotSupported(f"transformers does not take config.json: {_first_line(error)}") from error
        if hf.is_encoder_decoder:
            raise ModelNotSupported("it belongs to an encoder")
        if others := set(getattr(hf, "layer_types", None) or ()) - _PLAIN_LAYERS:
            raise ModelNotSupported(f"layers of type {', '.join(sorted(others))} keep more than keys and values")
        vocab_size, length = (getattr(hf, key, None) for key in ("vocab_size", "max_position_embeddings"))
        if not isinstance(vocab_size, int) or not isinstance(length, int):
            raise ModelNotSupported("config.json does not say vocab_size and max_position_embeddings")
        return cls(architecture, hf, vocab_size, length)


class TransformersForCausalLM(CausalLM):
    """body: transformers' module that gives hidden states. head: the model around it."""

    config_class = TransformersConfig
    row_by_row = False
    weight_rules = ()

    def __init__(self, config: TransformersConfig, ctx: BuildContext) -> None:
        """The modules are on the meta device until `load` or `load_dummy`, whatever ctx says."""
        super().__init__(config, ctx)
        if ctx.tp.size != 1:
            raise ConfigError(f"{config.architecture} runs through transformers' modules: set tensor_parallel_size=1")
        if ctx.quantization in ("int8", "int4"):
            raise ConfigError(f"{config.architecture} runs through transformers' modules: leave quantization out")
        if ctx.quantization is not None:
            raise _quantized(config.architecture)
        self._architecture, self._ctx = config.architecture, ctx
        self._hf_config = _with_fixed_rope(config.hf, ctx.max_model_len)
        try:
            model, specs = _traced(self._hf_config, ctx.dtype)
        except ModelNotSupported as error:
            raise _not_supported(config.architecture, str(error)) from error
        self._by_name = {
            name: Attention(s.num_heads, s.num_kv_heads, s.head_dim, ctx, scale=s.scale, window=s.window)
            for name, s in specs.items()
        }
        self.attention = nn.ModuleList(self._by_name.values())
        self._take_apart(model)

    def forward(self, batch: Batch) -> torch.Tensor:
        paged = PagedAttention(self._layers, batch)
        return self._hidden(batch.input_ids, batch.positions, paged)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Through transformers' own head, which may scale or cap."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def load(self, checkpoint: Checkpoint) -> None:
        if checkpoint.quantization is not None:
            raise _quantized(self._architecture)
        transformers = import_transformers()
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                config=self._hf_config,
                dtype=self._ctx.dtype,
                device_map=None if self._ctx.device.type == "cpu" else str(self._ctx.device),
                attn_implementation=RUN,
                use_safetensors={"safetensors": True, "pt": False}.get(checkpoint.load_format),
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # of its own kinds, and those of safetensors
            raise WeightError(f"{checkpoint.path}: transformers cannot load it: {_first_line(error)}") from error
        misshapen = [
            f"{name} (is {tuple(is_)}, should be {tuple(should)})" for name, is_, should in found["mismatched_keys"]
        ]
        require_fit(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), sorted(misshapen))
        self._take(model)

    def load_dummy(self, seed: int) -> None:
        transformers, device = import_transformers(), self._ctx.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), device:
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(
                self._hf_config, dtype=self._ctx.dtype, attn_implementation=RUN
            )
        self._take(model)

    def _take_apart(self, model: Any) -> None:
        self.body = model.get_decoder()
        self._layers = {model.get_submodule(name): layer for name, layer in self._by_name.items()}
        names = {module: name for name, module in model.named_modules()}
        model.set_submodule(names[self.body], _Given())
        self.head = model

    @torch.no_grad()
    def _take(self, model: Any) -> None:
        """Take a loaded model over, once it has shown that a token's logits depend on the token, its position and
        attention alone."""
        model.eval().requires_grad_(False)
        ids = torch.arange(_TRIED_TOKENS, device=self._ctx.device) % self._hf_config.vocab_size
        order = ids.flip(0)
        try:
            expected = model(input_ids=ids[None], use_cache=False, **{KEYWORD: attend_to_itself}).logits[0].float()
            self._take_apart(model)
            found = self.compute_logits(self._hidden(ids[order], order, attend_to_itself))
        except Exception as error:  # whatever a model's code meets when its parts are called apart
            reason = f"its body and its head cannot be run apart ({_first_line(error)})"
            raise _not_supported(self._architecture, reason) from error
        tolerance = torch.finfo(self._ctx.dtype).eps ** 0.5
        if not (found - expected[order]).norm() <= tolerance * expected.norm():
            raise _not_supported(
                self._architecture,
                "a token's logits depend on its neighbours not only through attention, or on positions that the "
                "model counts for itself",
            )

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        step = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False, KEYWORD: attend}
        return self.body(**step).last_hidden_state[0]


class _Given(nn.Module):
    """In the place of the body: hidden states as they come."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Output:
        return _Output([inputs_embeds])


class _Output(tuple):
    """What a head reads of its body: hidden states, and nothing of whatever else it passes on."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _ropes(hf: Any) -> list[dict[str, Any]]:
    """transformers' rope_parameters: one for all layers, or one for each layer type, which may be None."""
    found = getattr(hf, "rope_parameters", None) or {}
    return [rope for rope in ([found] if "rope_type" in found else found.values()) if rope]


def _with_fixed_rope(hf: Any, max_model_len: int) -> Any:
    """A copy of transformers' config in which no frequency depends on the length of the day."""
    hf = copy.deepcopy(hf)
    for rope in _ropes(hf):
        if rope["rope_type"] == "dynamic":
            rope["rope_type"] = "default"  # which it is up to max_position_embeddings
        if rope["rope_type"] == "longrope":
            length = "long" if max_model_len > rope["original_max_position_embeddings"] else "short"
            rope["short_factor"] = rope["long_factor"] = rope[f"{length}_factor"]
    return hf


def _traced(hf_config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, AttentionSpec]]:
    """The model on the meta device, and what its attention modules ask for; ModelNotSupported with the reason."""
    transformers = import_transformers()
    hf_config = copy.deepcopy(hf_config)
    for rope in _ropes(hf_config):
        if rope["rope_type"] == "longrope":
            rope["rope_type"] = "default"  # of the same shape, and does not look at the positions
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    if cls._is_stateful:
        raise ModelNotSupported("it keeps a recurrent state")
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                hf_config,
                dtype=dtype,
                attn_implementation=TRACE,
                experts_implementation="batched_mm",  # the others look at the data
            ).eval()
        specs = trace(model, dtype)
    except ModelNotSupported:
        raise
    except Exception as error:  # whatever a model's code meets on the meta device
        if not cls._supports_attention_backend:
            raise ModelNotSupported("its attention is code of its own") from error
        raise ModelNotSupported(f"it cannot be followed without data ({_first_line(error)})") from error
    if len(specs) != (layers := hf_config.num_hidden_layers):
        raise ModelNotSupported(f"{len(specs)} of its {layers} layers call an attention function")
    if model.get_decoder() is model:
        raise ModelNotSupported("its body is not apart from its head")
    return model, specs


def _quantized(architecture: str) -> ModelNotSupported:
    return ModelNotSupported(f"{architecture} runs through transformers' modules: use an unquantised checkpoint")


def _not_supported(architecture: str, reason: str) -> ModelNotSupported:
    return ModelNotSupported(
        f"{architecture} cannot run through transformers' modules: {reason}; "
        f"architectures with a file here: {', '.join(supported_architectures())}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
