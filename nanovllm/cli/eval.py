"""`nanovllm eval`: what a dtype or a quantisation costs, against the same model in float32 with plain pages."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from nanovllm.cli.options import engine_options
from nanovllm.cli.parity import all_logits, kl_divergence
from nanovllm.cli.units import size_text
from nanovllm.config import EngineConfig
from nanovllm.engine.build import find_model
from nanovllm.errors import ConfigError
from nanovllm.llm import LLM
from nanovllm.models.base import CausalLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.hub import resolve_model

_WINDOW = 512  # tokens that are read together
_WRITTEN = 128  # tokens of each text that the model writes itself


def run(args: argparse.Namespace) -> int:
    options = engine_options(args)
    path = resolve_model(args.model, options.pop("revision", None))
    checkpoint = open_checkpoint(path)
    window = min(_WINDOW, find_model(EngineConfig(str(path)), checkpoint)[1].max_position_embeddings - 1)
    quantization = checkpoint.quantization and "dequantize"
    exact = {"dtype": "float32", "quantization": quantization, "kv_cache_dtype": "auto", "quantize_activations": False}
    with _engine(str(path), window, options | exact) as reference, _engine(str(path), window, options) as tried:
        texts = _texts(args, checkpoint, reference, window)
        totals = [_compare(reference, tried, tokens) for tokens in texts]
        _report(totals, reference, tried)
    return 0


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one text. surprise: nats of the tokens that follow the first one, by the reference and by the other. kl, same:
    of each next-token distribution, and whether both have the same likeliest token."""

    surprise: tuple[torch.Tensor, torch.Tensor]
    kl: torch.Tensor
    same: torch.Tensor


def _engine(path: str, window: int, options: dict[str, Any]) -> LLM:
    """Whole windows in one step, op by op so that modules can be watched."""
    length = window + 1
    size = {"max_model_len": length, "max_num_batched_tokens": max(length, 256), "max_num_seqs": 64}
    pages = {"num_kvcache_blocks": 64 * (-(-length // options.get("kvcache_block_size", 16)) + 1)}
    return LLM(
        path, skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, **size, **pages, **options
    )


def _texts(args: argparse.Namespace, checkpoint: Checkpoint, reference: LLM, window: int) -> list[list[int]]:
    """The given text in windows; else what the reference writes, seeded."""
    if args.tokens < 2:
        raise ConfigError(f"--tokens {args.tokens}: of less than two tokens none follows another")
    if args.text is None:
        start, most = checkpoint.config.get("bos_token_id") or 0, min(_WRITTEN, window)
        lengths = [min(most, args.tokens - first) for first in range(0, args.tokens - 1, most)]
        params = [
            SamplingParams(temperature=1.0, max_tokens=length - 1, seed=seed, ignore_eos=True)
            for seed, length in enumerate(lengths)
        ]
        outputs = reference.generate([[start]] * len(lengths), params, use_tqdm=False)
        return [[start, *output.outputs[0].token_ids] for output in outputs]
    tokens = checkpoint.load_tokenizer().encode(args.text)[: args.tokens]
    if len(tokens) < 2:
        raise ConfigError("--text holds less than two tokens")
    windows = [tokens[i : i + window] for i in range(0, len(tokens), window)]
    return [w for w in windows if len(w) > 1]


def _compare(reference: LLM, tried: LLM, tokens: Sequence[int]) -> Totals:
    expected, found = (all_logits(llm, list(tokens)) for llm in (reference, tried))
    following = torch.tensor(tokens[1:])[:, None]
    surprise = tuple(-x[:-1].double().log_softmax(-1).gather(1, following)[:, 0] for x in (expected, found))
    kl = torch.cat([kl_divergence(e, f) for e, f in zip(expected.split(64), found.split(64), strict=True)])
    return Totals(cast("tuple[torch.Tensor, torch.Tensor]", surprise), kl, expected.argmax(-1) == found.argmax(-1))


def _report(totals: Sequence[Totals], reference: LLM, tried: LLM) -> None:
    kl, same = torch.cat([t.kl for t in totals]), torch.cat([t.same for t in totals])
    ours, theirs = (torch.cat([t.surprise[i] for t in totals]).mean().item() for i in (1, 0))
    print(f"{len(kl)} tokens, against the model in float32, whose weights take {size_text(_weight_bytes(reference))}")
    print(f"weights            {size_text(_weight_bytes(tried))}")
    print(f"perplexity         {math.exp(ours):.4f}, in float32 {math.exp(theirs):.4f}")
    print(f"KL                 {kl.mean():.2e} nats a token; 99% below {kl.quantile(0.99):.2e}, largest {kl.max():.2e}")
    print(f"same likeliest     {same.double().mean():.2%}")


def _weight_bytes(llm: LLM) -> int:
    (model,) = cast("list[CausalLM]", llm.apply_model(lambda model: model))
    return sum({id(p): p.numel() * p.itemsize for p in model.parameters()}.values())
