"""What several models answer in this process, be it alone or one of torchrun's:
torchrun ... -m distributed.families MODELS.json FOLDER"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.runner.batch_builder import build_batch
from nanovllm.engine.step import PlannedSequence, StepPlan
from nanovllm.ops.library import Library, library_or_reason

KERNELS = ["native", "torch"] if isinstance(library_or_reason(), Library) else ["torch"]
# of each kind of layers one is also computed by torch's kernels
TORCH_TOO = {
    *("llama", "qwen2", "qwen3-moe", "mixtral", "granitemoe-shared", "granite-hybrid-moe", "gemma3", "gpt2"),
    *("gpt-neox-sequential", "mpt-clipped", "falcon-7b", "falcon-40b"),
}
OPTIONS = {"device": "cpu", "skip_tokenizer_init": True, "kvcache_memory": "8MiB"}
# prompts in pieces, and too few pages for all: some sequences begin anew
SCARCE = OPTIONS | {"max_num_batched_tokens": 13, "max_num_seqs": 4, "kvcache_memory": None, "num_kvcache_blocks": 5}
PROMPTS = [np.random.default_rng(n).integers(2, 128, n).tolist() for n in (1, 9, 40)]
PROMPTS.append(PROMPTS[-1][:33] + PROMPTS[1])  # two pages in common
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


def answers(models: dict[str, str], executor: str) -> dict[tuple[str, str], dict[str, Any]]:
    """models: directories by family. By family and kernels."""
    found = {}
    for family, path in models.items():
        for kernels in KERNELS if family in TORCH_TOO else KERNELS[:1]:
            found[family, kernels] = answer(path, {"executor": executor, "kernels": kernels})
    return found


def answer(path: str, options: dict[str, Any]) -> dict[str, Any]:
    with LLM(path, **OPTIONS, **options) as llm:
        hidden, logits = one_pass(llm, PROMPTS[-1])
        found = {"hidden": hidden, "logits": logits, "text": generate(llm, PROMPTS)}
        found["again"] = generate(llm, PROMPTS[::-1])[::-1]
        found["recorded"] = llm.engine._executor._runner._graphs is not None
    with LLM(path, **SCARCE, **options) as llm:
        found["scarce"], found["preemptions"] = generate(llm, PROMPTS), llm.engine.stats.preemptions
    with LLM(path, **OPTIONS, **options, dtype="bfloat16") as llm:
        found["bfloat16 hidden"], found["bfloat16"] = one_pass(llm, PROMPTS[-1])
    return found


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


@torch.inference_mode()
def one_pass(llm: LLM, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [T, H] and logits [T, V] of a prompt; rank 0 alone has logits."""
    runner = llm.engine._executor._runner
    size = runner._block_size
    table = np.arange(1, 1 + -(-len(token_ids) // size))
    batch = build_batch(
        StepPlan([PlannedSequence(0, np.array(token_ids, np.int32), 0, table, 1, None)]),
        block_size=size,
        device=torch.device("cpu"),
        backend=runner._backend,
        with_states=runner.cache_plan.num_slots > 0,
    )
    hidden = runner.model(batch)
    return hidden.float().numpy(), runner.model.compute_logits(hidden).numpy()


if __name__ == "__main__":
    models, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    (folder / os.environ["RANK"]).write_bytes(pickle.dumps(answers(models, "torchrun")))
