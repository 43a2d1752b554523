"""KL divergence of next-token distributions to transformers in fp32: what bfloat16 costs, and whose costs least."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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
    """The model on the English of our documents, and a tiny random Llama on random tokens."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        path = Path(models.find(args.model, "float32", Path(scratch), export=True, random=False).paths["hf"])
        found[args.model] = _compare(args.model, path, _text(args.model))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        save_random_model("llama", Path(scratch))
        vocab_size = open_checkpoint(Path(scratch)).config["vocab_size"]
        token_ids = random_prompts(vocab_size, [_TOKENS // 4])[0].token_ids  # it has few positions
        found["random llama"] = _compare("random llama", Path(scratch), token_ids)
    finish(args, kl=found)


def _text(model: str) -> list[int]:
    texts = "\n".join(page.read_text(encoding="utf-8") for page in sorted(_TEXTS.glob("*.md")))
    with LLM(model, kvcache_memory="64MiB", max_num_seqs=1, max_model_len=64) as llm:
        return llm.get_tokenizer().encode(texts)[:_TOKENS]


def _compare(name: str, path: Path, token_ids: list[int]) -> dict[str, Any]:
    expected = Reference(path, "float32", "cpu").logits(token_ids)
    print(f"{name}, {len(token_ids)} tokens, against transformers in float32; KL in nats")
    print(f"{'engine':<14} {'KL mean':>9} {'KL max':>9} {'same likeliest':>15}")
    found = {}
    for label, logits in _logits(path, token_ids):
        rows = [kl_divergence(e, f[:, : e.shape[1]]) for e, f in zip(expected.split(64), logits.split(64), strict=True)]
        kl = torch.cat(rows)
        same = (expected.argmax(-1) == logits.argmax(-1)).double().mean().item()
        found[label] = {"mean": kl.mean().item(), "max": kl.max().item(), "same_likeliest": same}
        print(f"{label:<14} {kl.mean():9.2g} {kl.max():9.2g} {same:15.1%}", flush=True)
    return found


def _logits(path: Path, token_ids: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """fp32 [T, V] of each engine in bfloat16."""
    for label, options in _OURS.items():
        with _engine(path, len(token_ids) + 1, options) as llm:
            yield label, all_logits(llm, token_ids)
    yield "hf", Reference(path, "bfloat16", "cpu").logits(token_ids)


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
