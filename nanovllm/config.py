"""EngineConfig: every option of the engine, checked where it enters."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ConfigError

STORED = ("gguf", "awq", "gptq", "compressed-tensors", "fp8")
"""Quantisation that checkpoints bring along."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "model_impl": ("auto", "nanovllm", "transformers"),
    "load_format": ("auto", "safetensors", "pt", "gguf", "dummy"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("int8", "int4", *STORED, "dequantize"),
    "device": ("auto", "cpu", "cuda"),
    "kv_cache_dtype": ("auto", "int8", "fp8", "fp8_e4m3"),
    "attention_backend": ("auto", "native", "cpu", "flash", "triton", "torch_varlen", "reference"),
    "kernels": ("auto", "native", "triton", "torch"),
    "scheduling_policy": ("fcfs", "priority"),
    "executor": ("auto", "mp", "ray", "torchrun"),
}
_QUANTISED_CACHES = {"int8": ("cpu", "native"), "fp8": ("cuda", "triton")}  # the device and backend that have kernels
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_DEFAULT_BATCHED_TOKENS = 2048
_SWITCHES = (
    *("skip_tokenizer_init", "trust_remote_code", "enable_expert_parallel"),
    *("async_scheduling", "enforce_eager", "enable_prefix_caching", "batch_invariant", "quantize_activations"),
)
_OPTIONAL_COUNTS = (
    *("max_model_len", "max_num_batched_tokens", "num_kvcache_blocks"),
    *("tensor_parallel_size", "num_threads"),
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of an engine; frozen. `resolve` fills in what depends on the model.

    model: a local Hugging Face directory, a `.gguf` file, a Hub repository id, or an alias.
    revision: branch, tag or commit of a Hub repository.
    tokenizer: a directory, file or repository id to take the tokenizer from instead.
    skip_tokenizer_init: no tokenizer; prompts are token ids and `text` stays empty.
    trust_remote_code: always False here; models that need their own code are refused.
    model_impl: whose modules run the model: "nanovllm" those of a file here or of a plugin,
        "transformers" Hugging Face's, "auto" the first where there is one.
    model_plugin: a Python file with a model of your own (docs/adding-a-model.md).
    load_format: "auto" by the files, safetensors before PyTorch's pickles ("pt"); "dummy" fills
        seeded random weights (benchmarks).
    dtype: "auto" is the checkpoint's own; quantised GGUF and float16 run as bfloat16 on CPU.
    quantization: in bfloat16, on GPUs also in float16: of linear layers' weights, while they are loaded
        (docs/quantization.md): "int8" a byte each, "int4" four bits and an int8 head. A checkpoint that is quantised
        already is computed with as it is, which may be said by its method's name ("gguf", "awq", "gptq",
        "compressed-tensors", "fp8"); "dequantize" widens it to dtype instead.
    quantize_activations: of quantised models: linear layers' inputs become 8 bits too, which is faster and less
        exact. On CPUs with AVX512-BF16 those that meet codes that are integers, with a scale for each 32 columns. On
        GPUs those of checkpoints by "compressed-tensors" or "fp8" whose weights have 8 bits, in steps of more than 256
        tokens, with a scale a token (int8 from Ampere on, float8 from Ada on).
    device: "auto" is cuda where torch sees one.
    seed: of the engine's own stream, from which requests without a seed draw theirs;
        None takes it from the operating system.
    max_model_len: prompt and output tokens of one sequence; default the model's own limit,
        lowered to what the page pool can hold.
    max_num_batched_tokens: token budget of one step (default 2048, at least max_num_seqs).
    max_num_seqs: sequences running at once.
    kvcache_block_size: tokens a page; a power of two from 8.
    num_kvcache_blocks: pages; default from the memory.
    kv_cache_dtype: of cached keys and values: "auto" is dtype; "int8" on CPUs and "fp8" (e4m3, also "fp8_e4m3") on GPUs
        take half the bytes of bfloat16, and room for an fp32 scale of each token and head (docs/quantization.md).
    kvcache_memory: CPU only: bytes or "4GiB" for pages and states of all ranks on a host; default a share
        of what is free.
    gpu_memory_utilization: GPU only: share of the device's memory for weights and pages.
    tensor_parallel_size: ranks that share the model, each a process; default 1, with executor="torchrun" the
        number of its processes.
    enable_expert_parallel: of a mixture of experts, whether each rank has some experts whole instead of a part of
        each: fewer and larger products, unevenly divided.
    executor: where the ranks are: "mp" starts a process for each, "ray" an actor of a Ray cluster, "torchrun"
        takes the processes that torchrun has started (vLLM's "external_launcher"), "auto" is this process for
        one rank and "mp" for more.
    async_scheduling: plan a step while the one before it runs: the scheduler's time is hidden. A sequence that
        ends by a token or a string is noticed a step late, and what that step gave it is dropped: outputs are
        the same. Default: on GPUs, and where ranks are processes of their own.
    worker_timeout: seconds after which a rank that does not answer is given up, and all with it.
    num_threads: CPU only: of each rank; default OMP_NUM_THREADS, else the ranks of a host share the physical
        cores that this process may use, and where these belong to several NUMA nodes, each rank is bound to
        one node. It is torch's number, for a whole process.
    enforce_eager: compute every step op by op. Otherwise, where the kernels are native, a step is
        recorded and run as a whole, and those that decode are recorded once for each number of sequences; on
        GPUs these are CUDA graphs, for a few numbers that others are padded to.
    enable_prefix_caching: reuse the pages of equal prefixes.
    attention_backend: "auto" takes the first that can: on CPUs "native" (this package's kernels), then "cpu"
        (torch's); on GPUs "flash" (flash-attn, if it is installed), "triton" (this package's kernels),
        "torch_varlen" (torch's), then "reference" (slow). A name takes that one, or says why it cannot run.
    kernels: whose linear layers, norms, rotations and sampling: "native" this package's own for CPUs, "triton"
        those for GPUs (with torch's matrix products), "torch" torch's, "auto" the first two wherever they can run.
    batch_invariant: a request's logits have the same bits alone, in any batch and order, however its prompt is cut,
        after a prefix hit or a preemption. The native kernels of CPUs always give that, and are required then; on
        GPUs it takes kernels and attention of "triton", in a slower way of theirs, and one rank.
    scheduling_policy: "fcfs", or "priority" (lower values first).
    generation_config: where sampling parameters come from if a request brings none: "auto" is
        the checkpoint's generation_config.json, "vllm" is SamplingParams(), else a folder that
        holds such a file.
    override_generation_config: values that go before that file's, such as {"temperature": 0.5}.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    model_impl: str = "auto"
    model_plugin: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    quantize_activations: bool = False
    device: str = "auto"
    seed: int | None = 0
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    kvcache_block_size: int = 16
    num_kvcache_blocks: int | None = None
    kv_cache_dtype: str = "auto"
    kvcache_memory: int | str | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int | None = None
    executor: str = "auto"
    enable_expert_parallel: bool = False
    async_scheduling: bool | None = None
    worker_timeout: float = 600.0
    num_threads: int | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    attention_backend: str = "auto"
    kernels: str = "auto"
    batch_invariant: bool = False
    scheduling_policy: str = "fcfs"
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None

    @classmethod
    def from_options(cls, model: str, options: dict[str, Any]) -> EngineConfig:
        """Build from keyword arguments; an unknown name is an error with the nearest valid one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"valid options: {', '.join(names)}"
                raise ConfigError(f"unknown option {name!r}; {hint}")
        return cls(model=model, **options)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be a path, a repository id or an alias, got {self.model!r}")
        left = {f.name for f in dataclasses.fields(self) if f.default is None and getattr(self, f.name) is None}
        for name, allowed in _CHOICES.items():
            if name not in left and getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in _SWITCHES:
            if name not in left and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _require_count("max_num_seqs", self.max_num_seqs)
        for name in _OPTIONAL_COUNTS:
            if name not in left:
                _require_count(name, getattr(self, name))
        if self.seed is not None:
            _require_count("seed", self.seed, least=0)
            if self.seed >= 2**64:
                raise ConfigError(f"seed={self.seed} does not fit in 64 bits")
        self._check_values()

    def _check_values(self) -> None:
        block_size = self.kvcache_block_size
        if not isinstance(block_size, int) or block_size < 8 or block_size & (block_size - 1):
            raise ConfigError(f"kvcache_block_size={block_size!r} must be a power of two of at least 8")
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization!r} must be in (0, 1]")
        timeout = self.worker_timeout
        if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
            raise ConfigError(f"worker_timeout={timeout!r} must be a number of seconds above 0")
        if self.trust_remote_code:
            raise ConfigError(
                "trust_remote_code=True: nanovllm never runs code from a model repository; "
                "use a model whose architecture is built in"
            )
        budget = self.max_num_batched_tokens
        if budget is not None and budget < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={budget} is below max_num_seqs={self.max_num_seqs}: every "
                "running sequence needs one token a step; raise the first or lower the second"
            )
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise ConfigError(f"generation_config={self.generation_config!r} must be 'auto', 'vllm' or a folder")
        override = self.override_generation_config
        if override is not None and not isinstance(override, dict):
            raise ConfigError(f"override_generation_config={override!r} must be a dict of sampling parameters")
        if self.model_plugin is not None and self.model_impl == "transformers":
            raise ConfigError("set model_plugin or model_impl='transformers', not both")
        if self.kvcache_memory is not None:
            parse_bytes("kvcache_memory", self.kvcache_memory)
            if self.num_kvcache_blocks is not None:
                raise ConfigError("set kvcache_memory or num_kvcache_blocks, not both")

    def resolve(
        self,
        *,
        checkpoint_dtype: str,
        max_positions: int,
        cuda: bool,
        launched: int | None = None,
        quantized: str | None = None,
    ) -> EngineConfig:
        """Return a copy with device, the dtypes, quantization, max_model_len, the token budget and the ranks filled in.

        checkpoint_dtype: of the weights on disk. quantized: the method that these are quantised by.
        max_positions: the model's own limit. cuda: whether this machine has a CUDA device. launched: processes that
        torchrun has started.
        """
        device = self.device if self.device != "auto" else ("cuda" if cuda else "cpu")
        if device == "cuda" and not cuda and self.executor != "ray":  # whose nodes may have some
            raise ConfigError("device='cuda' but torch sees no CUDA device; use device='cpu' or 'auto'")
        if device == "cuda" and self.kvcache_memory is not None:
            raise ConfigError("kvcache_memory is for device='cpu'; on cuda set gpu_memory_utilization")
        max_model_len = self.max_model_len or max_positions
        if max_model_len > max_positions:
            raise ConfigError(
                f"max_model_len={max_model_len} exceeds the {max_positions} positions of the model; "
                f"set max_model_len to at most {max_positions}"
            )
        dtype = self._resolved_dtype(checkpoint_dtype, device, quantized)
        ranks = self._ranks(launched)
        if self.batch_invariant:
            self._check_invariance(device, ranks)
        quantization = self._resolved_quantization(device, dtype, quantized)
        self._check_activations(device, quantization)
        hidden = self.executor in ("mp", "ray") or (self.executor == "auto" and (ranks > 1 or device == "cuda"))
        return dataclasses.replace(
            self,
            device=device,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=self._resolved_kv_cache_dtype(device),
            max_model_len=max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens or max(_DEFAULT_BATCHED_TOKENS, self.max_num_seqs),
            tensor_parallel_size=ranks,
            async_scheduling=hidden if self.async_scheduling is None else self.async_scheduling,
        )

    def _ranks(self, launched: int | None) -> int:
        if self.executor != "torchrun":
            return self.tensor_parallel_size or 1
        if launched is None:
            raise ConfigError(
                "executor='torchrun', but torchrun did not start this process: use `torchrun --nproc-per-node=N ...`"
            )
        if self.tensor_parallel_size not in (None, launched):
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}, but torchrun started {launched} processes; "
                "leave it out, or start as many"
            )
        return launched

    def _check_invariance(self, device: str, ranks: int) -> None:
        if device == "cuda" and ranks > 1:
            raise ConfigError(
                "batch_invariant=True: the order in which NCCL sums over GPUs follows the batch; "
                "set tensor_parallel_size=1"
            )
        own = "native" if device == "cpu" else "triton"
        if self.attention_backend not in ("auto", own, "triton"):
            raise ConfigError(
                f"batch_invariant=True: attention_backend={self.attention_backend!r} computes a token in an order that "
                f"follows the others; set attention_backend={own!r}"
            )

    def _resolved_dtype(self, checkpoint_dtype: str, device: str, quantized: str | None) -> str:
        if self.dtype != "auto":
            return self.dtype
        published = quantized not in (None, "gguf") and self.quantization != "dequantize"
        if checkpoint_dtype == "float32":
            return "bfloat16" if published or self.quantization in ("int8", "int4") else "float32"
        # CPUs multiply bfloat16 natively far more often than float16
        return "bfloat16" if device == "cpu" else checkpoint_dtype

    def _resolved_quantization(self, device: str, dtype: str, quantized: str | None) -> str | None:
        asked = self.quantization
        if asked in ("dequantize", *STORED) and quantized is None:
            raise ConfigError(f"quantization={asked!r} is for checkpoints that are, which this is not; leave it out")
        again = asked in ("int8", "int4") and quantized not in (None, "gguf")
        if again or (asked in STORED and asked != quantized):
            why = ", and what codes have lost another scheme would not bring back" if again else ""
            raise ConfigError(
                f"quantization={asked!r}: the checkpoint is quantised by {quantized!r}{why}; leave quantization out "
                "to compute with it, or set 'dequantize' to widen it"
            )
        gpus = device == "cuda" or self.kernels == "triton"  # whose kernels can be interpreted elsewhere
        dtypes = ("bfloat16", "float16") if gpus else ("bfloat16",)
        if asked is None:
            return quantized if dtype in dtypes else None
        if asked != "dequantize" and dtype not in dtypes:
            what = " or ".join(map(repr, dtypes))
            raise ConfigError(
                f"quantization={asked!r} runs with dtype={what}, not {dtype!r}; set that or leave quantization out"
            )
        return asked

    def _resolved_kv_cache_dtype(self, device: str) -> str:
        asked = self.kv_cache_dtype.removesuffix("_e4m3")
        if asked == "auto":
            return asked
        own_device, backend = _QUANTISED_CACHES[asked]
        if self.attention_backend in (backend, "reference"):
            return asked
        if device != own_device:
            (other,) = (name for name, (its_device, _) in _QUANTISED_CACHES.items() if its_device == device)
            raise ConfigError(f"kv_cache_dtype={asked!r} is for device={own_device!r}; on {device} set {other!r}")
        if self.attention_backend != "auto":
            raise ConfigError(
                f"kv_cache_dtype={asked!r}: attention_backend={self.attention_backend!r} has no kernels for it; set "
                f"attention_backend={backend!r}, or kv_cache_dtype='auto'"
            )
        return asked

    def _check_activations(self, device: str, quantization: str | None) -> None:
        if not self.quantize_activations:
            return
        gpus = device == "cuda" or self.kernels == "triton"
        if quantization in (None, "dequantize"):
            reason = "takes weights that are quantised, and computes with their codes"
        elif gpus and quantization not in ("compressed-tensors", "fp8"):
            reason = "is for checkpoints by 'compressed-tensors' or 'fp8' on GPUs"
        elif gpus and self.batch_invariant:
            reason = "lets a token's bits depend on how many tokens a step has, which batch_invariant=True rules out"
        elif not gpus and quantization == "fp8":
            reason = "takes codes that are integers on CPUs, and those of 'fp8' are not"
        else:
            return
        raise ConfigError(f"quantize_activations=True {reason}; leave it out")


def allowed_values(option: str) -> tuple[str, ...] | None:
    """The values of an option that takes one of a few; None for other options."""
    return _CHOICES.get(option)


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes of 123, "512MiB" or "4GB"; ConfigError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", value, re.I) if isinstance(value, str) else None
    size = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0
    if not 1 <= size < math.inf:
        raise ConfigError(f"{name}={value!r} must be a number of bytes or a size such as '4GiB'")
    return int(size)


def _require_count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
