"""The engines: each is loaded by `Engine(job)` in a process of its own, and `run(sequences)` generates greedily,
every sequence to its full length."""

from __future__ import annotations

import os
from typing import Any, Protocol

from benchmarks.llamacpp import LlamaCpp
from benchmarks.models import unquantized
from benchmarks.roof import linear_bytes
from benchmarks.workload import Job, Refused, Sequences, shared_beginning


class Engine(Protocol):
    def run(self, sequences: Sequences) -> dict[str, Any] | None:
        """What it says of itself, if anything: `weights`, the bytes that a step reads of them."""


class NanoVLLM:
    def __init__(self, job: Job) -> None:
        from nanovllm import LLM, ConfigError, SamplingParams

        options = unquantized(job.paths["own"]) | ({"load_format": "dummy"} if job.random else {})
        try:
            self._llm = LLM(job.paths["own"], dtype=job.dtype, skip_tokenizer_init=True, **options | job.options)
        except ConfigError as error:
            raise Refused(str(error)) from error
        self._params, self._weights = SamplingParams, linear_bytes(self._llm)

    def run(self, sequences: Sequences) -> dict[str, Any]:
        self._llm.reset_prefix_cache()
        params = [self._params(temperature=0, ignore_eos=True, max_tokens=n) for _, n in sequences]
        outputs = self._llm.generate([p for p, _ in sequences], params, use_tqdm=False)
        assert [len(o["token_ids"]) for o in outputs] == [n for _, n in sequences]
        return {"weights": self._weights}


class HuggingFace:
    """transformers' generate on one left-padded batch, to the longest output."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch, dtype = torch, getattr(torch, job.dtype)
        if job.random:
            config = transformers.AutoConfig.from_pretrained(job.paths["hf"])
            self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        else:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(job.paths["hf"], dtype=dtype)

    def run(self, sequences: Sequences) -> None:
        torch, width, count = self._torch, max(len(p) for p, _ in sequences), max(n for _, n in sequences)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in sequences])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in sequences])
        length = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
        assert out.shape[1] == width + count


class VLLM:
    """Prefix caching stays on, as it is by default: the sequences of two runs have nothing in common."""

    def __init__(self, job: Job) -> None:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # else it leaves one core unused
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its processes would compete for two cores
        from vllm import LLM, SamplingParams

        self._llm = LLM(
            job.paths["hf"],
            dtype=job.dtype,
            load_format="dummy" if job.random else "auto",
            skip_tokenizer_init=True,
            max_model_len=job.longest,
            max_num_seqs=256,
            gpu_memory_utilization=0.5,  # on the CPU: its share of the host's memory
        )
        self._params = SamplingParams

    def run(self, sequences: Sequences) -> None:
        params = [self._params(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for _, n in sequences]
        outputs = self._llm.generate([{"prompt_token_ids": p} for p, _ in sequences], params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in sequences]


class OpenVINO:
    """Continuous batching over the GGUF file, with the budget and the prefix cache that the others have. It looks
    for prefixes when a request is added, so a shared one is computed before them."""

    def __init__(self, job: Job) -> None:
        import openvino as ov
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = 256
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 4  # GiB
        self._ov, self._genai = ov, genai
        self._pipe = genai.ContinuousBatchingPipeline(job.paths["gguf"], scheduler, "CPU")

    def run(self, sequences: Sequences) -> None:
        import numpy as np

        def generate(sequences: Sequences) -> list[Any]:
            prompts = [self._ov.Tensor(np.array([p], dtype=np.int64)) for p, _ in sequences]
            configs = [config(max_new_tokens=n, ignore_eos=True, do_sample=False) for _, n in sequences]
            return self._pipe.generate(prompts, configs)

        config = self._genai.GenerationConfig
        if shared := shared_beginning(sequences):
            generate([(shared, 1)])
        outputs = generate(sequences)
        assert [len(o.m_generation_ids[0]) for o in outputs] == [n for _, n in sequences]


ENGINES: dict[str, type[Engine]] = {
    "nanovllm": NanoVLLM,
    "hf": HuggingFace,
    "vllm": VLLM,
    "llamacpp": LlamaCpp,
    "openvino": OpenVINO,
}
READS = {"nanovllm": "own", "hf": "hf", "vllm": "hf", "llamacpp": "gguf", "openvino": "gguf"}
"""Which of a job's paths each takes."""
