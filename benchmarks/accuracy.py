"""KL divergence of next-token distributions to transformers in fp32: what bfloat16 costs, and whose costs least; what
int8 and int4 cost, beside ggml's Q4_1."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import models
from benchmarks.report import finish
from nanovllm import LLM
from nanovllm.cli.parity import all_logits, kl_divergence
from nanovllm.cli.prompts import random_prompts
from nanovllm.cli.reference import Reference, save_random_model
from nanovllm.weights.checkpoint import open_checkpoint

_TOKENS = 1000
_TEXTS = Path(__file__).parents[1] / "docs"
_OURS = {"nanovllm": {"kernels": "auto"}, "nanovllm-torch": {"kernels": "torch", "attention_backend": "cpu"}}


def run(args: argparse.Namespace) -> None:
    """The model on the English of our documents, in bfloat16 and quantised; a tiny random Llama on random tokens."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        path = Path(models.find(args.model, "float32", Path(scratch), export=True, random=False).paths["hf"])
        text = _text(args.model)
        found[args.model] = _compare(args.model, path, text, _in_bfloat16(path, text))
        name = f"{args.model} with noise"
        found[name] = _compare(name, *_quantized(path, text, Path(scratch), args.seed))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        save_random_model("llama", Path(scratch))
        vocab_size = open_checkpoint(Path(scratch)).config["vocab_size"]
        token_ids = random_prompts(vocab_size, [_TOKENS // 4])[0].token_ids  # it has few positions
        found["random llama"] = _compare(
            "random llama", Path(scratch), token_ids, _in_bfloat16(Path(scratch), token_ids)
        )
    finish(args, kl=found)


def _text(model: str) -> list[int]:
    texts = "\n".join(page.read_text(encoding="utf-8") for page in sorted(_TEXTS.glob("*.md")))
    with LLM(model, kvcache_memory="64MiB", max_num_seqs=1, max_model_len=64) as llm:
        return llm.get_tokenizer().encode(texts)[:_TOKENS]


def _compare(
    name: str, path: Path, token_ids: list[int], engines: Iterator[tuple[str, torch.Tensor]]
) -> dict[str, Any]:
    """engines: names and logits."""
    expected = Reference(path, "float32", "cpu").logits(token_ids)
    print(f"{name}, {len(token_ids)} tokens, against transformers in float32; KL in nats")
    print(f"{'engine':<14} {'KL mean':>9} {'KL max':>9} {'same likeliest':>15}")
    found = {}
    for label, logits in engines:
        rows = [kl_divergence(e, f[:, : e.shape[1]]) for e, f in zip(expected.split(64), logits.split(64), strict=True)]
        kl = torch.cat(rows)
        same = (expected.argmax(-1) == logits.argmax(-1)).double().mean().item()
        found[label] = {"mean": kl.mean().item(), "max": kl.max().item(), "same_likeliest": same}
        print(f"{label:<14} {kl.mean():9.2g} {kl.max():9.2g} {same:15.1%}", flush=True)
    return found


def _in_bfloat16(path: Path, token_ids: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """fp32 [T, V] of each engine."""
    for label, options in _OURS.items():
        yield label, _logits(path, token_ids, options)
    yield "hf", Reference(path, "bfloat16", "cpu").logits(token_ids)


def _quantized(
    model: Path, token_ids: list[int], folder: Path, seed: int
) -> tuple[Path, list[int], Iterator[tuple[str, torch.Tensor]]]:
    """A source in bfloat16 that 4 bits cannot hold, whatever the model's file is: its projections with uniform noise of
    half a step of Q4_1. ggml's Q4_1 of it has the same head in bfloat16, which int4 and int8 have in int8."""
    random, source, rounded = np.random.default_rng(seed), folder / "source", folder / "q4_1"
    tensors = load_file(model / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            groups = weight.numpy().reshape(-1, 32)
            step = np.ptp(groups, axis=1, keepdims=True) / 15
            noisy = groups + step * random.uniform(-0.5, 0.5, groups.shape).astype(np.float32)
            tensors[name] = torch.from_numpy(noisy.reshape(weight.shape))
        tensors[name] = tensors[name].bfloat16()
    _save(model, source, tensors)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            blocks = gguf.quants.quantize(weight.float().numpy(), kind)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    _save(model, rounded, tensors)
    contenders = {"bfloat16": (source, {}), "int8": (source, {"quantization": "int8"})}
    contenders |= {"int4": (source, {"quantization": "int4"}), "ggml's Q4_1": (rounded, {})}
    return (
        source,
        token_ids,
        ((label, _logits(path, token_ids, options)) for label, (path, options) in contenders.items()),
    )


def _save(model: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(path: Path, token_ids: list[int], options: dict[str, str]) -> torch.Tensor:
    with _engine(path, len(token_ids) + 1, options) as llm:
        return all_logits(llm, token_ids)


@contextmanager
def _engine(path: Path, length: int, options: dict[str, str]) -> Iterator[LLM]:
    """Whole prompts in one step, op by op so that modules can be watched."""
    size = {
        "enforce_eager": True,
        "max_model_len": length,
        "max_num_batched_tokens": max(length, 256),
        "enable_prefix_caching": False,
    }
    with LLM(str(path), dtype="bfloat16", skip_tokenizer_init=True, **size, **options) as llm:
        yield llm
